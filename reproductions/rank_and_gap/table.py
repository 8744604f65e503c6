"""Write README.md's tables from the files in results/.

python reproductions/rank_and_gap/table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from run import CELLS, GAPS, LONG, RANKS, RESULTS, SHORT, name_of

HERE = Path(__file__).parent


def grid(results: list[dict[str, Any]]) -> str:
    """Validation loss of rank by T."""
    loss = {run["cell"]: f"{run['valid_loss']:.4f}" for run in results if run["steps"] == LONG}
    lines = [f"| rank | {' | '.join(f'T = {gap}' for gap in GAPS)} |", "|" + "---|" * (len(GAPS) + 1)]
    for rank in RANKS:
        lines.append(f"| {rank} | {' | '.join(loss.get(name_of(rank, gap), '') for gap in GAPS)} |")
    return "\n".join(lines)


def cells(results: list[dict[str, Any]]) -> str:
    lines = [
        "| cell | lr | validation loss | against r = 32, T = 100 | state, MiB | seconds in refreshes |",
        "|---|---|---|---|---|---|",
    ]
    runs = {run["cell"]: run for run in results if run["steps"] == LONG}
    base = runs.get("r32_T100")
    for cell, run in sorted(runs.items(), key=lambda item: float(item[1]["valid_loss"])):
        change = f"{run['valid_loss'] - base['valid_loss']:+.4f}" if base else ""
        lines.append(
            f"| {cell} | {run['lr']:g} | {run['valid_loss']:.4f} | {change} | {run['state_bytes'] / 2**20:.2f} "
            f"| {run['refresh_seconds']:.1f} |"
        )
    return "\n".join(lines)


def searches(results: list[dict[str, Any]]) -> str:
    """Losses on the held-out training file, by rate; the best in bold."""
    runs = [run for run in results if run["steps"] == SHORT]
    rates = sorted({run["lr"] for run in runs})
    lines = [f"| rank | {' | '.join(f'lr {rate:g}' for rate in rates)} |", "|" + "---|" * (len(rates) + 1)]
    for cell, (rank, _) in sorted(CELLS.items(), key=lambda item: item[1]):
        losses = {run["lr"]: run["valid_loss"] for run in runs if run["cell"] == cell}
        texts = [f"{losses[rate]:.4f}" if rate in losses else "" for rate in rates]
        texts = [f"**{text}**" if text and float(text) == round(min(losses.values()), 4) else text for text in texts]
        if losses:
            lines.append(f"| {rank} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    results = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    readme = HERE / "README.md"
    text = readme.read_text()
    for name, table in (("grid", grid(results)), ("cells", cells(results)), ("search", searches(results))):
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
    readme.write_text(text)


if __name__ == "__main__":
    main()
