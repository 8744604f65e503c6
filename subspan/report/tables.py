"""Tables of a page: what stands under each figure, what one wants to know first, in what the runs differ."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from statistics import median
from typing import Any

from subspan.memory import GIB
from subspan.optim.presets import FULL_RANK
from subspan.plan import CARD_RESERVE, CARDS
from subspan.report.figures import COLUMNS
from subspan.report.runs import Run, at, durations, number, smooth
from subspan.training.config import TrainConfig
from subspan.training.finetune_config import FinetuneConfig

ROWS = 12
"""A table under a figure has no more of a run."""

NOTE = f"At most {ROWS} steps of each run, evenly spaced; all are in its metrics.jsonl."

REST = "the rest"
MEASURED = {**COLUMNS, REST: "#c3c9d2"}
"""Columns of a measured peak -> colours."""


@dataclass
class Table:
    """Rows of texts under `head`, by run: (number of the run, its name, its rows). One without a name has rows of all runs."""

    head: Sequence[str]
    groups: list[tuple[int | None, str, Sequence[Sequence[str]]]] = field(default_factory=list)
    note: str = ""


# ----------------------------------------------------------------------------------------------------- under the figures


def _spread(rows: Sequence[Any]) -> list[Any]:
    """At most ROWS of them, evenly, the first and the last among them."""
    if len(rows) <= ROWS:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (ROWS - 1))] for i in range(ROWS)]


def _time(row: dict[str, Any]) -> list[str]:
    tokens = number(row, "tokens")
    return [f"{row['step']:,}", "" if tokens is None else f"{tokens:,.0f}", duration(number(row, "seconds"))]


def loss_table(runs: Sequence[Run], texts: bool) -> Table:
    """texts: the loss is one of texts, so it has a perplexity."""
    table = Table(["step", "tokens", "time", "loss", "smoothed", "perplexity of it"][: 6 if texts else 5], note=NOTE)
    for i, run in enumerate(runs):
        losses = [number(row, "loss") for row in run.steps]
        rows = _spread(list(zip(run.steps, losses, smooth(losses), strict=True)))
        cells = [[*_time(row), _text(loss), _text(mean), _text(perplexity(mean), ".2f")] for row, loss, mean in rows]
        table.groups.append((i, run.name, [row[: len(table.head)] for row in cells]))
    return table


def validation_table(runs: Sequence[Run], texts: bool) -> Table:
    table = Table(["step", "tokens", "time", "validation loss", "perplexity"][: 5 if texts else 4])
    for i, run in enumerate(runs):
        rows = []
        for row in _spread(run.evaluations):
            loss = number(row, "valid_loss")
            cells = [*_time(_placed(run, row)), _text(loss), _text(perplexity(loss), ".2f")]
            rows.append(cells[: len(table.head)])
        table.groups.append((i, run.name, rows))
    return table


def score_table(runs: Sequence[Run], scores: Sequence[str]) -> Table:
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


def curve_table(runs: Sequence[Run], key: str, name: str, form: str) -> Table:
    table = Table(["step", "tokens", "time", name], note=NOTE)
    for i, run in enumerate(runs):
        rows = [(row, number(row, key)) for row in _spread(run.steps)]
        table.groups.append((i, run.name, [[*_time(row), _text(value, form)] for row, value in rows]))
    return table


def memory_table(bars: Sequence[dict[str, Any]]) -> Table:
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


def drift_table(runs: Sequence[Run], shown: Sequence[dict[str, Any]]) -> Table:
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


def energy_table(runs: Sequence[Run], shown: Sequence[dict[str, Any]]) -> Table:
    table = Table(["step", "tokens", "time", "in the new basis", "in the old one"])
    for i, run in enumerate(runs):
        rows = []
        if found := shown[i]["energy"]:
            for place in _spread(range(len(found["step"]))):
                row = {key: found[key][place] for key in ("step", "tokens", "seconds")}
                rows.append([*_time(row), *(_text(found[key][place], ".3f") for key in ("captured", "stale"))])
        table.groups.append((i, run.name, rows))
    return table


def pace_table(runs: Sequence[Run]) -> Table:
    table = Table(
        ["run", "median step", "longest step", "tokens per second", "all refreshes", "share of the time in them"]
    )
    for i, run in enumerate(runs):
        paces = [pace for pace in durations(run) if pace is not None]
        seconds, refreshes = run.last("seconds"), number(run.summary, "refresh_seconds")
        if not str(run.summary.get("device", "cpu")).startswith("cpu"):
            refreshes = None  # the host's seconds, in which it waits for all that an accelerator has still to do
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


# ----------------------------------------------------------------------------------------------------------- of the runs


def glance(runs: Sequence[Run]) -> Table:
    """What one wants to know first, a row for each run; the best of a column has a star."""
    rows = [dict(facts_of(run)) for run in runs]
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


def facts_of(run: Run) -> list[tuple[str, str]]:
    """(what, text) of a run; an empty text where it is not known."""
    sizes = run.summary.get("bytes")
    basis, moments = number(sizes, "basis"), number(sizes, "moments")
    loss = number(run.summary, "valid_loss") if "valid_loss" in run.summary else run.last("valid_loss")
    best = run.summary.get("best")
    scores = (
        [f"{name} {_text(number(best, name)) or '-'}" for name in best if name not in ("epoch", "valid_loss")]
        if isinstance(best, dict)
        else []
    )
    means = smooth([number(row, "loss") for row in run.steps])
    return [
        ("state of the run", run.status),
        ("method", method(run.config)),
        ("validation loss", _text(loss)),
        ("perplexity", _text(None if isinstance(run.config, FinetuneConfig) else perplexity(loss), ".2f")),
        ("best epoch", ", ".join(scores)),
        ("training loss", _text(next((mean for mean in reversed(means) if mean is not None), None))),
        ("tokens", _text(run.last("tokens"), ",.0f")),
        ("training time", duration(run.last("seconds"))),
        ("optimizer state", size_of(None if basis is None or moments is None else basis + moments)),
        ("peak memory", size_of(number(run.summary, "peak_memory_bytes") or run.last("peak_memory_bytes"))),
    ]


def method(config: TrainConfig | FinetuneConfig | None) -> str:
    if config is None:
        return ""
    optim = config.optim
    name = config.model.baseline or optim.preset
    return name if optim.preset in FULL_RANK and not config.model.baseline else f"{name}, rank {optim.rank}"


def differences(runs: Sequence[Run]) -> Table | None:
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


# ----------------------------------------------------------------------------------------------------------------- words


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
