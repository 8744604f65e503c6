"""Quality of optimizers at equal data, schedule and tokens: every method with learning rates of its own, several seeds.

    python benchmarks/quality/run.py 'TEXT/train/*.txt' TEXT/valid.txt
    python benchmarks/quality/run.py 'TEXT/train/*.txt' TEXT/valid.txt --methods '[adamw, galore, fira]'

1. Successive halving: all pairs of a learning rate for matrices and one for embeddings, head and norms, with few steps; the best
   third with more, until one is left. A winner at the edge of the grid is followed outwards until it is beaten. Judged on the
   last training file, which these runs do not train on.
2. The long runs: that pair with fresh seeds on all training files, judged once on `valid`.

Every run leaves results/MODEL/KEY.json beside this file; what is there is not run again, so an interrupted grid goes on where
it was, and several processes may share the methods. `table.py` makes tables and figures of it.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import itertools
import json
import math
import multiprocessing
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subspan.memory import count_memory
from subspan.optim.groups import param_groups
from subspan.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from subspan.training.trainer import build_optimizer, train

RESULTS = Path(__file__).with_name("results")

BATCH = 8  # sequences of 256 tokens a step
ROUNDS = (60, 200)  # steps of the rounds of the search; each keeps a third
LONG = 750  # steps of a long run: 1.5 M tokens
SEEDS = (1, 2, 3)  # of the long runs; the search has 0
DENSE_RATES = (0.003, 0.01, 0.03)
GAP = 100  # T
MODELS = {"llama-2m": (32, 2048), "llama-9m": (64, 4096), "llama-25m": (96, 4096)}
"""r, a quarter of the hidden size, and pieces of the tokenizer."""


@dataclasses.dataclass(frozen=True)
class Method:
    """What a row is: settings of `subspan train`, or a package's optimizer over the same groups; rates that are tried."""

    rates: tuple[float, ...]
    optim: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    build: Callable[[list[dict[str, Any]], float], torch.optim.Optimizer] | None = None


