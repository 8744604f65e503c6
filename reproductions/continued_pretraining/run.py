"""Continued pre-training of SmolLM2-135M on books: validation loss against memory.

    python reproductions/continued_pretraining/run.py FOLDER 'TEXT/train/*.txt' TEXT/valid.txt
    python reproductions/continued_pretraining/table.py

FOLDER is what prepare.py made. Every method searches its learning rate in short runs, judged on the last training file, which
they do not train on: the best of a rate and its two neighbours in 1, 3, 10, ..., and onwards while it gets better. That of
embeddings and norms is AdamW's in every row that trains them. Then the long run. Every run leaves results/KEY.json; what is
there is not run again.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from subspan.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from subspan.training.trainer import train

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from grid import beside, once, training_files, walk

RESULTS = Path(__file__).with_name("results")

BATCH = 4  # sequences of 256 tokens a step, in one pass: activations are the same in every row
SHORT, LONG = 20, 80  # steps
RANK = 144  # a quarter of the hidden size

METHODS: dict[str, tuple[float, dict[str, Any], dict[str, Any]]] = {  # where the search starts, optim, model
    "adamw": (1e-4, {"preset": "adamw"}, {}),
    "lora": (1e-3, {"preset": "adamw", "rank": 16}, {"baseline": "lora", "train_rest": False}),
    "galore": (3e-4, {"preset": "galore", "gradients": "project"}, {}),
    "subspan": (3e-4, {"preset": "subspan", "gradients": "update"}, {}),
}


def configure(
    name: str,
    lr: float,
    steps: int,
    seed: int,
    folder: str,
    files: list[str],
    valid: str,
    out: str,
    dense_lr: float | None = None,
) -> TrainConfig:
    _, optim, model = METHODS[name]
    return TrainConfig(
        model=ModelConfig(name=folder, pretrained=True, **model),
        data=DataConfig(files=files, valid_files=valid),
        optim=OptimConfig(**{"lr": lr, "dense_lr": dense_lr, "rank": RANK, "update_proj_gap": 20, **optim}),
        run=RunConfig(
            out=f"{out}/{name}",
            steps=steps,
            warmup_steps=steps // 10,
            batch_size=BATCH,
            eval_every=0,
            eval_sequences=64 if steps == SHORT else 256,
            checkpoint_every=0,
            log_every=5,
            seed=seed,
            export=False,
        ),
    )


def one_run(name: str, config: TrainConfig) -> dict[str, Any]:
    summary = train(config)
    kept = ("valid_loss", "perplexity", "tokens", "seconds", "bytes", "peak_memory_bytes", "device", "versions")
    about = {"method": name, "lr": config.optim.lr, "dense_lr": config.optim.dense_lr, "steps": config.run.steps}
    return {**about, **{key: summary[key] for key in kept}}


def result_of(name: str, config: TrainConfig) -> dict[str, Any]:
    """The result of a run: from its file, or by a run in a process of its own."""
    file = RESULTS / f"{name}_{config.optim.lr:g}_{config.run.steps}_{config.run.seed}.json"
    return once(file, config.run.out, one_run, name, config)


def searched(name: str, start: Callable[..., TrainConfig], files: list[str]) -> float:
    """The learning rate that is better than its two neighbours."""

    def loss(lr: float) -> float:
        config = start(lr, SHORT, 0, files=files[:-1], valid=files[-1])
        return float(result_of(name, config)["valid_loss"])

    return walk(METHODS[name][0], beside, loss)


def main(
    folder: str, train: str, valid: str, out: str = "runs/continued_pretraining", methods: list[str] | None = None
) -> None:
    """Search, then the long run, method by method.

    Args:
        folder: the model that prepare.py has written
        train: glob of the training files; the last one is held out from the search
        valid: validation file, used by the long runs alone
        out: folder for the run folders
        methods: some of the methods; none: all
    """
    files = training_files(train)
    rest = None
    for name in methods or METHODS:
        start = functools.partial(configure, name, folder=folder, out=out)
        if name in ("galore", "subspan"):
            rest = rest or searched("adamw", functools.partial(configure, "adamw", folder=folder, out=out), files)
            start = functools.partial(start, dense_lr=rest)
        lr = searched(name, start, files)
        result_of(name, start(lr, LONG, 1, files=files, valid=valid))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
