"""Write the tables of README.md, beside this file, from results/*.json: python reproductions/first_run/table.py"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LABELS = {
    "adamw": "full-rank AdamW (torch)",
    "galore_svd": "GaLore, exact SVD",
    "galore_subspace": "GaLore, subspace iteration",
    "galore_torch": "galore_torch 1.0",
}


def final_table(finals: list[dict[str, Any]]) -> str:
    """One row a long run; losses also relative to galore_torch."""
    reference = next((run for run in finals if run["method"] == "galore_torch"), None)
    lines = [
        "| method | lr, dense lr | validation loss | against galore_torch | perplexity | optimizer state "
        "| seconds in refreshes |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in finals:
        loss = run["valid_loss"]
        against = f"{loss / reference['valid_loss'] - 1:+.2%}" if reference else ""
        refreshes = "-" if run["method"] == "adamw" else f"{run['refresh_seconds']:.1f}"
        lines.append(
            f"| {LABELS[run['method']]} | {run['lr']:g}, {run['dense_lr']:g} | {loss:.4f} | {against} | "
            f"{run['perplexity']:.2f} | {run['optimizer_bytes'] / 2**20:.1f} MiB | {refreshes} |"
        )
    return "\n".join(lines)


def search_table(searches: list[dict[str, Any]]) -> str:
    lines = ["| method | lr | dense lr | arithmetic | loss on the held-out training file |", "|---|---|---|---|---|"]
    for run in searches:
        arithmetic = "bf16" if run.get("autocast", True) else "fp32"  # results of the first day do not say: bf16
        cells = (
            LABELS[run["method"]],
            f"{run['lr']:g}",
            f"{run['dense_lr']:g}",
            arithmetic,
            f"{run['valid_loss']:.4f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rates(runs: list[dict[str, Any]]) -> tuple[float, float]:
    """(lr, dense lr) of the best of some runs."""
    best = min(runs, key=lambda run: run["valid_loss"])
    return best["lr"], best["dense_lr"]


def main() -> None:
    runs = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    order = list(LABELS)
    runs.sort(key=lambda run: (order.index(run["method"]), run["lr"], run["dense_lr"]))
    longest = max(run["steps"] for run in runs)
    finals = [run for run in runs if run["steps"] == longest]
    searches = [run for run in runs if run["steps"] < longest]
    chosen = {name: rates([run for run in searches if run["method"] == name]) for name in ("adamw", "galore_subspace")}
    best = [run for run in finals if rates([run]) == chosen["adamw" if run["method"] == "adamw" else "galore_subspace"]]
    readme = HERE / "README.md"
    text = readme.read_text()
    for name, table in (
        ("final", final_table(best)),
        ("earlier", final_table([run for run in finals if run not in best])),
        ("search", search_table(searches)),
    ):
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{table}\n\g<2>", text, flags=re.DOTALL)
    readme.write_text(text)


if __name__ == "__main__":
    main()
