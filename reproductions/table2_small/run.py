"""Table 2 of arXiv 2403.03507 in small: pre-training two sizes of LLaMA with the paper's five methods and ours.

    python reproductions/table2_small/run.py 'TEXT/train/*.txt' TEXT/valid.txt
    python reproductions/table2_small/table.py

The grid is that of benchmarks/quality, and so are its results. `llama-9m` has a search of its own for every method; `llama-25m`,
for which a search would take days, takes over the rates found there. An interrupted run goes on where it was.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))
from grid import training_files
from run import METHODS, configure, result_of, search

ROWS = ("adamw", "galore", "factorized", "lora", "relora", "subspan")
SHORT = 200  # steps of a run of the search
SIZES = {"llama-9m": 2000, "llama-25m": 1000}  # steps of a long run: 2 M and 1 M tokens


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
            short = functools.partial(start, "llama-9m", seed=0, files=files[:-1], valid=files[-1], eval_sequences=256)
            lr, dense_lr = search(name, short, SHORT)
            result_of(name, start(size, lr, dense_lr, SIZES[size], seed, files, valid, eval_sequences=1024))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
