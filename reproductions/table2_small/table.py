"""Write README.md's table from the results of run.py, which lie in benchmarks/quality/results.

python reproductions/table2_small/table.py
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import mean
from typing import Any

from run import ROWS, SIZES

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "quality" / "results"
PAPER = {"adamw": "25.08", "galore": "25.36", "factorized": "45.51", "lora": "33.92", "relora": "29.37"}
"""Perplexities of the paper's 130M."""


def best(name: str, size: str, steps: int) -> list[dict[str, Any]]:
    """The long runs of a method at the pair of rates with the lowest loss, its seeds; one seed does not beat three."""
    pairs: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for file in sorted((RESULTS / size).glob(f"{name}_*_{steps}_*.json")):
        result = json.loads(file.read_text())
        if result["method"] == name:
            pairs.setdefault((result["lr"], result["dense_lr"]), []).append(result)
    return min(pairs.values(), key=lambda runs: (-len(runs), mean(run["valid_loss"] for run in runs)), default=[])


def main() -> None:
    lines = [
        "| method | "
        + " | ".join(f"{size}: lr, dense lr | seeds | loss | perplexity | state, MiB" for size in SIZES)
        + " | paper, 130M |",
        "|---|" + "---|---|---|---|---|" * len(SIZES) + "---|",
    ]
    for name in ROWS:
        cells = []
        for size, steps in SIZES.items():
            runs = best(name, size, steps)
            if not runs:
                cells.append("- | - | not run | - | -")
                continue
            loss, state = mean(run["valid_loss"] for run in runs), runs[0]["state_bytes"] / 2**20
            rates = f"{runs[0]['lr']:g}, {runs[0]['dense_lr']:g}"
            cells.append(f"{rates} | {len(runs)} | {loss:.4f} | {math.exp(loss):.2f} | {state:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} | {PAPER.get(name, '-')} |")
    readme = HERE / "README.md"
    table = "\n".join(lines)
    readme.write_text(re.sub(r"(<!-- rows -->\n).*?(<!-- end -->)", f"\\1{table}\n\\2", readme.read_text(), flags=re.S))


if __name__ == "__main__":
    main()
