"""Where the time of a step goes: torch's profiler over some steps of a run, read by the ranges that trainer and optimizer mark.

The optimizer marks `project` (R = Q^T A), `rule` (moments and direction), `apply` (the weight's update) and `refresh` with
`torch.profiler.record_function`, so any profile of any loop shows them; the trainer adds `data`, `forward`, `backward`, `step`.
A range's time is its own, without that of the ranges inside it: with gradients="update" the optimizer runs inside `backward`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, schedule

from subspan.extras import require
from subspan.optim.marks import PREFIX

PARTS = {
    "data": "the next batch",
    "forward": "model and loss",
    "backward": "gradients",
    "project": "low-rank gradients",
    "rule": "moments and direction",
    "apply": "weights",
    "refresh": "new bases",
    "step": "norms, clipping, the rest",
}
"""Range -> what is done in it, in the order of the table."""

SKIPPED = 2
"""Steps before the first profiled one: they compile, allocate and fill caches; a third is profiled and not counted."""

Range = tuple[str, float, float]
"""Name, begin and end in microseconds."""


class StepProfiler:
    """Profiles `steps` steps of a run, then leaves profile.json and trace.json (for a trace viewer) in `out` and prints a table.

    Times are the host's, which on an accelerator only queues its work: there, ranges of its own timeline are read, and what of
    a step is in no other range is `backward`, whose kernels another thread queues.
    """

    def __init__(self, out: Path, steps: int, device: torch.device, say: Any = print) -> None:
        self.out, self.device, self.say = out, device, say
        activities = {ProfilerActivity.CPU, getattr(ProfilerActivity, device.type.upper(), ProfilerActivity.CPU)}
        self.on_device = len(activities) > 1
        self.profiler = profile(
            activities=activities,
            schedule=schedule(skip_first=SKIPPED, wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._report,
        )

    def __enter__(self) -> StepProfiler:
        self.profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.profiler.stop()

    def step(self) -> None:
        """Tell that a step of training has ended."""
        self.profiler.step()

    def _report(self, profiler: Any) -> None:
        ranges = [
            (event.name.removeprefix(PREFIX), event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.name.startswith(PREFIX) and (event.device_type != DeviceType.CPU) == self.on_device
        ]
        steps = own_times(ranges)
        if not steps:  # the run ended as the first one was about to begin
            return
        if self.on_device:
            for times in steps:
                times["backward"] = times.get("backward", 0.0) + times.pop("step", 0.0)
        rows = {part: median(times.get(part, 0.0) for times in steps) for part in PARTS}
        whole = median(sum(times.values()) for times in steps)
        means = {part: sum(times.get(part, 0.0) for times in steps) / len(steps) for part in PARTS}
        result = {"steps": steps, "median": rows, "mean": means, "step": whole, "device": str(self.device)}
        (self.out / "profile.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        profiler.export_chrome_trace(str(self.out / "trace.json"))
        self.say(describe(means))


def own_times(ranges: Iterable[Range]) -> list[dict[str, float]]:
    """Step by step, the seconds that each range took without those inside it.

    ranges: those of whole steps, in any order and of any thread: one thing happens at a time in a step.
    """
    steps: list[dict[str, float]] = []
    open_ranges: list[Range] = []  # each inside the one before it
    for name, begin, end in sorted(ranges, key=lambda r: (r[1], -r[2])):
        while open_ranges and open_ranges[-1][2] <= begin:
            open_ranges.pop()
        if name == "step":
            open_ranges.clear()
            steps.append({})
        elif not open_ranges:
            continue  # outside of steps: an evaluation
        seconds = (end - begin) / 1e6
        steps[-1][name] = steps[-1].get(name, 0.0) + seconds
        if open_ranges:
            steps[-1][open_ranges[-1][0]] -= seconds
        open_ranges.append((name, begin, end))
    return steps


def describe(seconds: dict[str, float]) -> str:
    """A table of the parts of a step, milliseconds and shares."""
    table = require("rich.table", "train").Table(box=None, pad_edge=False)
    table.add_column("where a step's time goes")
    for column in ("ms", "share"):
        table.add_column(column, justify="right")
    table.add_column("")
    total = sum(seconds.values())
    for part, what in PARTS.items():
        table.add_row(part, f"{1e3 * seconds[part]:,.1f}", f"{seconds[part] / total:.1%}", what)
    console = require("rich.console", "train").Console(width=80)
    with console.capture() as capture:
        console.print(table)
    return str(capture.get()).rstrip()
