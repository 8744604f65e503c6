"""Pages for people: `subspan report` and `subspan plan --html`. One file each, which needs no network.

What is shown is gathered here, as numbers and tables; page.js draws it with plotly.js, template.html and style.css are the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from subspan.cluster import pretended
from subspan.diagnostics import FIELDS
from subspan.extras import require
from subspan.memory import GIB
from subspan.optim.presets import FULL_RANK
from subspan.plan import CARD_RESERVE, CARDS, MemoryPlan, Planner, describe_cards, describe_optim, describe_run
from subspan.report.figures import COLUMNS
from subspan.report.runs import POINTS, Run, at, command_of, drift, durations, number, significant, smooth, thin
from subspan.training.config import TrainConfig
from subspan.training.finetune_config import FinetuneConfig
from subspan.training.models import LLAMA

ENDINGS = (".html", ".htm")

ROWS = 12
"""A table under a figure has no more of a run."""

NOTE = f"At most {ROWS} steps of each run, evenly spaced; all are in its metrics.jsonl."

CELLS = 60_000
"""Of all heat maps together, each counted once for all its fields."""

REST = "the rest"
MEASURED = {**COLUMNS, REST: "#c3c9d2"}
"""Columns of a measured peak -> colours."""

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
class Table:
    """Rows of texts under `head`, by run: (number of the run, its name, its rows). One without a name has rows of all runs."""

    head: Sequence[str]
    groups: list[tuple[int | None, str, Sequence[Sequence[str]]]] = field(default_factory=list)
    note: str = ""


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
            [_loss_table(runs, not scores), _validation_table(runs, not scores)],
            missing("No loss was logged.", "loss", "valid"),
        ),
        "scores": Figure("Scores", "Metrics of the validation rows, after each epoch.", [_score_table(runs, scores)]),
        "lr": Figure(
            "Learning rate",
            "Of the first parameter group: the matrices'.",
            [_curve_table(runs, "lr", "learning rate", ".2e")],
            missing("No learning rate was logged.", "lr"),
        ),
        "norm": Figure(
            "Gradient norm",
            "Of all parameters, before clipping; smoothed.",
            [_curve_table(runs, "grad_norm", "gradient norm", ".3g")],
            missing("No gradient norm was logged.", "norm"),
        ),
        "memory": Figure(
            "Memory",
            "Planned: the tensors at the fullest moment of a step. Measured: the peak, with weights, gradients and optimizer "
            "state as they were counted; on a CPU the rest holds Python and its libraries, and the peak is the process's. "
            + ("Fine-tunings are not planned. " if classifiers else "")
            + _cards_in_words([bar["total"] for group in bars for bar in group["bars"]]),
            [_memory_table(bars)],
            "" if any(group["bars"] for group in bars) else "Nothing was planned or measured.",
        ),
        "drift": Figure(
            "Subspace drift",
            "What refreshes found in each layer. An overlap near 1 is a subspace that rests, near rank / dimension one that "
            "was drawn anew.",
            [_drift_table(runs, shown)],
            unwatched,
        ),
        "energy": Figure(
            "Captured energy",
            "Share of a gradient's energy that its basis holds, median of the matrices: the new basis with symbols, the one "
            "that it replaces faint.",
            [_energy_table(runs, shown)],
            unwatched,
        ),
        "pace": Figure(
            "Time of a step",
            "Evaluations and checkpoints are not in it. Rings are steps with a refresh, of runs with diagnostics that do not "
            "spread refreshes over all steps.",
            [_pace_table(runs)],
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
        tiles=_tiles(runs[0]) if len(runs) == 1 else [],
        glance=_glance(runs) if len(runs) > 1 else None,
        figures=figures,
        differences=_differences(runs),
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
        columns = zip(*found["fields"].get(name, []), strict=True)
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
            vocab_size = _vocab_size(run)
            try:
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


def _vocab_size(run: Run) -> int | None:
    """Rows of the embedding where the run made its own tokenizer; None: the model has its own."""
    config = run.config
    assert isinstance(config, TrainConfig)
    return config.data.vocab_size if config.model.name in LLAMA and config.data.tokenizer is None else None


def _cards_in_words(totals: Sequence[float]) -> str:
    most = max(totals, default=0)
    fits = min((size for size in CARDS if most <= size * GIB - CARD_RESERVE), default=None)
    least = (
        f"the least one that holds all of this has {fits} GB" if fits else f"the last, {max(CARDS)} GB, is too small"
    )
    return f"Cards are dashed lines; {least}."


# --------------------------------------------------------------------------------------------------------------- tables


def _spread(rows: Sequence[Any]) -> list[Any]:
    """At most ROWS of them, evenly, the first and the last among them."""
    if len(rows) <= ROWS:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (ROWS - 1))] for i in range(ROWS)]


def _time(row: dict[str, Any]) -> list[str]:
    tokens = number(row, "tokens")
    return [f"{row['step']:,}", "" if tokens is None else f"{tokens:,.0f}", duration(number(row, "seconds"))]


def _loss_table(runs: Sequence[Run], texts: bool) -> Table:
    """texts: the loss is one of texts, so it has a perplexity."""
    table = Table(["step", "tokens", "time", "loss", "smoothed", "perplexity of it"][: 6 if texts else 5], note=NOTE)
    for i, run in enumerate(runs):
        losses = [number(row, "loss") for row in run.steps]
        rows = _spread(list(zip(run.steps, losses, smooth(losses), strict=True)))
        cells = [[*_time(row), _text(loss), _text(mean), _text(perplexity(mean), ".2f")] for row, loss, mean in rows]
        table.groups.append((i, run.name, [row[: len(table.head)] for row in cells]))
    return table


def _validation_table(runs: Sequence[Run], texts: bool) -> Table:
    table = Table(["step", "tokens", "time", "validation loss", "perplexity"][: 5 if texts else 4])
    for i, run in enumerate(runs):
        rows = []
        for row in _spread(run.evaluations):
            loss = number(row, "valid_loss")
            cells = [*_time(_placed(run, row)), _text(loss), _text(perplexity(loss), ".2f")]
            rows.append(cells[: len(table.head)])
        table.groups.append((i, run.name, rows))
    return table


def _score_table(runs: Sequence[Run], scores: Sequence[str]) -> Table:
    table = Table(["step", "tokens", "time", "epoch", *scores])
    for i, run in enumerate(runs):
        rows = [
            [*_time(_placed(run, row)), str(row.get("epoch", "")), *(_text(number(row, name)) for name in scores)]
            for row in _spread(run.evaluations)
        ]
        table.groups.append((i, run.name, rows))
    return table


def _placed(run: Run, row: dict[str, Any]) -> dict[str, Any]:
    """The row with the tokens and seconds of its step."""
    return {name: values[0] for name, values in at(run, [row["step"]]).items()}


def _curve_table(runs: Sequence[Run], key: str, name: str, form: str) -> Table:
    table = Table(["step", "tokens", "time", name], note=NOTE)
    for i, run in enumerate(runs):
        rows = [(row, number(row, key)) for row in _spread(run.steps)]
        table.groups.append((i, run.name, [[*_time(row), _text(value, form)] for row, value in rows]))
    return table


def _memory_table(bars: Sequence[dict[str, Any]]) -> Table:
    names = [name for name in MEASURED if any(name in bar["parts"] for group in bars for bar in group["bars"])]
    table = Table(["", *names, "peak", "fits into"])
    for group in bars:
        rows = []
        for bar in group["bars"]:
            fits = [size for size in CARDS if bar["total"] <= size * GIB - CARD_RESERVE]
            sizes = (size_of(bar["parts"].get(name)) for name in names)
            rows.append([bar["label"], *sizes, size_of(bar["total"]), f"{min(fits)} GB" if fits else "no card"])
        table.groups.append((group["run"], group["name"], rows))
    return table


def _drift_table(runs: Sequence[Run], shown: Sequence[dict[str, Any]]) -> Table:
    names = ("overlap", "captured", "stale", "median_angle", "stable_rank")
    table = Table(
        ["layer", *(name.replace("_", " ") for name in names)], note="Medians over the matrices and refreshes."
    )
    for i, run in enumerate(runs):
        found, rows = shown[i]["drift"], []
        for layer in dict.fromkeys(matrix["layer"] for matrix in found["matrices"]) if found else ():
            within = [place for place, matrix in enumerate(found["matrices"]) if matrix["layer"] == layer]
            cells = []
            for name in names:
                table_of = found["fields"].get(name)
                values = (
                    [value for place in within for value in table_of[place] if value is not None] if table_of else []
                )
                cells.append(_text(median(values) if values else None, ".3g"))
            rows.append(["others" if layer is None else str(layer), *cells])
        table.groups.append((i, run.name, rows))
    return table


def _energy_table(runs: Sequence[Run], shown: Sequence[dict[str, Any]]) -> Table:
    table = Table(["step", "tokens", "time", "in the new basis", "in the old one"])
    for i, run in enumerate(runs):
        rows = []
        if found := shown[i]["energy"]:
            for place in _spread(range(len(found["step"]))):
                row = {key: found[key][place] for key in ("step", "tokens", "seconds")}
                rows.append([*_time(row), *(_text(found[key][place], ".3f") for key in ("captured", "stale"))])
        table.groups.append((i, run.name, rows))
    return table


def _pace_table(runs: Sequence[Run]) -> Table:
    table = Table(
        ["run", "median step", "longest step", "tokens per second", "all refreshes", "share of the time in them"]
    )
    for i, run in enumerate(runs):
        paces = [pace for pace in durations(run) if pace is not None]
        seconds, refreshes = run.last("seconds"), number(run.summary, "refresh_seconds")
        cells = [
            run.name,
            duration(median(paces)) if paces else "",
            duration(max(paces, default=None)),
            _text(number(run.summary, "tokens_per_second"), ",.0f"),
            duration(refreshes),
            f"{refreshes / seconds:.1%}" if refreshes is not None and seconds else "",
        ]
        table.groups.append((i, "", [cells]))
    return table


def _glance(runs: Sequence[Run]) -> Table:
    """What one wants to know first, a row for each run; the best of a column has a star."""
    rows = [dict(_facts(run)) for run in runs]
    head = [name for name in rows[0] if any(row[name] for row in rows)]
    if all(run.status == "finished" for run in runs):
        head.remove("state of the run")
    losses = [number(run.summary, "valid_loss") for run in runs]
    if "validation loss" in head and sum(loss is not None for loss in losses) > 1:
        best = min(range(len(runs)), key=lambda i: math.inf if losses[i] is None else losses[i])  # type: ignore[arg-type, return-value]
        rows[best]["validation loss"] += " \u2605"
    return Table(
        ["run", *head], [(i, "", [[run.name, *(rows[i][name] for name in head)]]) for i, run in enumerate(runs)]
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    """(what, text) of a run; an empty text where it is not known."""
    sizes = run.summary.get("bytes")
    basis, moments = number(sizes, "basis"), number(sizes, "moments")
    loss = run.last("valid_loss")
    best = run.summary.get("best")
    scores = (
        [f"{name} {value:.4f}" for name, value in best.items() if name not in ("epoch", "valid_loss")] if best else []
    )
    means = smooth([number(row, "loss") for row in run.steps])
    return [
        ("state of the run", run.status),
        ("method", _method(run.config)),
        ("validation loss", _text(loss)),
        ("perplexity", _text(None if isinstance(run.config, FinetuneConfig) else perplexity(loss), ".2f")),
        ("best epoch", ", ".join(scores)),
        ("training loss", _text(next((mean for mean in reversed(means) if mean is not None), None))),
        ("tokens", _text(run.last("tokens"), ",.0f")),
        ("training time", duration(run.last("seconds"))),
        ("optimizer state", size_of(None if basis is None or moments is None else basis + moments)),
        ("peak memory", size_of(number(run.summary, "peak_memory_bytes") or run.last("peak_memory_bytes"))),
    ]


def _tiles(run: Run) -> list[tuple[str, str]]:
    return [(name, text) for name, text in _facts(run) if text and name != "method"]


# ------------------------------------------------------------------------------------------------------------- settings


def _method(config: TrainConfig | FinetuneConfig | None) -> str:
    if config is None:
        return ""
    optim = config.optim
    name = config.model.baseline or optim.preset
    return name if optim.preset in FULL_RANK and not config.model.baseline else f"{name}, rank {optim.rank}"


def _in_common(runs: Sequence[Run]) -> str:
    """Model, parameters and device where all runs have the same ones."""
    configs = [run.config for run in runs if run.config]
    facts = [
        [config.model.name for config in configs],
        [f"{count:,.0f} parameters" for run in runs if (count := number(run.summary, "parameters"))],
        [_method(config) for config in configs] if len(runs) == 1 else [],
        [str(device) for run in runs if (device := run.summary.get("device"))],
    ]
    return " \u00b7 ".join(values[0] for values in facts if len({*values}) == 1)


def _described(run: Run) -> dict[str, Any]:
    """What the page says of a run's settings and machine."""
    corpus, versions = run.summary.get("corpus"), run.summary.get("versions")
    facts = [
        ("device", run.summary.get("device")),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items()) if versions else None),
        ("text", corpus.get("description") if isinstance(corpus, dict) else None),
        ("SHA-256 of the text", corpus.get("sha256") if isinstance(corpus, dict) else run.summary.get("sha256")),
    ]
    return {
        "name": run.name,
        "status": run.status,
        "method": _method(run.config),
        "config": run.config_text,
        "command": command_of(run.config) if run.config else "",
        "facts": [(name, text) for name, text in facts if text],
    }


