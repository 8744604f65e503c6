"""Table 2 of arXiv 2403.03507 in small: pre-training two sizes of LLaMA with the paper's five methods and ours.

    python reproductions/table2_small/run.py 'TEXT/train/*.txt' TEXT/valid.txt
    python reproductions/table2_small/table.py

Methods, runs and results are those of benchmarks/quality, whose rows are the small size, with the rates below.
`llama-9m`, five times larger, for which a search would take days, has them, the next lower one for matrices, and with the better
of these the next lower one for the rest; the table shows the best of the three. What has a result is not run again.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))
from grid import beside, training_files
from methods import LONG, METHODS, configure, result_of

if TYPE_CHECKING:
    from subspan.training.config import TrainConfig

ROWS = {  # learning rate of matrices, and of embeddings, norms and head
    "adamw": (0.003, 0.1),
    "galore": (0.01, 0.1),
    "factorized": (0.003, 0.03),
    "lora": (0.003, 0.03),
    "relora": (0.003, 0.03),
    "subspan": (0.01, 0.3),
    "ldadam": (0.003, 0.1),
}
SIZES = {"llama-2m": LONG, "llama-9m": 1000}  # steps of 4 x 256 tokens


def main(
    train: str, valid: str, out: str = "runs/table2_small", methods: list[str] | None = None, seed: int = 1
) -> None:
    """A long run of each size and rate, method by method.

    Args:
        train: glob of the training files
        valid: validation file
        out: folder for the run folders
        methods: some of the rows; none: all
        seed: of the runs
    """
    files = training_files(train)
    for size, steps in SIZES.items():
        for name in methods or ROWS:
            start = functools.partial(configure, METHODS[name], size, out=Path(out) / name)
            lr, dense_lr = ROWS[name]

            def loss(
                pair: tuple[float, float],
                name: str = name,
                steps: int = steps,
                start: Callable[..., TrainConfig] = start,
            ) -> float:
                return float(
                    result_of(name, start(*pair, steps, seed, files, valid, eval_sequences=1024))["valid_loss"]
                )

            loss((lr, dense_lr))
            if steps != LONG:  # the larger model
                best, _ = min([(lr, dense_lr), (beside(lr)[0], dense_lr)], key=loss)
                loss((best, beside(dense_lr)[0]))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