def _package(module: str, name: str, renamed: dict[str, Any] | None = None, **options: Any) -> Any:
    def build(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        package = __import__(module, fromlist=[name])
        plain = [
            {**group, "params": [p for _, p in group["params"]], **((renamed or {}) if "rank" in group else {})}
            for group in groups
        ]
        optimizer: torch.optim.Optimizer = getattr(package, name)(plain, lr=lr, **options)
        return optimizer

    return build


FULL, LOW, FREE = (0.0003, 0.001, 0.003), (0.001, 0.003, 0.01), (0.003, 0.01, 0.03)
_APOLLO = {"proj": "random", "scale_type": "channel", "scale": 1.0}
METHODS: dict[str, Method] = {
    "adamw": Method(FULL, {"preset": "adamw"}),
    "adamw beta2=0.95": Method(FULL, {"preset": "adamw", "betas": [0.9, 0.95]}),
    "adafactor": Method(FULL, {"preset": "adafactor"}),
    "muon": Method(FREE, {"preset": "muon"}),
    "sign_sgd": Method(FULL, {"preset": "sign_sgd"}),
    "galore": Method(LOW, {"preset": "galore"}),
    "galore, random basis": Method(LOW, {"preset": "galore", "projector": "random"}),
    "galore, transported": Method(LOW, {"preset": "galore", "moments": "transport"}),
    "galore8bit": Method(LOW, {"preset": "galore8bit"}),
    "fira": Method(LOW, {"preset": "fira"}),
    "fira, random basis": Method(LOW, {"preset": "fira", "projector": "random"}),
    "frugal": Method(FULL, {"preset": "frugal"}),
    "apollo": Method(LOW, {"preset": "apollo"}),
    "apollo_mini": Method(LOW, {"preset": "apollo_mini", "rank": 1}),
    "lora": Method(LOW, {"preset": "adamw"}, {"baseline": "lora"}),
    "relora": Method(LOW, {"preset": "adamw"}, {"baseline": "relora", "merge_every": 150}),
    "factorized": Method(LOW, {"preset": "adamw"}, {"baseline": "factorized"}),
    "galore_torch 1.0": Method(LOW, build=_package("galore_torch", "GaLoreAdamW", no_deprecation_warning=True)),
    "fira 1.0 (package)": Method(
        LOW, build=_package("fira", "FiraAdamW", {"alpha": 0.25}, no_deprecation_warning=True)
    ),
    "apollo_torch 1.0": Method(LOW, build=_package("apollo_torch", "APOLLOAdamW", _APOLLO)),
}


def configure(
    method: Method,
    model: str,
    lr: float,
    dense_lr: float,
    steps: int,
    seed: int,
    files: list[str],
    valid: str,
    out: Path,
    **run: Any,
) -> TrainConfig:
    rank, vocab_size = MODELS[model]
    optim = {"preset": "galore", "rank": rank, "update_proj_gap": GAP, "gradients": "hold", **method.optim}
    return TrainConfig(
        model=ModelConfig(name=model, **method.model),
        data=DataConfig(files=files, valid_files=valid, vocab_size=vocab_size),
        optim=OptimConfig(lr=lr, dense_lr=dense_lr, **optim),
        run=RunConfig(
            **{
                "out": str(out),
                "steps": steps,
                "warmup_steps": steps // 10,
                "batch_size": BATCH,
                "threads": 1,  # runs side by side: threads that wait for each other would lose both
                "eval_every": 0,
                "checkpoint_every": 0,
                "log_every": 100,
                "seed": seed,
                "export": False,
                **run,
            }
        ),
    )


def one_run(name: str, config: TrainConfig, queue: Any) -> None:
    """Train in this process and put a small result into `queue`."""
    method, made = METHODS[name], []

    def builder(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        model.compile()  # in place: about a fifth faster on a CPU, for every method alike
        if method.build is None:
            optimizer = build_optimizer(model, config)
        else:
            optim = config.optim
            groups = param_groups(
                model,
                rank=optim.rank,
                update_proj_gap=optim.update_proj_gap,
                dense_lr=optim.dense_lr,
                verbose=False,
            )
            optimizer = method.build(groups, optim.lr)
        made[:] = [model, optimizer]
        return optimizer

    summary = train(config, builder)
    kept = ("valid_loss", "perplexity", "tokens", "seconds", "peak_memory_bytes", "versions")
    curve = [json.loads(line) for line in (Path(config.run.out) / "metrics.jsonl").read_text().splitlines()]
    queue.put(
        {
            "method": name,
            "lr": config.optim.lr,
            "dense_lr": config.optim.dense_lr,
            "steps": config.run.steps,
            "seed": config.run.seed,
            "state_bytes": count_memory(*made).optimizer + _hidden_bytes(made[1]),
            "loss": [[line["tokens"], line["loss"]] for line in curve if "loss" in line][::10],
            **{key: summary[key] for key in kept},
        }
    )


def _hidden_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the bases that packages keep in objects of their own."""
    projectors = [state["projector"] for state in optimizer.state.values() if "projector" in state]
    bases = [getattr(projector, "ortho_matrix", None) for projector in projectors]
    return sum(basis.nbytes for basis in bases if isinstance(basis, torch.Tensor))


def result_of(name: str, config: TrainConfig) -> dict[str, Any]:
    """The result of a run: from its file, or by a run in a process of its own."""
    key = f"{name} {config.optim.lr:g} {config.optim.dense_lr:g} {config.run.steps} {config.run.seed}".replace(" ", "_")
    file = RESULTS / config.model.name / f"{key}.json"
    if not file.exists():
        shutil.rmtree(config.run.out, ignore_errors=True)  # left by an interrupted run
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=one_run, args=(name, config, queue))
        process.start()
        while process.is_alive() and queue.empty():
            process.join(1)
        if queue.empty():
            raise RuntimeError(f"run {key!r} died, see above")
        result = queue.get()
        process.join()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
    result = json.loads(file.read_text())
    print(f"== {key}: loss {result['valid_loss']:.4f}", flush=True)
    return dict(result)


def search(name: str, rounds: Iterable[int], start: Callable[..., TrainConfig]) -> tuple[float, float]:
    """The best pair of rates: by successive halving, then outwards from the edges of the grid."""
    pairs = list(itertools.product(METHODS[name].rates, DENSE_RATES))
    for steps in rounds:
        losses = {pair: result_of(name, start(*pair, steps))["valid_loss"] for pair in pairs}
        pairs = sorted(pairs, key=lambda pair: losses[pair])[: -(-len(pairs) // 3)]
    best = pairs[0]
    while new := [pair for pair in _outwards(best, METHODS[name].rates) if pair not in losses]:
        losses |= {pair: result_of(name, start(*pair, steps))["valid_loss"] for pair in new}
        best = min(losses, key=lambda pair: losses[pair])
    return best


def _outwards(pair: tuple[float, float], rates: tuple[float, ...]) -> list[tuple[float, float]]:
    """The neighbours of `pair` outside of the grid."""
    lr, dense_lr = pair
    return [
        *((beyond, dense_lr) for beyond in _beyond(lr, rates)),
        *((lr, beyond) for beyond in _beyond(dense_lr, DENSE_RATES)),
    ]


def _beyond(rate: float, rates: tuple[float, ...]) -> list[float]:
    """The next rate of the sequence 1, 3, 10, 30, ... where `rate` is the smallest or largest of `rates`, or beyond them."""
    decade = math.floor(math.log10(rate) + 1e-9)
    one = round(rate / 10**decade) == 1
    lower, upper = (3 * 10.0 ** (decade - 1), 3 * 10.0**decade) if one else (10.0**decade, 10.0 ** (decade + 1))
    return [float(f"{r:g}") for r in ([lower] if rate <= rates[0] else []) + ([upper] if rate >= rates[-1] else [])]


def main(
    train: str,
    valid: str,
    out: str = "runs/quality",
    model: str = "llama-2m",
    methods: list[str] | None = None,
    seeds: list[int] | None = None,
    search_only: bool = False,
) -> None:
    """Search, then the long runs, method by method.

    Args:
        train: glob of the training files; the last one is held out from the search
        valid: validation file, used by the long runs alone
        out: folder for the run folders
        model: one of `MODELS`
        methods: some of the methods; none: all
        seeds: of the long runs; none: 1, 2, 3
        search_only: no long runs yet
    """
    files = sorted(glob.glob(train))
    if len(files) < 2:
        raise SystemExit(f"train={train!r} matches {len(files)} files: at least two are needed, one is held out")
    for name in methods or METHODS:
        if name not in METHODS:
            raise SystemExit(f"methods: {name!r} is unknown, use some of {', '.join(METHODS)}")
        folder = Path(out) / model / name.replace(" ", "_")
        start = functools.partial(configure, METHODS[name], model, out=folder)
        short = functools.partial(start, seed=0, files=files[:-1], valid=files[-1], eval_sequences=256)
        lr, dense_lr = search(name, ROUNDS, short)
        for seed in [] if search_only else seeds or SEEDS:
            result_of(name, start(lr, dense_lr, LONG, seed, files, valid, eval_sequences=1024))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
