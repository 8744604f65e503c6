"""Pages for people: `subspan report` and `subspan plan --html`. One file each, which needs no network.

What is shown is gathered here, as numbers and tables; page.js draws it with plotly.js, template.html and style.css are the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from subspan.cluster import pretended
from subspan.diagnostics import FIELDS
from subspan.extras import require
from subspan.memory import GIB
from subspan.plan import CARD_RESERVE, CARDS, MemoryPlan, Planner, describe_cards, describe_optim, describe_run
from subspan.report.figures import COLUMNS
from subspan.report.runs import POINTS, Run, at, command_of, drift, durations, number, significant, smooth, thin
from subspan.report.tables import (
    MEASURED,
    REST,
    Table,
    curve_table,
    differences,
    drift_table,
    energy_table,
    facts_of,
    glance,
    loss_table,
    memory_table,
    method,
    pace_table,
    score_table,
    size_of,
    validation_table,
)
from subspan.training.config import TrainConfig
from subspan.training.finetune_config import FinetuneConfig

ENDINGS = (".html", ".htm")

CELLS = 60_000
"""Of all heat maps together, each counted once for all its fields."""

# Told apart without colours too: each run has a dash and a symbol of its own kind.
COLOURS = (
    "#3b7dd8",
    "#d9730d",
    "#2a9d5c",
    "#a05fd0",
    "#d64550",
    "#1793a5",
    "#a2703f",
    "#d4569b",
    "#7a828e",
    "#8f8f1e",
)
DASHES = ("solid", "9px,3px", "2px,2px", "9px,3px,2px,3px")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon", "hexagram")


@dataclass
class Figure:
    """What stands around a figure: above it, under it, or in its place where there is nothing to draw."""

    title: str
    text: str
    tables: Sequence[Table]
    empty: str = ""


def check_page(path: Path, argument: str = "out") -> None:
    """ValueError unless a page can be written to `path`; to be asked before the work is done."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{argument}={str(path)!r} has no known ending: use one of {', '.join(ENDINGS)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{argument}={str(path)!r}: there is no folder {path.parent}, make it first")
    for module in ("jinja2", "plotly.offline"):
        require(module, "report")


# ----------------------------------------------------------------------------------------------------------- the report


