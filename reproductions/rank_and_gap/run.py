"""Rank and T around the defaults: which losses, and what follows.

    python reproductions/rank_and_gap/run.py 'TEXT/train/*.txt' TEXT/valid.txt
    python reproductions/rank_and_gap/run.py 'TEXT/train/*.txt' TEXT/valid.txt --cells '[r16_T50, r16_T100]'

GaLore at every pair of `CELLS`, everything else that of benchmarks/quality. An update of rank r is about r^(1/2) long, so each
rank has a learning rate of its own, searched at T = 100 in short runs on a training file that is held out; T does not change the
length of an update, so a row shares it. Then the long runs with a fresh seed, judged once on `valid`.

Every run leaves a file in results/ beside this file; what is there is not run again, so an interrupted grid goes on where it
was, and several processes may share the cells. `table.py` makes the tables of it.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from subspan.training.config import TrainConfig
from subspan.training.trainer import train as train_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))
from grid import beside, once, training_files, walk
from methods import DENSE_RATE, GAP, SHORT, Method, compiled, configure

RESULTS = Path(__file__).with_name("results")

LONG = 1000  # steps of a long run: 1 M tokens, half of benchmarks/quality
NEVER = 10**9  # T of a basis that is kept
RANKS, GAPS = (16, 32, 64), (50, 100, 200)  # of 128 dimensions
EXTREMES = ((4, GAP), (128, GAP), (32, 10), (32, NEVER))
RATE = 0.01  # where the search of a rank starts


def name_of(rank: int, gap: int) -> str:
    return f"r{rank}_T{'never' if gap == NEVER else gap}"


CELLS = {name_of(rank, gap): (rank, gap) for rank, gap in (*((r, t) for r in RANKS for t in GAPS), *EXTREMES)}


def one_run(cell: str, config: TrainConfig) -> dict[str, Any]:
    """Train, and make a small result of it."""
    summary = train_model(config, compiled)
    kept = ("valid_loss", "tokens", "seconds", "refresh_seconds", "versions")
    return {
        "cell": cell,
        "lr": config.optim.lr,
        "steps": config.run.steps,
        "seed": config.run.seed,
        "state_bytes": summary["bytes"]["basis"] + summary["bytes"]["moments"],
        **{key: summary[key] for key in kept},
    }


def result_of(cell: str, config: TrainConfig) -> dict[str, Any]:
    file = RESULTS / f"{cell}_{config.optim.lr:g}_{config.run.steps}_{config.run.seed}.json"
    return once(file, config.run.out, one_run, cell, config)


def main(
    train: str, valid: str, out: str = "runs/rank_and_gap", cells: list[str] | None = None, search_only: bool = False
) -> None:
    """Search, then the long run, cell by cell.

    Args:
        train: glob of the training files; the last one is held out from the search
        valid: validation file, used by the long runs alone
        out: folder for the run folders
        cells: some of the cells, such as r32_T100; none: all
        search_only: no long runs yet
    """
    files = training_files(train)
    for cell in cells or CELLS:
        if cell not in CELLS:
            raise SystemExit(f"cells: {cell!r} is unknown, use some of {', '.join(CELLS)}")

        def start(cell: str, lr: float, steps: int, **run: Any) -> TrainConfig:
            rank, gap = CELLS[cell]
            method = Method(RATE, {"preset": "galore", "rank": rank, "update_proj_gap": gap})
            return configure(method, "llama-2m", lr, DENSE_RATE, steps, out=Path(out) / cell, **run)

        searched = name_of(CELLS[cell][0], GAP)
        short = functools.partial(start, searched, steps=SHORT, seed=0, files=files[:-1], valid=files[-1])

        def loss(lr: float, searched: str = searched, short: Any = short) -> float:
            return float(result_of(searched, short(lr=lr, eval_sequences=256))["valid_loss"])

        lr = walk(RATE, beside, loss)
        if not search_only:
            result_of(cell, start(cell, lr, LONG, seed=1, files=files, valid=valid, eval_sequences=1024))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
