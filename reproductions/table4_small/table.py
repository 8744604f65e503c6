"""Write README.md's tables from the files in results/.

python reproductions/table4_small/table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from run import METHODS, PARTS, RESULTS, SEARCH_SEED

HERE = Path(__file__).parent
NAMES = {"cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "sst2": "SST-2", "banking77": "Banking77"}


def of(results: list[dict[str, Any]], method: str, task: str, search: bool) -> list[dict[str, Any]]:
    """Runs of the search; or those that followed, at the rates that it found."""
    own = [result for result in results if result["task"] == task]
    if search:
        return [r for r in own if r["method"] == method and r["seed"] == SEARCH_SEED]
    rate = METHODS[method].rate
    tried = of(results, rate if isinstance(rate, str) else method, task, True)
    found = [
        rates(r) for r in tried if score(r) == max(map(score, tried))
    ]  # more than one on a tie; runs are of one of them
    return [r for r in own if r["method"] == method and r["seed"] != SEARCH_SEED and rates(r) in found]


def rates(result: dict[str, Any]) -> tuple[float, float]:
    """Of matrices and of the head."""
    return result["lr"], result["optim"]["head_lr"]


def score(result: dict[str, Any]) -> float:
    return 100 * float(result["last"][result["metrics"][0]])


def quality(results: list[dict[str, Any]], which: str) -> str:
    """Mean and spread of the metric that decides, x 100; the mean over tasks of a row that has all of them."""
    lines = [
        f"| method | {' | '.join(NAMES.values())} | mean | basis and moments, MiB | gradients, MiB |",
        f"|---|{'---|' * (len(NAMES) + 3)}",
    ]
    for name, method in METHODS.items():
        cells, means = [], []
        rows = [result for task in PARTS for result in of(results, name, task, False)]
        for task in PARTS:
            runs = of(results, name, task, False)
            values = [100 * run[which][run["metrics"][0]] for run in runs]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}" if values else "-")
            means += [mean(values)] if values else []
        if rows:
            sizes = [row["bytes"] for row in rows]  # a head has rows for the classes, a refresh other matrices at once
            most = (max(row["basis"] + row["moments"] for row in sizes), max(row["gradients"] for row in sizes))
            numbers = [f"{size / 2**20:.1f}" for size in most]
            average = f"{mean(means):.1f}" if len(means) == len(PARTS) else "-"
            lines.append(f"| {method.title} | {' | '.join(cells)} | {average} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def search(results: list[dict[str, Any]]) -> str:
    """Every run of the search, the best rates in bold."""
    lines = ["| task | method | lr, that of the head: metric on held-out training rows |", "|---|---|---|"]
    for task, title in NAMES.items():
        for name, method in METHODS.items():
            runs = sorted(of(results, name, task, True), key=rates)
            if runs:
                best = max(runs, key=score)
                shown = (f"**{told(run)}**" if run is best else told(run) for run in runs)
                lines.append(f"| {title} | {method.title} | {'; '.join(shown)} |")
    return "\n".join(lines)


def told(run: dict[str, Any]) -> str:
    lr, head = rates(run)
    return f"{lr:g}, {head:g}: {score(run):.1f}"


def main() -> None:
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    tables = {"last": quality(results, "last"), "best": quality(results, "best"), "search": search(results)}
    for name, table in tables.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", f"\\1{table}\n\\2", text, flags=re.S)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
