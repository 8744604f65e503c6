"""The methods of the grid, and a run of one: what run.py and reproductions/ share."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ldadam import LDAdam
from torch import nn

from subspan.memory import count_memory
from subspan.optim.groups import param_groups
from subspan.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from subspan.training.optimizers import build_optimizer
from subspan.training.trainer import train

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import beside, finite, once, walk

RESULTS = Path(__file__).with_name("results")

BATCH = 4  # sequences of 256 tokens a step
SHORT = 400  # steps of a run of the search
LONG = 2000  # steps of a long run: 2 M tokens
SEEDS = (1, 2, 3)  # of the long runs; the search has 0
DENSE_RATE = 0.1  # where searches start: AdamW, from 0.01, went there
GAP = 100  # T
MODELS = {"llama-2m": (32, 2048), "llama-9m": (64, 4096), "llama-60m": (128, 8192)}
"""r, a quarter of the hidden size, and pieces of the tokenizer."""


Build = Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True)
class Method:
    """What a row is: settings of `subspan train`, or a package's optimizer over the same groups."""

    rate: float  # of matrices, where its search starts
    optim: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    build: Build | None = None
    like: str = ""  # a row that takes the same steps: its rates are taken over, without a search


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


_APOLLO = {"proj": "random", "scale_type": "channel", "scale": 1.0}
METHODS: dict[str, Method] = {
    "adamw": Method(0.003, {"preset": "adamw"}),
    "adamw beta2=0.95": Method(0.003, {"preset": "adamw", "betas": [0.9, 0.95]}),
    "adafactor": Method(0.001, {"preset": "adafactor"}),
    "muon": Method(0.01, {"preset": "muon"}),
    "subspan": Method(0.01, {"preset": "subspan"}),
    "subspan, 4 bits": Method(0.01, {"preset": "subspan", "state_dtype": "int4"}),
    "subspan, dense in 8 bits": Method(0.01, {"preset": "subspan", "dense_state_dtype": "int8"}),
    "sign_sgd": Method(0.001, {"preset": "sign_sgd"}),
    "scale_sgd": Method(0.001, {"preset": "scale_sgd"}),
    "galore": Method(0.01, {"preset": "galore"}),
    "galore, random basis": Method(0.01, {"preset": "galore", "projector": "random"}),
    "galore, transported": Method(0.003, {"preset": "galore", "moments": "transport"}),
    "galore8bit": Method(0.003, {"preset": "galore8bit"}),
    "fira": Method(0.01, {"preset": "fira"}),
    "fira, random basis": Method(0.01, {"preset": "fira", "projector": "random"}),
    "frugal": Method(0.001, {"preset": "frugal"}),
    "apollo": Method(0.01, {"preset": "apollo"}),
    "apollo_mini": Method(0.003, {"preset": "apollo_mini", "rank": 1}),
    "lora": Method(0.003, {"preset": "adamw"}, {"baseline": "lora"}),
    "relora": Method(0.003, {"preset": "adamw"}, {"baseline": "relora", "merge_every": 150}),
    "factorized": Method(0.003, {"preset": "adamw"}, {"baseline": "factorized"}),
    "galore_torch 1.0": Method(
        0.01, build=_package("galore_torch", "GaLoreAdamW", no_deprecation_warning=True), like="galore"
    ),
    "fira 1.0 (package)": Method(
        0.01, build=_package("fira", "FiraAdamW", {"alpha": 0.25}, no_deprecation_warning=True)
    ),
    "ldadam (ours)": Method(0.001, build=LDAdam),
    "ldadam (ours), no feedback": Method(
        0.003, build=functools.partial(LDAdam, error_feedback=False), like="ldadam (ours)"
    ),
    "ldadam (ours), 8 bits": Method(
        0.003, build=functools.partial(LDAdam, error_bits=8, moment_bits=8), like="ldadam (ours)"
    ),
    "ldadam (ours), 4-bit error": Method(
        0.003, build=functools.partial(LDAdam, error_bits=4, moment_bits=8), like="ldadam (ours)"
    ),
    "ldadam": Method(0.003, {"preset": "ldadam", "update_proj_gap": 1}, like="ldadam (ours)"),
    "apollo_torch 1.0": Method(0.01, build=_package("apollo_torch", "APOLLOAdamW", _APOLLO)),
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


def compiled(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer; the model is compiled in place: about a fifth faster on a CPU, for every method alike."""
    model.compile()
    return optimizer_of(model, config)


def optimizer_of(model: nn.Module, config: TrainConfig, build: Build | None = None) -> torch.optim.Optimizer:
    """That of `subspan train`, or a package's over the same groups."""
    optim = config.optim
    if build is None:
        return build_optimizer(model, config)
    schedule = {"update_proj_gap": optim.update_proj_gap, "dense_lr": optim.dense_lr}
    return build(param_groups(model, rank=optim.rank, verbose=False, **schedule), optim.lr)


def one_run(name: str, config: TrainConfig, compile: bool = True) -> dict[str, Any]:
    """Train, and make a small result of it."""
    method, made = METHODS[name], []

    def builder(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        if compile:
            model.compile()
        made[:] = [model, optimizer_of(model, config, method.build)]
        return made[1]

    summary = train(config, builder)
    kept = ("valid_loss", "perplexity", "tokens", "seconds", "peak_memory_bytes", "versions")
    curve = [json.loads(line) for line in (Path(config.run.out) / "metrics.jsonl").read_text().splitlines()]
    return {
        "method": name,
        "lr": config.optim.lr,
        "dense_lr": config.optim.dense_lr,
        "steps": config.run.steps,
        "seed": config.run.seed,
        "state_bytes": count_memory(*made).optimizer + _hidden_bytes(made[1]),
        "loss": [[line["tokens"], line["loss"]] for line in curve if "loss" in line][::10],
        **{key: summary[key] for key in kept},
    }


def _hidden_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the bases that packages keep in objects of their own."""
    projectors = [state["projector"] for state in optimizer.state.values() if "projector" in state]
    bases = [getattr(projector, "ortho_matrix", None) for projector in projectors]
    return sum(basis.nbytes for basis in bases if isinstance(basis, torch.Tensor))


def result_of(name: str, config: TrainConfig, compile: bool = True) -> dict[str, Any]:
    """The result of a run: from its file, or by a run in a process of its own."""
    key = f"{name} {config.optim.lr:g} {config.optim.dense_lr:g} {config.run.steps} {config.run.seed}".replace(" ", "_")
    file = RESULTS / config.model.name / f"{key}.json"
    return once(file, config.run.out, one_run, name, config, compile)


def search(name: str, start: Callable[..., TrainConfig], steps: int = SHORT) -> list[tuple[float, float]]:
    """The pair of rates that is better than its four neighbours, in runs of `steps`, and the second best that was tried."""
    tried: dict[tuple[float, float], float] = {}

    def loss(pair: tuple[float, float]) -> float:
        tried[pair] = float(result_of(name, start(*pair, steps))["valid_loss"])
        return tried[pair]

    best = walk((METHODS[name].rate, DENSE_RATE), neighbours, loss)
    return [best, min(tried.keys() - {best}, key=lambda pair: finite(tried[pair]))]


def neighbours(pair: tuple[float, float]) -> list[tuple[float, float]]:
    lr, dense_lr = pair
    return [*((rate, dense_lr) for rate in beside(lr)), *((lr, rate) for rate in beside(dense_lr))]
