"""Rank and T around the defaults: which losses, at learning rates of their own, and what follows.

    python reproductions/rank_and_gap/run.py 'TEXT/train/*.txt' TEXT/valid.txt
    python reproductions/rank_and_gap/run.py 'TEXT/train/*.txt' TEXT/valid.txt --cells '[r16_T50, r16_T100]'

recipes/cpu_2m.yaml, GaLore at every pair of CELLS and full-rank AdamW beside it. An update of rank r is about r^(1/2) long, so
each cell has a learning rate of its own: three to begin with, and while the best is at an end of those tried, the next one of
LADDER. Judged on the last training file, which no run trains on; the best rate then runs with fresh seeds and is judged once on
`valid`.

Every run leaves results/KEY.json beside this file; what is there is not run again, so an interrupted grid goes on where it was,
and several processes may share the cells. `table.py` makes the tables of it.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from subspan.training.config import TrainConfig, load_config
from subspan.training.trainer import train

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from once import once

HERE = Path(__file__).parent
RESULTS = HERE / "results"
RECIPE = HERE.parents[1] / "recipes" / "cpu_2m.yaml"

NEVER = 10**9  # T of a basis that is kept
RANKS, GAPS = (16, 32, 64), (50, 100, 200)  # of 128 dimensions; the recipe has 32 and 100
EXTREMES = ((4, 100), (128, 100), (32, 10), (32, NEVER))
LADDER = (0.0001, 0.00025, 0.0005, 0.001, 0.003, 0.01, 0.03, 0.1)
FIRST, FIRST_FULL_RANK = (0.001, 0.003, 0.01), (0.00025, 0.0005, 0.001)
SEEDS = (1, 2)  # of the runs on `valid`; the search has 0
SECONDS = 150.0  # of a run of 300 steps on a core of its own, until there are results to go by


def name_of(rank: int, gap: int) -> str:
    return f"r{rank}_T{'never' if gap == NEVER else gap}"


PAIRS = {name_of(rank, gap): (rank, gap) for rank, gap in (*((r, t) for r in RANKS for t in GAPS), *EXTREMES)}
CELLS: dict[str, dict[str, Any]] = {
    **{name: {"rank": rank, "update_proj_gap": gap} for name, (rank, gap) in PAIRS.items()},
    "full_rank": {"preset": "adamw"},
}


def configure(
    cell: str, lr: float, steps: int, seed: int, files: list[str], valid: str, out: Path, dense_lr: float
) -> TrainConfig:
    config = load_config(RECIPE)
    changes: dict[str, dict[str, Any]] = {
        "data": {"files": files, "valid_files": valid},
        # With whole gradients held, every first basis comes from the gradient of step 1.
        "optim": {"lr": lr, "dense_lr": dense_lr, "gradients": "hold", **CELLS[cell]},
        "run": {
            "out": str(out),
            "steps": steps,
            "warmup_steps": steps // 10,
            "eval_every": 0,
            "eval_sequences": 512,
            "checkpoint_every": 0,
            "log_every": 100,
            "seed": seed,
            "export": False,
        },
    }
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    return dataclasses.replace(config, **sections)


def one_run(cell: str, config: TrainConfig) -> dict[str, Any]:
    """Train, and make a small result of it."""
    summary = train(config)
    kept = ("valid_loss", "tokens", "seconds", "refresh_seconds", "versions")
    return {
        "cell": cell,
        "lr": config.optim.lr,
        "dense_lr": config.optim.dense_lr,
        "steps": config.run.steps,
        "seed": config.run.seed,
        "state_bytes": summary["bytes"]["basis"] + summary["bytes"]["moments"],
        **{key: summary[key] for key in kept},
    }


def file_of(cell: str, lr: float, steps: int, seed: int) -> Path:
    return RESULTS / f"{cell}_{lr:g}_{steps}_{seed}.json"


def result_of(cell: str, config: TrainConfig) -> dict[str, Any]:
    """The result of a run: from its file, or by a run in a process of its own."""
    file = file_of(cell, config.optim.lr, config.run.steps, config.run.seed)
    return once(file, config.run.out, one_run, cell, config)


def search(first: tuple[float, ...], loss: Callable[[float], float]) -> float:
    """The best rate: of `first`, and of those further on while the best is the smallest or the largest that was tried."""
    losses = {lr: loss(lr) for lr in first}
    while True:
        best = min(losses, key=lambda lr: losses[lr])
        place = LADDER.index(best)
        neighbours = {LADDER[i] for i in (place - 1, place + 1) if 0 <= i < len(LADDER)} - losses.keys()
        if not neighbours:
            return best
        losses |= {lr: loss(lr) for lr in neighbours}


def remaining(cells: list[str], steps: int, seeds: list[int]) -> str:
    """Of the runs that are sure to come."""
    missing = 0
    for cell in cells:
        first = FIRST_FULL_RANK if cell == "full_rank" else FIRST
        missing += sum(not file_of(cell, lr, steps, 0).exists() for lr in first)
        missing += sum(not any(RESULTS.glob(f"{cell}_*_{steps}_{seed}.json")) for seed in seeds)
    known = [json.loads(file.read_text())["seconds"] for file in RESULTS.glob(f"*_{steps}_*.json")]
    seconds = statistics.median(known) + 15 if known else SECONDS * steps / 300 + 15
    hours = missing * seconds / 3600
    return f"{missing} runs of about {seconds:.0f} s, and more where a best rate is at an end: {hours:.1f} hours"


def main(
    train: str,
    valid: str,
    out: str = "runs/rank_and_gap",
    cells: list[str] | None = None,
    steps: int = 300,
    seeds: list[int] | None = None,
    dense_lr: float = 0.01,
    search_only: bool = False,
) -> None:
    """Search, then the runs on `valid`, cell by cell.

    Args:
        train: glob of the training files; no run trains on the last one, on which the search is judged
        valid: validation file, for the best rates alone
        out: folder for the run folders
        cells: some of the cells, such as r32_T100 or full_rank; none: all
        steps: of every run
        seeds: of the runs on `valid`; none: 1, 2
        dense_lr: peak learning rate of the parameters that are not projected, of every run
        search_only: no runs on `valid` yet
    """
    files = sorted(glob.glob(train))
    if len(files) < 2:
        raise SystemExit(f"train={train!r} matches {len(files)} files: at least two are needed, one is held out")
    chosen = cells or list(CELLS)
    for cell in chosen:
        if cell not in CELLS:
            raise SystemExit(f"cells: {cell!r} is unknown, use some of {', '.join(CELLS)}")
    fresh = [] if search_only else list(seeds or SEEDS)
    print(remaining(chosen, steps, fresh), flush=True)
    for cell in chosen:

        def start(lr: float, seed: int, judge: str, cell: str = cell) -> dict[str, Any]:
            config = configure(cell, lr, steps, seed, files[:-1], judge, Path(out) / cell, dense_lr)
            return result_of(cell, config)

        first = FIRST_FULL_RANK if cell == "full_rank" else FIRST
        best = search(first, lambda lr, start=start: start(lr, 0, files[-1])["valid_loss"])
        for seed in fresh:
            start(best, seed, valid)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
