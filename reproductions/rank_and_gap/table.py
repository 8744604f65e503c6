"""Write README.md's tables from the files in results/.

python reproductions/rank_and_gap/table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from run import CELLS, GAPS, PAIRS, RANKS, RESULTS, name_of

HERE = Path(__file__).parent


def load(steps: int) -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = {cell: [] for cell in CELLS}
    for file in sorted(RESULTS.glob(f"*_{steps}_*.json")):
        result = json.loads(file.read_text())
        results[result["cell"]].append(result)
    return {cell: runs for cell, runs in results.items() if runs}


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return min((run for run in runs if run["seed"] == 0), key=lambda run: run["valid_loss"])


def fresh(runs: list[dict[str, Any]]) -> list[float]:
    return [run["valid_loss"] for run in runs if run["seed"] > 0 and run["lr"] == best(runs)["lr"]]


def grid(results: dict[str, list[dict[str, Any]]]) -> str:
    """Mean validation loss at the best rate, and that rate."""
    lines = [f"| rank | {' | '.join(f'T = {gap}' for gap in GAPS)} |", "|" + "---|" * (len(GAPS) + 1)]
    for rank in RANKS:
        cells = [results.get(name_of(rank, gap), []) for gap in GAPS]
        texts = [f"{mean(fresh(runs)):.4f} (lr {best(runs)['lr']:g})" if runs and fresh(runs) else "" for runs in cells]
        lines.append(f"| {rank} | {' | '.join(texts)} |")
    return "\n".join(lines)


def all_cells(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| cell | best lr | seeds | validation loss | spread | against r = 32, T = 100 | state, MiB | seconds in refreshes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    judged = {cell: runs for cell, runs in results.items() if fresh(runs)}
    base = mean(fresh(judged["r32_T100"])) if "r32_T100" in judged else None
    for cell, runs in sorted(judged.items(), key=lambda item: mean(fresh(item[1]))):
        losses, run = fresh(runs), best(runs)
        spread = f"{stdev(losses):.4f}" if len(losses) > 1 else "-"
        change = f"{mean(losses) / base - 1:+.2%}" if base else ""
        refreshes = f"{run['refresh_seconds']:.1f}" if cell in PAIRS else "-"
        lines.append(
            f"| {cell} | {run['lr']:g} | {len(losses)} | {mean(losses):.4f} | {spread} | {change} "
            f"| {run['state_bytes'] / 2**20:.2f} | {refreshes} |"
        )
    return "\n".join(lines)


def searches(results: dict[str, list[dict[str, Any]]]) -> str:
    """Losses on the held-out training file, by rate; the best in bold."""
    rates = sorted({run["lr"] for runs in results.values() for run in runs})
    lines = [f"| cell | {' | '.join(f'lr {rate:g}' for rate in rates)} |", "|" + "---|" * (len(rates) + 1)]
    for cell, runs in results.items():
        losses = {run["lr"]: run["valid_loss"] for run in runs if run["seed"] == 0}
        least = min(losses.values())
        texts = [
            "" if rate not in losses else f"**{least:.4f}**" if losses[rate] == least else f"{losses[rate]:.4f}"
            for rate in rates
        ]
        lines.append(f"| {cell} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main(steps: int = 300) -> None:
    """Write the tables of runs of that length.

    Args:
        steps: of the runs
    """
    results = load(steps)
    readme = HERE / "README.md"
    text = readme.read_text()
    for name, table in (("grid", grid(results)), ("cells", all_cells(results)), ("search", searches(results))):
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
    readme.write_text(text)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