def _differences(runs: Sequence[Run]) -> Table | None:
    """The fields in which the runs differ."""
    known = [(i, run.name, _flat(asdict(run.config))) for i, run in enumerate(runs) if run.config]
    names = dict.fromkeys(name for _, _, values in known for name in values if name not in ("run.out", "resume"))
    differing = [name for name in names if len({values.get(name, "") for _, _, values in known}) > 1]
    if not differing:
        return None
    return Table(
        ["run", *differing],
        [(i, "", [[run, *(values.get(name, "") for name in differing)]]) for i, run, values in known],
    )


def _flat(sections: Mapping[str, Any]) -> dict[str, str]:
    values = [(key, value if isinstance(value, dict) else {"": value}) for key, value in sections.items()]
    return {
        f"{section}.{name}".rstrip("."): value if isinstance(value, str) else json.dumps(value)
        for section, fields in values
        for name, value in fields.items()
    }


# ------------------------------------------------------------------------------------------------------------- the plan


def plan_page(plans: Mapping[str, MemoryPlan], config: TrainConfig) -> str:
    """The page of `subspan plan`: the first of `plans` is that of `config`, the others are what it is compared with."""
    plan = next(iter(plans.values()))
    bars = [
        {"run": None, "name": name, "bars": [_bar("", {column: getattr(plan, column) for column in COLUMNS})]}
        for name, plan in plans.items()
    ]
    table = _memory_table(bars)
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


def _text(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else f"{value:{form}}"


def perplexity(loss: float | None) -> float | None:
    return math.exp(loss) if loss is not None and loss < 100 else None


def size_of(size: float | None) -> str:
    """Bytes in words.

    >>> size_of(3 * 2**30), size_of(2**19)
    ('3.00 GiB', '0.5 MiB')
    """
    if size is None:
        return ""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def duration(seconds: float | None) -> str:
    """Seconds in words.

    >>> duration(0.0123), duration(3.21), duration(75), duration(3 * 86400 + 7)
    ('12.3 ms', '3.21 s', '1 min 15 s', '3 days, 0:00:07')
    """
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    return str(timedelta(seconds=round(seconds)))
