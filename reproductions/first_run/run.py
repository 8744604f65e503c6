"""First run: full-rank AdamW, GaLore with exact SVD, GaLore with subspace iteration, and galore_torch, on one model and text.

    python reproductions/first_run/run.py 'TEXT/train/*.txt' TEXT/valid.txt

Learning rates, one for projected and one for dense parameters, come from a search: short runs that are judged on the last
training file, which they do not train on. AdamW has its own search; the three GaLores share one, because on equal gradients
they take equal steps (tests/test_parity.py). Then one long run each, judged once on `valid`. Model, data order, schedule and
token budget are the same for all. Every run leaves one file in results/ beside this file; what is there is not
run again, so an interrupted search goes on where it was, and two processes may share the methods (--methods). `table.py`
writes the table from these files.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subspan.memory import count_memory
from subspan.optim.groups import param_groups
from subspan.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from subspan.training.optimizers import build_optimizer
from subspan.training.trainer import train

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from grid import once, training_files

RESULTS = Path(__file__).with_name("results")

RANK, GAP, SCALE = 64, 100, 0.25
BATCH, MICRO_BATCH = 16, 8  # sequences of 256 tokens a step, a pass
SHORT, LONG = 400, 1250  # steps: 1.6 M and 5.1 M tokens; 120 steps were too short a search (docs/LOG.md)

SEARCHED = {  # method: whose search it uses
    "adamw": "adamw",
    "galore_subspace": "galore_subspace",
    "galore_svd": "galore_subspace",
    "galore_torch": "galore_subspace",
}
LEARNING_RATES = {"adamw": (0.001, 0.0005, 0.00025), "galore_subspace": (0.003, 0.01, 0.001)}
DENSE_LEARNING_RATES = (0.003, 0.001, 0.01)  # the first is used while lr is searched


def make_optimizer(method: str, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """torch's AdamW, ours, or the reference, over the same three groups."""
    if method.startswith("galore_s"):
        return build_optimizer(model, config)
    optim = config.optim
    rank = None if method == "adamw" else optim.rank
    groups = param_groups(
        model,
        rank=rank,
        scale=optim.scale,
        update_proj_gap=optim.update_proj_gap,
        dense_lr=optim.dense_lr,
        verbose=False,
    )
    if method == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, weight_decay=0.0)
    import galore_torch

    plain = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
    return galore_torch.GaLoreAdamW(plain, lr=optim.lr, no_deprecation_warning=True)


def time_reference_refreshes() -> list[float]:
    """Seconds of every SVD that galore_torch does from now on."""
    from galore_torch.galore_projector import GaLoreProjector

    seconds: list[float] = []
    original = GaLoreProjector.get_orthogonal_matrix

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = original(*args, **kwargs)
        seconds.append(time.perf_counter() - begin)
        return result

    GaLoreProjector.get_orthogonal_matrix = timed
    return seconds


def configure(
    method: str,
    lr: float,
    dense_lr: float,
    steps: int,
    train_files: list[str],
    valid: str,
    seed: int,
    out: Path,
    autocast: bool = True,
) -> TrainConfig:
    projector = {"galore_svd": "svd", "galore_subspace": "subspace_iteration"}.get(method)
    return TrainConfig(
        model=ModelConfig(name="llama-9m"),
        data=DataConfig(files=train_files, valid_files=valid),
        optim=OptimConfig(
            preset="adamw" if method == "adamw" else "galore",
            lr=lr,
            dense_lr=dense_lr,
            rank=RANK,
            update_proj_gap=GAP,
            scale=SCALE,
            projector=projector,
            gradients="hold",
        ),
        run=RunConfig(
            out=str(out),
            steps=steps,
            warmup_steps=steps // 10,
            batch_size=BATCH,
            micro_batch=MICRO_BATCH,
            threads=1,  # two methods side by side on two cores: threads that wait for each other would lose both
            eval_every=0 if steps == SHORT else 250,
            checkpoint_every=0,
            eval_sequences=256,
            log_every=50,
            seed=seed,
            autocast=autocast,
            export=False,
        ),
    )


def one_run(method: str, config: TrainConfig, full_validation: bool) -> dict[str, Any]:
    """Train, and make a small result of it."""
    made: list[Any] = []
    svd_seconds = time_reference_refreshes() if method == "galore_torch" else []

    def builder(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        model.compile()  # in place: about a fifth faster on a CPU, for every method alike
        made[:] = [model, make_optimizer(method, model, config)]
        return made[1]

    if full_validation:
        config.run.eval_every, config.run.eval_sequences = 0, None
    summary = train(config, builder)
    model, optimizer = made
    bases = [
        s["projector"].ortho_matrix for s in optimizer.state.values() if "projector" in s
    ]  # galore_torch hides them
    refresh = sum(svd_seconds) if method == "galore_torch" else summary["refresh_seconds"] or 0.0
    return {
        "method": method,
        "lr": config.optim.lr,
        "dense_lr": config.optim.dense_lr,
        "steps": config.run.steps,
        "seed": config.run.seed,
        "autocast": config.run.autocast,
        "valid_loss": summary["valid_loss"],
        "perplexity": summary["perplexity"],
        "valid_tokens": summary["valid_tokens"],
        "tokens": summary["tokens"],
        "seconds": summary["seconds"],
        "refresh_seconds": refresh,
        "optimizer_bytes": count_memory(model, optimizer).optimizer + sum(4 * b.numel() for b in bases),
        "corpus_sha256": summary["corpus"]["sha256"],
        "versions": summary["versions"],
    }


def run_once(
    key: str,
    method: str,
    lr: float,
    dense_lr: float,
    steps: int,
    files: list[str],
    valid: str,
    out: Path,
    autocast: bool,
) -> dict[str, Any]:
    """The result named `key`: from its file, or by a run in a process of its own."""
    file = RESULTS / f"{key.replace(' ', '_')}.json"
    folder = out / file.stem
    config = configure(method, lr, dense_lr, steps, files, valid, 0 if steps == SHORT else 1, folder, autocast)
    return once(file, folder, one_run, method, config, steps == LONG)


def search(method: str, files: list[str], out: Path, autocast: bool) -> tuple[float, float]:
    """The best (lr, dense_lr) by short runs: first lr, then dense_lr."""
    held_out, rest = files[-1], files[:-1]

    def short(lr: float, dense_lr: float) -> float:
        key = f"search {method} {lr} {dense_lr}"
        return run_once(key, method, lr, dense_lr, SHORT, rest, held_out, out, autocast)["valid_loss"]

    lr = min(LEARNING_RATES[method], key=lambda value: short(value, DENSE_LEARNING_RATES[0]))
    return lr, min(DENSE_LEARNING_RATES, key=lambda value: short(lr, value))


def main(
    train: str, valid: str, out: str = "runs/first_run", methods: list[str] | None = None, autocast: bool = True
) -> None:
    """Search, then the long runs.

    Args:
        train: glob of the training files; the last one is held out from the search
        valid: validation file, used by the long runs alone
        out: folder for the run folders
        methods: some of adamw, galore_subspace, galore_svd, galore_torch; none: all
        autocast: bfloat16 arithmetic in the model; false where the processor has none: there it is thirty times slower
    """
    files = training_files(train)
    for method in methods or SEARCHED:
        lr, dense_lr = search(SEARCHED[method], files, Path(out), autocast)
        run_once(f"final {method} {lr} {dense_lr}", method, lr, dense_lr, LONG, files, valid, Path(out), autocast)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
