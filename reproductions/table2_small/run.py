"""Table 2 of arXiv 2403.03507 in small: pre-training two sizes of LLaMA with the paper's five methods and ours.

    python reproductions/table2_small/run.py 'TEXT/train/*.txt' TEXT/valid.txt
    python reproductions/table2_small/table.py

The grid is that of benchmarks/quality, and so are its results. Rates are searched with `llama-9m`; `llama-25m`, for which a
search would take days, takes them over. An interrupted run goes on where it was.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from subspan.training.config import TrainConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))
from grid import beside, training_files, walk
from methods import LONG as LONG
from methods import METHODS, configure, result_of, search

ROWS = ("adamw", "galore", "factorized", "lora", "relora", "subspan")
SIZES = {"llama-9m": 1000, "llama-25m": 500}  # steps of a long run: 1 M and 0.5 M tokens
SHORT = 400  # steps of a run of the search


def main(
    train: str,
    valid: str,
    out: str = "runs/table2_small",
    sizes: list[str] | None = None,
    methods: list[str] | None = None,
    seed: int = 1,
) -> None:
    """Search for the small model, then a long run of each size, method by method.

    Args:
        train: glob of the training files; the last one is held out from the search
        valid: validation file, used by the long runs alone
        out: folder for the run folders
        sizes: some of the sizes of the model; none: both
        methods: some of the rows; none: all
        seed: of the long runs
    """
    files = training_files(train)
    for size in sizes or SIZES:
        for name in methods or ROWS:
            start = functools.partial(configure, METHODS[name], out=Path(out) / name)
            lr, dense_lr = rates(name, files, out)
            result_of(name, start(size, lr, dense_lr, SIZES[size], seed, files, valid, eval_sequences=1024))


def rates(name: str, files: list[str], out: str) -> tuple[float, float]:
    """Best of `llama-9m`: AdamW walks in both rates; the others in that of matrices, with its rate for the rest."""

    def start(method: str, lr: float, dense_lr: float, steps: int) -> TrainConfig:
        where = (files[:-1], files[-1], Path(out) / method)
        return configure(METHODS[method], "llama-9m", lr, dense_lr, steps, 0, *where, eval_sequences=256)

    found = search("adamw", functools.partial(start, "adamw"), SHORT)
    if name == "adamw":
        return found

    def loss(lr: float) -> float:
        return float(result_of(name, start(name, lr, found[1], SHORT))["valid_loss"])

    return walk(METHODS[name].rate, beside, loss), found[1]


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