def report_page(runs: Sequence[Run]) -> str:
    """The page of `runs`: curves, memory, what refreshes found, settings."""
    bars = plan_runs(runs)
    watched = sum(bool(run.refreshes) for run in runs)
    drifts = [drift(run, CELLS // max(1, watched)) for run in runs]
    points = min(POINTS, max(200, 6 * POINTS // len(runs)))  # a browser has to draw all of them
    shown = [
        {**_curves(run, points), "drift": found, "energy": _energy(found)}
        for run, found in zip(runs, drifts, strict=True)
    ]
    scores = list(dict.fromkeys(name for run in shown for name in run["scores"]))
    data = {"runs": shown, "memory": bars, "scores": scores}

    def missing(text: str, *names: str) -> str:
        return "" if any(run[name]["y"] for run in shown for name in names) else text

    unwatched = "" if any(drifts) else "Nothing is known of refreshes: train with --run.diagnostics true."
    classifiers = any(isinstance(run.config, FinetuneConfig) for run in runs)
    figures = {
        "loss": Figure(
            "Loss" if scores else "Loss and perplexity",
            "Of each step, smoothed over the last 50th of the run; raw values are faint. Symbols are validation.",
            [loss_table(runs, not scores), validation_table(runs, not scores)],
            missing("No loss was logged.", "loss", "valid"),
        ),
        "scores": Figure("Scores", "Metrics of the validation rows, after each epoch.", [score_table(runs, scores)]),
        "lr": Figure(
            "Learning rate",
            "Of the first parameter group: the matrices'.",
            [curve_table(runs, "lr", "learning rate", ".2e")],
            missing("No learning rate was logged.", "lr"),
        ),
        "norm": Figure(
            "Gradient norm",
            "Of all parameters, before clipping; smoothed.",
            [curve_table(runs, "grad_norm", "gradient norm", ".3g")],
            missing("No gradient norm was logged.", "norm"),
        ),
        "memory": Figure(
            "Memory",
            "Planned: the tensors at the fullest moment of a step. Measured: the peak, with weights, gradients and optimizer "
            "state as they were counted; on a CPU the rest holds Python and its libraries, and the peak is the process's. "
            + ("Fine-tunings are not planned. " if classifiers else "")
            + _cards_in_words([bar["total"] for group in bars for bar in group["bars"]]),
            [memory_table(bars)],
            "" if any(group["bars"] for group in bars) else "Nothing was planned or measured.",
        ),
        "drift": Figure(
            "Subspace drift",
            "What refreshes found in each layer. An overlap near 1 is a subspace that rests, near rank / dimension one that "
            "was drawn anew.",
            [drift_table(runs, shown)],
            unwatched,
        ),
        "energy": Figure(
            "Captured energy",
            "Share of a gradient's energy that its basis holds, median of the matrices: the new basis with symbols, the one "
            "that it replaces faint.",
            [energy_table(runs, shown)],
            unwatched,
        ),
        "pace": Figure(
            "Time of a step",
            "Evaluations and checkpoints are not in it. Rings are steps with a refresh, of runs with diagnostics that do not "
            "spread refreshes over all steps.",
            [pace_table(runs)],
            missing("No times were logged.", "pace"),
        ),
    }
    if not scores:
        del figures["scores"]
    return _render(
        data,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        subtitle=_in_common(runs),
        runs=[_described(run) for run in runs],
        notices=[(i, run.name, notice) for i, run in enumerate(runs) for notice in run.notices],
        tiles=[(name, text) for name, text in facts_of(runs[0]) if text and name != "method"] if len(runs) == 1 else [],
        glance=glance(runs) if len(runs) > 1 else None,
        figures=figures,
        differences=differences(runs),
    )


def _curves(run: Run, points: int) -> dict[str, Any]:
    """The series that page.js draws, of at most so many points; those with symbols have fewer."""
    symbols = points // 10  # each is an element of the page
    refreshed = {row["step"] for row in run.refreshes}
    losses, norms, lrs = ([number(row, key) for row in run.steps] for key in ("loss", "grad_norm", "lr"))
    paces = durations(run)
    rings = [(row, pace) for row, pace in zip(run.steps, paces, strict=True) if row["step"] in refreshed]
    known = ("step", "tokens", "epoch", "valid_loss", "perplexity")
    scores = {name for row in run.evaluations for name in row if name not in known}

    def evaluated(name: str) -> dict[str, Any]:
        return _series(run, run.evaluations, [number(row, name) for row in run.evaluations], symbols)

    return {
        "name": run.name,
        "loss": _series(run, run.steps, losses, points, smooth(losses)),
        "valid": evaluated("valid_loss"),
        "lr": _series(run, run.steps, lrs, points),
        "norm": _series(run, run.steps, norms, points, smooth(norms)),
        "pace": _series(run, run.steps, paces, points, smooth(paces)),
        "refreshed": _series(run, [row for row, _ in rings], [pace for _, pace in rings], symbols),
        "scores": {name: evaluated(name) for name in sorted(scores)},
    }


def _series(
    run: Run,
    rows: Sequence[dict[str, Any]],
    values: Sequence[float | None],
    points: int,
    smoothed: Sequence[float | None] | None = None,
) -> dict[str, Any]:
    """Values of `rows` with their steps, tokens and seconds; nothing if there are no values."""
    places = [] if all(value is None for value in values) else thin(values, points)
    made = {**at(run, [rows[i]["step"] for i in places]), "y": [significant(values[i], 6) for i in places]}
    if smoothed is not None:
        made["smooth"] = [significant(smoothed[i], 6) for i in places]
    return made


def _energy(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Medians over the matrices."""
    if found is None:
        return None

    def medians(name: str) -> list[float | None]:
        if name not in found["fields"]:
            return [None] * len(found["step"])
        columns = zip(*found["fields"][name], strict=True)
        there = [[value for value in column if value is not None] for column in columns]
        return [median(values) if values else None for values in there]

    return {
        **{key: found[key] for key in ("step", "tokens", "seconds")},
        "captured": medians("captured"),
        "stale": medians("stale"),
    }


# --------------------------------------------------------------------------------------------------------------- memory


def plan_runs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The memory of each run, planned and measured, as bars; what cannot be planned is a notice of the run."""
    planners: dict[int | None, Planner] = {}
    groups = []
    for i, run in enumerate(runs):
        bars = []
        if isinstance(run.config, TrainConfig):
            try:
                from subspan.training.text import vocabulary  # which a page of finished runs can do without

                vocab_size = vocabulary(run.config)
                with pretended(run.config.parallel):
                    # One that has pretended to be of several processes ends with that.
                    planner = Planner(vocab_size) if run.config.parallel.count > 1 else planners.get(vocab_size)
                    planner = planner or planners.setdefault(vocab_size, Planner(vocab_size))
                    plan = planner.plan(run.config)
                bars.append(_bar("planned", {name: getattr(plan, name) for name in COLUMNS}))
            except Exception as error:  # a model that is gone or of another kind than the planner knows
                run.notices.append(f"Its memory cannot be planned: {' '.join(str(error).split())}.")
        elif isinstance(run.summary.get("plan"), dict):  # of a run in another loop, which has no config
            bars.append(_bar("planned", {name: number(run.summary["plan"], name) or 0 for name in COLUMNS}))
        peak = number(run.summary, "peak_memory_bytes") or run.last("peak_memory_bytes")
        if peak:
            sizes = run.summary.get("bytes")
            counted = {name: number(sizes, name) or 0 for name in ("weights", "gradients", "basis", "moments")}
            bars.append(_bar("measured", counted | {REST: max(0, peak - sum(counted.values()))}, peak))
        groups.append({"run": i, "name": run.name, "bars": bars})
    return groups


def _bar(label: str, parts: Mapping[str, float], total: float | None = None) -> dict[str, Any]:
    return {"label": label, "parts": dict(parts), "total": sum(parts.values()) if total is None else total}


def _cards_in_words(totals: Sequence[float]) -> str:
    most = max(totals, default=0)
    fits = min((size for size in CARDS if most <= size * GIB - CARD_RESERVE), default=None)
    least = (
        f"the least one that holds all of this has {fits} GB" if fits else f"the last, {max(CARDS)} GB, is too small"
    )
    return f"Cards are dashed lines; {least}."


# ------------------------------------------------------------------------------------------------------------- settings


def _in_common(runs: Sequence[Run]) -> str:
    """Model, parameters and device where all runs have the same ones, and say so."""
    configs = [run.config for run in runs if run.config]
    facts = [
        [config.model.name for config in configs],
        [f"{count:,.0f} parameters" for run in runs if (count := number(run.summary, "parameters"))],
        [method(config) for config in configs] if len(runs) == 1 else [],
        [str(device) for run in runs if (device := run.summary.get("device"))],
    ]
    return " \u00b7 ".join(values[0] for values in facts if len(values) == len(runs) and len({*values}) == 1)


def _described(run: Run) -> dict[str, Any]:
    """What the page says of a run's settings and machine."""
    corpus, versions = run.summary.get("corpus"), run.summary.get("versions")
    facts = [
        ("device", run.summary.get("device")),
        (
            "versions",
            ", ".join(f"{name} {value}" for name, value in versions.items()) if isinstance(versions, dict) else None,
        ),
        ("text", corpus.get("description") if isinstance(corpus, dict) else None),
        ("SHA-256 of the text", corpus.get("sha256") if isinstance(corpus, dict) else run.summary.get("sha256")),
    ]
    return {
        "name": run.name,
        "status": run.status,
        "method": method(run.config),
        "config": run.config_text,
        "command": command_of(run.config) if run.config else "",
        "facts": [(name, text) for name, text in facts if text],
    }


# ------------------------------------------------------------------------------------------------------------- the plan


def plan_page(plans: Mapping[str, MemoryPlan], config: TrainConfig) -> str:
    """The page of `subspan plan`: the first of `plans` is that of `config`, the others are what it is compared with."""
    plan = next(iter(plans.values()))
    bars = [
        {"run": None, "name": name, "bars": [_bar("", {column: getattr(plan, column) for column in COLUMNS})]}
        for name, plan in plans.items()
    ]
    table = memory_table(bars)
    table.groups = [(None, "", [[name, *row[1:]] for _, name, rows in table.groups for row in rows])]
    base = plan.weights + plan.optimizer
    phases = Table(["phase", "bytes at its fullest moment"])
    phases.groups = [(None, "", [[phase, size_of(base + found.total)] for phase, found in plan.phases.items()])]
    text = (
        "The tensors of one process at the fullest moment of a step. Python, its libraries and what the allocator keeps come "
        "on top, a few hundred MiB. AdamW, 8-bit Adam and LoRA hold their gradients. Cards are dashed lines."
    )
    run = describe_run(config)
    shape = f"{run['micro_batch']} x {run['seq_len']} tokens" + (
        f", {run['accumulation']} times a step" if run["accumulation"] > 1 else ""
    )
    checkpointing = ", activation checkpointing" if run["activation_checkpointing"] else ""
    facts = [
        f"{run['model']}, {plan.parameters:,} parameters",
        f"{run['dtype']}, {shape}{checkpointing}",
        describe_optim(config),
    ]
    return _render(
        {"runs": [], "memory": bars},
        title=f"Memory of {Path(config.model.name).name}",
        subtitle=" \u00b7 ".join(facts),
        runs=[],
        notices=[],
        tiles=[
            ("peak", f"{size_of(plan.peak)}, in {plan.peak_at}"),
            ("fits into", describe_cards(plan.cards())),
            ("weights", size_of(plan.weights)),
            ("optimizer state", size_of(plan.optimizer)),
        ],
        glance=None,
        figures={"memory": Figure("This run beside other methods", text, [table, phases])},
        differences=None,
        command=command_of(config),
    )


# ----------------------------------------------------------------------------------------------------------- the file


def _render(data: dict[str, Any], **context: Any) -> str:
    jinja2, offline = require("jinja2", "report"), require("plotly.offline", "report")
    here = Path(__file__).parent
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("template.html")
    data |= {
        "fields": FIELDS,
        "columns": MEASURED,
        "cards": {size: size * GIB for size in CARDS},
        "colours": COLOURS,
        "dashes": DASHES,
        "symbols": SYMBOLS,
    }
    # In a script of HTML nothing but "<" can end it.
    packed = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page: str = template.render(
        **{"command": "", **context},
        data=packed,
        colours=COLOURS,
        dashes=[dash.replace("px", "").replace("solid", "none") for dash in DASHES],
        fields=FIELDS,
        kinds=sorted({matrix["kind"] for run in data["runs"] if run["drift"] for matrix in run["drift"]["matrices"]}),
        watched=[(i, run["name"]) for i, run in enumerate(data["runs"]) if run["drift"]],
        scores=data.get("scores"),
        style=(here / "style.css").read_text(encoding="utf-8"),
        script=(here / "page.js").read_text(encoding="utf-8"),
        plotly=offline.get_plotlyjs(),
    )
    return page
