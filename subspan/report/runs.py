"""Run folders as they are found: finished, still running, killed half-way, or with files that cannot be read."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from subspan.diagnostics import FIELDS
from subspan.extras import require
from subspan.training.config import OptimConfig, TrainConfig, as_given, make_config
from subspan.training.finetune_config import FINETUNE_SECTIONS, FinetuneConfig, FinetuneOptimConfig

FILES = ("metrics.jsonl", "config.yaml", "summary.json")
"""One of them makes a folder that of a run."""

TRAINER = "trainer.json"
"""What `subspan.hf.SubspanCallback` leaves instead of a config.yaml."""

LARGEST = sys.float_info.max
"""Whole numbers of JSON may be larger, and nothing draws them."""

POINTS = 1000
"""A drawn series has no more; between two of them lie the extremes that it has."""


@dataclass
class Run:
    """What a run folder holds, or the folder of a fine-tuning's seed. Files that are not there are empty here.

    steps, evaluations, refreshes: the rows of metrics.jsonl by what they tell.
    notices: what is missing, for people.
    """

    name: str
    folder: Path
    config: TrainConfig | FinetuneConfig | None = None
    config_text: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    refreshes: list[dict[str, Any]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """finished, unfinished or empty (nothing was logged)."""
        return "finished" if self.summary else "unfinished" if self.steps else "empty"

    def last(self, key: str) -> float | None:
        """The last number of this name that was logged."""
        rows = self.evaluations if key in ("valid_loss", "perplexity") else self.steps
        return next((value for row in reversed(rows) if (value := number(row, key)) is not None), None)


def number(row: Any, key: str) -> float | None:
    """row[key] where it is a finite number, else None: logs have null for nan, and a broken one has anything."""
    value = row.get(key) if isinstance(row, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if -LARGEST <= value <= LARGEST else None


# -------------------------------------------------------------------------------------------------------------- reading


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in `folders`, in this order; each seed of a fine-tuning is one.

    Raises ValueError: one of them is no run folder. What is broken in a run is a notice of it.
    """
    found: dict[Path, Path] = {}  # the run folder -> that of its config, which is above it for a seed
    for given in map(str, folders):
        folder = Path(given).expanduser().resolve()
        if not folder.is_dir():
            raise ValueError(f"run={given!r} is no folder: name the run.out of a training run")
        seeds = [path for path in folder.glob("seed_*") if path.is_dir()]
        if not seeds and not any((folder / name).is_file() for name in FILES):
            raise ValueError(
                f"run={given!r} is no run folder, it has none of {', '.join(FILES)}: name the run.out of a training run"
            )
        seeds.sort(key=lambda path: (len(path.name), path.name))
        # Of a fine-tuning the config is above the seeds; runs may be called seed_1 as well.
        found |= {run: run if (run / "config.yaml").is_file() else folder for run in seeds or [folder]}
    return [_read(name, *paths) for name, paths in zip(_names(found), found.items(), strict=True)]


