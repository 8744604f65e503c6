"""Quality of optimizers at equal data, schedule and tokens: every method with learning rates of its own, several seeds.

    python benchmarks/quality/run.py 'TEXT/train/*.txt' TEXT/valid.txt
    python benchmarks/quality/run.py 'TEXT/train/*.txt' TEXT/valid.txt --methods '[adamw, galore, fira]'

1. A search for two rates, one of matrices and one of embeddings, head and norms, among 0.001, 0.003, 0.01 and so on: from where a
   method starts, to the best of the four neighbours, until none is better. Short runs, judged on the last training file, which
   they do not train on.
2. The long runs, on all training files, judged on `valid`: the first seed with that pair and with the second best of the search,
   because short runs choose rates that are too large, and the other seeds with the better of the two.

Every run leaves results/MODEL/KEY.json beside this file; what is there is not run again, so an interrupted grid goes on where
it was, and several processes may share the methods. `table.py` makes tables and figures of it.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import finite, training_files
from methods import LONG, METHODS, SEEDS, configure, result_of, search


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
    files = training_files(train)
    for name in methods or METHODS:
        if name not in METHODS:
            raise SystemExit(f"methods: {name!r} is unknown, use some of {', '.join(METHODS)}")
        folder = Path(out) / model / name.replace(" ", "_")
        start = functools.partial(configure, METHODS[name], model, out=folder)
        searched = METHODS[name].like or name
        short = functools.partial(configure, METHODS[searched], model, out=folder, seed=0, files=files[:-1])
        pairs = search(searched, functools.partial(short, valid=files[-1], eval_sequences=256))
        if search_only:
            continue

        def long_run(pair: tuple[float, float], seed: int, name: str = name, start: Any = start) -> float:
            return float(result_of(name, start(*pair, LONG, seed, files, valid, eval_sequences=1024))["valid_loss"])

        first, *others = seeds or SEEDS
        better = min(pairs, key=lambda pair: finite(long_run(pair, first)))
        for seed in others:
            long_run(better, seed)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
