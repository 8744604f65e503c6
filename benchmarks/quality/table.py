"""Write README.md's tables and the figures from the files in results/.

python benchmarks/quality/table.py
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from methods import LONG, METHODS, RESULTS, SHORT

HERE = Path(__file__).parent


def of(results: list[dict[str, Any]], method: str, steps: int) -> list[dict[str, Any]]:
    return [result for result in results if result["method"] == method and result["steps"] == steps]


def pairs(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The long runs of every method at every pair of rates, seeds together; the best first."""
    groups: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for name in METHODS:
        for run in of(results, name, LONG):
            groups.setdefault((name, run["lr"], run["dense_lr"]), []).append(run)
    return sorted(groups.values(), key=mean_loss)


def mean_loss(runs: list[dict[str, Any]]) -> float:
    return mean(run["valid_loss"] for run in runs)


def long_runs(results: list[dict[str, Any]]) -> str:
    lines = [
        "| method | lr, dense lr | seeds | validation loss | spread | perplexity | state, MiB | peak memory, MiB | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for runs in pairs(results):
        losses = [run["valid_loss"] for run in runs]
        spread = f"{stdev(losses):.4f}" if len(losses) > 1 else "-"
        rates = f"{runs[0]['lr']:g}, {runs[0]['dense_lr']:g}"
        numbers = [f"{min(run[key] for run in runs) / 2**20:.1f}" for key in ("state_bytes", "peak_memory_bytes")]
        lines.append(
            f"| {runs[0]['method']} | {rates} | {len(runs)} | {mean(losses):.4f} | {spread} | "
            f"{math.exp(mean(losses)):.2f} | {' | '.join(numbers)} | {mean(run['seconds'] for run in runs):.0f} |"
        )
    return "\n".join(lines)


def grids(results: list[dict[str, Any]]) -> str:
    """Every run of the search, the best first."""
    lines = ["| method | losses on the held-out training file, at lr, dense lr |", "|---|---|"]
    for name in METHODS:
        runs = sorted(of(results, name, SHORT), key=lambda run: run["valid_loss"])
        if runs:
            cells = "; ".join(f"{run['valid_loss']:.4f} at {run['lr']:g}, {run['dense_lr']:g}" for run in runs)
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def larger() -> str:
    """Every run of larger.py, the best first."""
    runs = [json.loads(file.read_text()) for file in (RESULTS / "llama-60m").glob("*.json")]
    lines = ["| method | lr, dense lr | validation loss | perplexity | state, MiB |", "|---|---|---|---|---|"]
    for run in sorted(runs, key=lambda run: run["valid_loss"]):
        lines.append(
            f"| {run['method']} | {run['lr']:g}, {run['dense_lr']:g} | {run['valid_loss']:.4f} | {run['perplexity']:.2f} | "
            f"{run['state_bytes'] / 2**20:.1f} |"
        )
    return "\n".join(lines)


def draw(results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, state) = plt.subplots(1, 2, figsize=(13, 5))
    drawn: set[str] = set()
    for runs in pairs(results):
        name = runs[0]["method"]
        if name in drawn:
            continue  # at other rates, which were worse
        drawn.add(name)
        points = runs[0]["loss"]
        means = [[mean(column) for column in zip(*points[i : i + 20], strict=True)] for i in range(0, len(points), 20)]
        curves.plot([tokens / 1e6 for tokens, _ in means], [loss for _, loss in means], linewidth=0.8, label=name)
        losses, size = [run["valid_loss"] for run in runs], runs[0]["state_bytes"] / 2**20
        spread = stdev(losses) if len(losses) > 1 else 0
        state.errorbar(size, mean(losses), yerr=spread, fmt="o", markersize=4)
        state.annotate(name, (size, mean(losses)), fontsize=7, xytext=(4, 3), textcoords="offset points")
    curves.set(xlabel="million tokens", ylabel="training loss, mean over 200 steps")
    curves.legend(fontsize=6)
    state.set(xlabel="optimizer state, MiB", ylabel="validation loss")
    figure.tight_layout()
    figure.savefig(HERE / "quality.png", dpi=120)


def main() -> None:
    results = [json.loads(file.read_text()) for file in sorted((RESULTS / "llama-2m").glob("*.json"))]
    readme = HERE / "README.md"
    text = readme.read_text()
    for name, table in (("final", long_runs(results)), ("larger", larger()), ("search", grids(results))):
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", f"\\1{table}\n\\2", text, flags=re.S)
    readme.write_text(text)
    if any(result["steps"] == LONG for result in results):
        draw(results)


if __name__ == "__main__":
    main()
