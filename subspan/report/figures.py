"""Figures for papers: of plans, and of what refreshes found in a run; matplotlib draws them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from subspan.diagnostics import FIELDS
from subspan.extras import require
from subspan.memory import GIB
from subspan.plan import CARDS, MemoryPlan, Planner, describe_run, with_preset
from subspan.training.config import TrainConfig, without_baseline

FORMATS = (".png", ".svg", ".pdf")

COLUMNS = {
    "weights": "#4c72b0",
    "gradients": "#dd8452",
    "basis": "#9ecae1",
    "moments": "#55a868",
    "activations": "#8172b3",
    "temporaries": "#b0b0b0",
}
"""Column of a plan -> its colour."""


def check_figure(path: Path) -> None:
    """ValueError unless a figure can be written to `path`; to be asked before the work is done."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"figure={str(path)!r} has no known ending: use one of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ValueError(f"figure={str(path)!r}: there is no folder {path.parent}, make it first")
    require("matplotlib", "plan")


def compare_methods(config: TrainConfig, planner: Planner) -> dict[str, MemoryPlan]:
    """Name of a method -> its plan, all else as in `config`: the bars of the paper's Figure 1 (arXiv 2403.03507), and LoRA.

    Moments that are not in 8 bits have the weights' dtype, as in that figure. AdamW, 8-bit Adam and LoRA hold their gradients, as
    they do everywhere; the three GaLores treat them as `config.optim.gradients` says.
    """
    state = config.optim.state_dtype or config.model.dtype
    config = replace(config, model=without_baseline(config.model))
    methods: dict[str, dict[str, Any]] = {
        "AdamW": {"preset": "adamw", "state_dtype": state, "gradients": "hold"},
        "8-bit Adam": {"preset": "adamw8bit", "state_dtype": None, "gradients": "hold"},
        "LoRA": {"preset": "adamw", "state_dtype": state, "gradients": "hold"},
        "GaLore": {"preset": "galore", "state_dtype": state},
        "8-bit GaLore": {"preset": "galore8bit", "state_dtype": None},
        "Q-GaLore": {"preset": "qgalore", "state_dtype": None},
    }
    plans = {}
    for name, changes in methods.items():
        optim = with_preset(config.optim, **changes)
        plans[name] = planner.plan(replace(config, optim=optim), lora=name == "LoRA")
    return plans


def draw_plans(plans: Mapping[str, MemoryPlan], path: Path, config: TrainConfig) -> None:
    """Write stacked bars, one for each plan, with the sizes of common cards as lines, to a .png, .svg or .pdf file.

    config: what the plans have in common, for the title.
    """
    check_figure(path)
    figure = require("matplotlib.figure", "plan").Figure(figsize=(1.4 * len(plans) + 2.6, 5.2), layout="constrained")
    axes = figure.add_subplot()
    names = list(plans)
    bottom = [0.0] * len(names)
    for column, colour in COLUMNS.items():
        sizes = [getattr(plan, column) / GIB for plan in plans.values()]
        axes.bar(names, sizes, 0.62, bottom, color=colour, label=column)
        bottom = [below + size for below, size in zip(bottom, sizes, strict=True)]
    tallest = max(bottom)
    for place, height in enumerate(bottom):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # over the lines of cards
        axes.text(
            place, height + 0.012 * tallest, f"{height:.1f}", ha="center", va="bottom", fontweight="bold", bbox=box
        )
    right = len(names) - 0.5
    for size in CARDS:
        if size <= 1.15 * tallest:
            axes.axhline(size, color="0.35", linewidth=0.8, linestyle="--", zorder=0)
            axes.text(right, size, f" {size} GB", va="center", ha="left", color="0.35", fontsize=8)
    axes.set_xlim(-0.5, right)
    axes.set_ylim(0, 1.18 * tallest)
    axes.set_ylabel("planned peak memory, GiB")
    run = describe_run(config)
    checkpointing = ", activation checkpointing" if run["activation_checkpointing"] else ""
    axes.set_title(
        f"{run['model']}, {run['dtype']}, {run['micro_batch']} x {run['seq_len']} tokens{checkpointing}\n"
        f"rank {config.optim.rank}; gradients: {run['gradients']} for GaLore, hold for the others",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, ncols=2, loc="upper right", fontsize=8)
    figure.savefig(path, dpi=160)


def draw_refreshes(run: Path, path: Path) -> None:
    """Write what the refreshes of a run folder found to a .png, .svg or .pdf file: every field over the steps, the median of
    the matrices of each kind (q_proj, down_proj, ...).

    Raises ValueError: the run has no diagnostics.
    """
    check_figure(path)
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{run} is no run folder, it has no metrics.jsonl: name the run.out of a training run")
    found: list[Any] = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):  # the last line of a run that was killed
            row = json.loads(line)
            found += [row] if isinstance(row, dict) and isinstance(row.get("refreshes"), list) else []
    if not found:
        raise ValueError(f"{metrics} says nothing of refreshes: train with --run.diagnostics true")
    series: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in found:
        for row in line["refreshes"]:
            kind = row["name"].removesuffix(".weight").rpartition(".")[2]
            for field in FIELDS:
                if row.get(field) is not None:
                    series[field][kind][line["step"]].append(row[field])
    figure = require("matplotlib.figure", "plan").Figure(figsize=(16, 6), layout="constrained")
    axes = figure.subplots(2, 5).flat
    for ax, (field, what) in zip(axes, FIELDS.items(), strict=True):
        for kind, steps in series[field].items():
            ax.plot(list(steps), [median(values) for values in steps.values()], ".-", markersize=3, label=kind)
        ax.set_title(what, fontsize=8)
        ax.set_xlabel("step", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)