def _names(found: Mapping[Path, Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart; a seed has the folder above it in its name."""
    more = 1
    while True:
        names = ["/".join(run.parts[-more - (run != owner) :]) for run, owner in found.items()]
        if len({*names}) == len(found):
            return names
        more += 1


def _read(name: str, folder: Path, owner: Path) -> Run:
    """The run in `folder`; of a seed the config lies in the folder above it, and the summary is its result."""
    run = Run(name, folder)
    _read_config(run, owner / "config.yaml")
    _read_summary(run, folder / ("summary.json" if folder == owner else "result.json"))
    if folder != owner and run.summary:
        whole = _json(owner / "summary.json")
        run.summary = {**{key: whole[key] for key in ("device", "versions") if key in whole}, **run.summary}
    _read_metrics(run, folder / "metrics.jsonl")
    ended = number(run.summary, "steps")
    if ended is not None and run.steps and run.steps[-1]["step"] > ended:
        run.summary = {}  # it went on after that
    if not run.summary:
        total = run.config.run.steps if isinstance(run.config, TrainConfig) else None
        of = f" of {total:,}" if total else ""
        done = run.steps[-1]["step"] if run.steps else 0
        run.notices.insert(0, f"Not finished: the last step in the log is {done:,}{of}.")
    return run


def _read_config(run: Run, path: Path) -> None:
    if not path.is_file():
        trainer = path.with_name(TRAINER)
        if trainer.is_file():
            run.config_text = trainer.read_text(encoding="utf-8", errors="replace")
            return
        run.notices.append("config.yaml is missing: no settings, no plan of its memory, no command to repeat it.")
        return
    yaml = require("yaml", "report")
    run.config_text = path.read_text(encoding="utf-8", errors="replace")
    try:
        values = yaml.safe_load(run.config_text)
        if "epochs" in values["run"]:
            sections = {key: make(**values[key]) for key, make in FINETUNE_SECTIONS.items()}
            run.config = FinetuneConfig(**sections)
        else:
            run.config = make_config({**values, "resume": None})
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        said = " ".join(str(error).split())
        run.notices.append(f"config.yaml cannot be read ({said}): no plan of its memory, no command to repeat it.")


def _read_summary(run: Run, path: Path) -> None:
    if path.is_file():
        run.summary = _json(path)
        if not run.summary:
            run.notices.append(f"{path.name} cannot be read.")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_metrics(run: Run, path: Path) -> None:
    """Sort the rows; lines that are none are counted."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    unread = []
    for place, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if number(row, "step") is None:
            unread.append(place)
            continue
        row["step"] = int(row["step"])
        if isinstance(row.get("refreshes"), list):
            run.refreshes.append(row)
        else:
            (run.evaluations if "valid_loss" in row else run.steps).append(row)
    if not lines:
        run.notices.append("metrics.jsonl is missing or empty: there are no curves.")
    elif unread == [len(lines)]:
        run.notices.append("The last line of metrics.jsonl is cut short, as a killed run leaves it; it is left out.")
    elif unread:
        run.notices.append(f"{len(unread):,} lines of metrics.jsonl cannot be read, the first is line {unread[0]:,}.")
    lost = sum(number(row, "loss") is None for row in run.steps)
    if lost:
        run.notices.append(f"{lost:,} steps have a loss that is not finite: gaps in the curve.")


# ------------------------------------------------------------------------------------------------------------- reducing


def thin(values: Sequence[float | None], points: int = POINTS) -> list[int]:
    """Indices of at most `points` of `values`, rising: first, last, and the least and the greatest of every stretch.

    >>> thin([5.0, 1.0, 9.0, 2.0, 3.0, 4.0, 0.0, 7.0], 6)
    [0, 1, 2, 6, 7]
    """
    if len(values) <= points:
        return list(range(len(values)))
    stretches = (points - 2) // 2
    kept = {0, len(values) - 1}
    for i in range(stretches):
        stretch = range(i * len(values) // stretches, (i + 1) * len(values) // stretches)
        there = [j for j in stretch if values[j] is not None]
        if there:
            kept |= {min(there, key=lambda j: values[j]), max(there, key=lambda j: values[j])}  # type: ignore[arg-type, return-value]
        else:
            kept.add(stretch[0])  # a gap stays one
    return sorted(kept)


def smooth(values: Sequence[float | None]) -> list[float | None]:
    """Running mean whose weights fall off over the last 50th of the run; what is not there changes nothing."""
    keep = 1 - 2 / (max(5, len(values) // 50) + 1)
    total = weight = 0.0
    means: list[float | None] = []
    for value in values:
        if value is not None:
            total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight if value is not None else None)
    return means


def durations(run: Run) -> list[float | None]:
    """Seconds of a step, at each row: the mean over those since the row before, for a log may leave steps out."""
    rows = [(0, 0.0), *((row["step"], number(row, "seconds")) for row in run.steps)]
    return [
        (now - before) / (step - last) if None not in (now, before) and now >= before and step > last else None  # type: ignore[operator]
        for (last, before), (step, now) in pairwise(rows)
    ]


def drift(run: Run, cells: int) -> dict[str, Any] | None:
    """What refreshes found, as a table for each field: a row for each matrix, a column for each time; None without diagnostics.

    Times are as many as the matrix with most refreshes has, and no more than `cells` / matrices: refreshes between two of
    them go into one column, as their mean. A column is empty for a matrix without one.
    """
    seen: list[tuple[int, dict[str, Any]]]
    seen = [(row["step"], found) for row in run.refreshes for found in row["refreshes"] if isinstance(found, dict)]
    seen = [(step, found) for step, found in seen if isinstance(found.get("name"), str)]
    if not seen:
        return None
    names = list(dict.fromkeys(found["name"] for _, found in seen))
    names.sort(key=lambda name: math.inf if (layer := _layer(name)) is None else layer)
    most = max(Counter(found["name"] for _, found in seen).values())
    first, last = min(step for step, _ in seen), max(step for step, _ in seen)
    columns = max(1, min(most, cells // len(names)))

    def column(step: int) -> int:
        return min(columns - 1, (step - first) * columns // max(1, last - first))

    sums: dict[str, dict[tuple[str, int], list[float]]] = {name: {} for name in FIELDS}
    when: dict[int, list[int]] = {}
    for step, found in seen:
        when.setdefault(column(step), []).append(step)
        for name in FIELDS:
            if (value := number(found, name)) is not None:
                sums[name].setdefault((found["name"], column(step)), []).append(value)
    times = sorted(when)
    return {
        "matrices": [{"layer": _layer(name), "kind": kind_of(name)} for name in names],
        **at(run, [sum(when[time]) // len(when[time]) for time in times]),
        "fields": {
            name: [[_mean(found.get((matrix, time))) for time in times] for matrix in names]
            for name, found in sums.items()
            if found
        },
    }


def kind_of(name: str) -> str:
    """q_proj of model.layers.0.self_attn.q_proj.weight."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _layer(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def _mean(values: list[float] | None) -> float | None:
    return significant(sum(values) / len(values)) if values else None


def at(run: Run, steps: Iterable[int]) -> dict[str, list[Any]]:
    """Steps, and the tokens and seconds at them."""
    logged = [row["step"] for row in run.steps]
    steps = list(steps)
    rows = [run.steps[max(0, bisect_right(logged, step) - 1)] if logged else {} for step in steps]
    return {
        "step": steps,
        "tokens": [number(row, "tokens") for row in rows],
        "seconds": [significant(number(row, "seconds"), 6) for row in rows],
    }


def significant(value: float | None, digits: int = 4) -> float | None:
    """Rounded: what nobody sees need not be in the page."""
    return None if value is None else float(f"{value:.{digits}g}")


# ----------------------------------------------------------------------------------------------------------- repeating


def command_of(config: TrainConfig | FinetuneConfig) -> str:
    """The command line that makes a run of this configuration: every field that is not what it would be without it."""
    usual: TrainConfig | FinetuneConfig
    if isinstance(config, FinetuneConfig):
        start, usual = "subspan finetune", FinetuneConfig(optim=FinetuneOptimConfig(preset=config.optim.preset))
    else:
        start, usual = "subspan train", TrainConfig(optim=OptimConfig(preset=config.optim.preset))
        if config.parallel.count > 1:
            start = f"torchrun --nproc-per-node {config.parallel.count} -m {start}"
    before = dataclasses.asdict(usual) | {"optim": as_given(usual.optim) | {"preset": None}}  # named in every command
    words = []
    for section, values in (dataclasses.asdict(config) | {"optim": as_given(config.optim)}).items():
        for name, value in values.items() if isinstance(values, dict) else ():
            if value != before[section][name]:
                text = value if isinstance(value, str) else json.dumps(value)
                words.append(f"--{section}.{name} {shlex.quote(text)}")
    return " \\\n    ".join([start, *words])
