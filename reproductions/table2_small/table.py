"""Write README.md's table from the results of run.py, which lie in benchmarks/quality/results.

python reproductions/table2_small/table.py
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from run import ROWS, SIZES

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "quality" / "results"
PAPER = {"adamw": "25.08", "galore": "25.36", "factorized": "45.51", "lora": "33.92", "relora": "29.37"}
"""Perplexities of the paper's 130M."""


def main() -> None:
    lines = [
        "| method | lr, dense lr | "
        + " | ".join(f"{size} loss | perplexity | state, MiB" for size in SIZES)
        + " | paper, 130M |",
        "|---|---|" + "---|---|---|" * len(SIZES) + "---|",
    ]
    for name in ROWS:
        rates, cells = "-", []
        for size, steps in SIZES.items():
            found = [json.loads(file.read_text()) for file in sorted((RESULTS / size).glob(f"{name}_*_{steps}_*.json"))]
            if not found:
                cells.append("not run | - | -")
                continue
            result = found[0]
            rates = f"{result['lr']:g}, {result['dense_lr']:g}"
            loss, state = result["valid_loss"], result["state_bytes"] / 2**20
            cells.append(f"{loss:.4f} | {math.exp(loss):.2f} | {state:.1f}")
        lines.append(f"| {name} | {rates} | {' | '.join(cells)} | {PAPER.get(name, '-')} |")
    readme = HERE / "README.md"
    table = "\n".join(lines)
    readme.write_text(re.sub(r"(<!-- rows -->\n).*?(<!-- end -->)", f"\\1{table}\n\\2", readme.read_text(), flags=re.S))


if __name__ == "__main__":
    main()
