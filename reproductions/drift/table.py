"""Write README.md's tables and the figure from the files in results/.

python reproductions/drift/table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

from run import KINDS, RESULTS, ROWS

HERE = Path(__file__).parent
STARTS = {100: "early", 500: "late"}  # probes from which on lags are counted


def load(steps: int = 750) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any] | None]:
    """The results of every row, one a seed or learning rate, and the probes'."""
    rows: dict[str, list[dict[str, Any]]] = {}
    probes = None
    for file in sorted(RESULTS.glob(f"*_{steps}_*.json")):
        result = json.loads(file.read_text())
        if "row" in result:
            rows.setdefault(result["row"], []).append(result)
        else:
            probes = result
    return rows, probes


def losses(rows: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| bases | lr, dense lr | seed | validation loss | against T = 100 | seconds in refreshes |",
        "|---|---|---|---|---|---|",
    ]
    base = {_setting(run): run["valid_loss"] for run in rows.get("T100", [])}
    for name in ROWS:
        for run in rows.get(name, []):
            setting = _setting(run)
            more = f"{run['valid_loss'] / base[setting] - 1:+.2%}" if setting in base else ""
            cells = f"{run['lr']:g}, {run['dense_lr']:g} | {run['seed']} | {run['valid_loss']:.4f} | {more}"
            lines.append(f"| {name} | {cells} | {run['refresh_seconds']:.1f} |")
    return "\n".join(lines)


def _setting(run: dict[str, Any]) -> tuple[float, float, int]:
    return run["lr"], run["dense_lr"], run["seed"]


def by_gap(rows: dict[str, list[dict[str, Any]]]) -> str:
    """What refreshes find, later than step 200: medians over refreshes and kinds."""
    lines = [
        "| T | refreshes | median angle | overlap | energy in the old basis | in the new one | old / new |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        for run in rows.get(name, [])[:1]:
            some = [row for row in run["refreshes"] if row["step"] > 200]
            if some:
                count = len({row["step"] for row in some})
                cells = (median(row[key] for row in some) for key in ("median_angle", "overlap", "stale", "captured"))
                a, o, s, c = cells
                lines.append(f"| {name} | {count} | {a:.0f} | {o:.3f} | {s:.3f} | {c:.3f} | {s / c:.2f} |")
    return "\n".join(lines)


def noise(probes: dict[str, Any]) -> str:
    """Angle and energy by the age of a basis; at age 0 all is sampling noise."""
    lines = [
        "| from step | age | angle, bases of 1 batch | of 8 batches | overlap, 1 batch | 8 batches "
        "| energy of a new gradient: basis of 1 batch | of 8 batches | its own | random |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = ("overlap_batch", "overlap_half", "energy_batch", "energy_half", "ceiling", "energy_random")
    for start, name in STARTS.items():
        for end in sorted({row["to"] for row in probes["rows"] if row["from"] == start}):
            some = [row for row in probes["rows"] if (row["from"], row["to"]) == (start, end)]
            angles = " | ".join(f"{median(row[key] for row in some):.0f}" for key in ("angle_batch", "angle_half"))
            rest = " | ".join(f"{median(row[key] for row in some):.3f}" for key in keys)
            lines.append(f"| {start} ({name}) | {end - start} | {angles} | {rest} |")
    return "\n".join(lines)


def by_kind(probes: dict[str, Any]) -> str:
    """Noise and drift of each kind of matrix: age 0 and age 100, medians over the starts."""
    lines = [
        "| matrices | angle at age 0, 1 batch | 8 batches | at age 100, 1 batch | 8 batches "
        "| energy at age 0, 1 batch | at age 100 | stable rank |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        cells: dict[int, list[dict[str, Any]]] = {0: [], 100: []}
        for row in probes["rows"]:
            if row["kind"] == kind and row["from"] in STARTS and row["to"] - row["from"] in cells:
                cells[row["to"] - row["from"]].append(row)
        if not all(cells.values()):
            continue
        values = [
            f"{median(row[key] for row in cells[age]):.0f}" for age in cells for key in ("angle_batch", "angle_half")
        ]
        values += [f"{median(row['energy_batch'] for row in cells[age]):.3f}" for age in cells]
        values.append(f"{median(row['stable_rank'] for row in cells[0]):.1f}")
        lines.append(f"| {kind} | {' | '.join(values)} |")
    return "\n".join(lines)


def stable_ranks(run: dict[str, Any]) -> str:
    steps = sorted({row["step"] for row in run["refreshes"]})
    lines = [f"| matrices | {' | '.join(f'step {step}' for step in steps)} |", "|" + "---|" * (len(steps) + 1)]
    for kind in KINDS:
        values = {row["step"]: row["stable_rank"] for row in run["refreshes"] if row["kind"] == kind}
        lines.append(f"| {kind} | {' | '.join(f'{values[step]:.1f}' for step in steps)} |")
    return "\n".join(lines)


def draw(rows: dict[str, list[dict[str, Any]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    run = next(rows[name][0] for name in ("T25", "T50", "T100") if name in rows)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    for axis, key, title in zip(
        axes,
        ("median_angle", "stale", "stable_rank"),
        (
            "median angle of successive bases, degrees",
            "energy in the old basis",
            "stable rank of the gradient",
        ),
        strict=True,
    ):
        for kind in KINDS:
            some = [
                row for row in run["refreshes"] if row["kind"] == kind and (key == "stable_rank" or row["step"] > 1)
            ]
            axis.plot([row["step"] for row in some], [row[key] for row in some], label=kind, linewidth=1)
        axis.set(xlabel="step", title=f"{title} ({run['row']})")
    axes[2].set(yscale="log")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(HERE / "drift.png", dpi=80)


def main() -> None:
    rows, probes = load()
    tables = {"loss": losses(rows), "gap": by_gap(rows)}
    if probes:
        tables |= {"noise": noise(probes), "kinds": by_kind(probes)}
    if "T100" in rows:
        tables["stable rank"] = stable_ranks(rows["T100"][0])
    readme = HERE / "README.md"
    text = readme.read_text()
    for name, table in tables.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
    readme.write_text(text)
    if {"T25", "T50", "T100"} & rows.keys():
        draw(rows)


if __name__ == "__main__":
    main()
