"""What to start with: learning rates and T for a preset and a size of model, as measured here or published (docs/choosing.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """Rates that trained a model of so many parameters. lr: of matrices. dense_lr: of the rest, None where it is not trained.
    source: who says so, and whether they were searched."""

    parameters: float
    lr: float
    dense_lr: float | None
    source: str
    update_proj_gap: int | None = None


_GRID = "best of a search, benchmarks/quality"
_LONG = "better of a search's best two in a long run, benchmarks/quality"
_FIRST = "best of a small search in fp32, reproductions/first_run"
_PAIRS = "best of two or three pairs, reproductions/table2_small"
_TRIED = "good, but not searched, benchmarks/quality"
_GALORE = (
    Start(8.4e6, 0.003, 0.01, _FIRST, 100),
    Start(58e6, 0.01, 0.01, "arXiv 2403.03507, 60M to 1B", 200),
    Start(1.34e9, 0.01, 0.01, "arXiv 2403.03507, 60M to 1B", 200),
    Start(6.7e9, 0.005, 0.005, "arXiv 2403.03507, 7B", 500),
)
_ADAMW = (Start(8.4e6, 0.0005, 0.01, _FIRST),)
_SUBSPAN = (Start(1.7e6, 0.01, 0.1, _LONG), Start(8.4e6, 0.01, 0.1, _PAIRS))
_ADAPTERS = (Start(1.7e6, 0.003, 0.03, _GRID), Start(8.4e6, 0.001, 0.03, _PAIRS))
STARTS: dict[str, tuple[Start, ...]] = {
    "galore": (Start(1.7e6, 0.01, 0.1, _LONG, 100), *_GALORE),
    "galore8bit": _GALORE,
    "qgalore": _GALORE,
    "paper": _GALORE,
    "adamw": (Start(1.7e6, 0.003, 0.1, _GRID), *_ADAMW),
    "adamw8bit": _ADAMW,
    "fira": (Start(1.7e6, 0.01, 0.1, _LONG, 100),),
    "frugal": (Start(1.7e6, 0.003, 0.1, _GRID, 100),),
    "apollo": (Start(1.7e6, 0.01, 0.1, _GRID, 100),),
    "ldadam": (Start(1.7e6, 0.003, 0.1, _LONG, 1),),
    "muon": (Start(1.7e6, 0.01, 0.1, _TRIED),),
    "subspan": _SUBSPAN,
    "lora": _ADAPTERS,
    "relora": _ADAPTERS,
    "factorized": _ADAPTERS,
}
"""From random weights, by preset or baseline. Nothing is said of others: no run of theirs has been measured."""

_CONTINUED = "best of a search, reproductions/continued_pretraining"
PRETRAINED: dict[str, tuple[Start, ...]] = {
    "adamw": (Start(1.345e8, 1e-4, 1e-4, _CONTINUED),),
    "galore": (Start(1.345e8, 1e-3, 1e-4, _CONTINUED),),
    "lora": (Start(1.345e8, 3e-3, None, f"adapters alone, --model.train_rest false, {_CONTINUED}"),),
    "subspan": (Start(1.345e8, 3e-3, 1e-4, f"{_CONTINUED}; 0.04 behind the others there"),),
}
"""To go on from a pretrained model, which those of `STARTS` would ruin."""


def advise(method: str, parameters: int, pretrained: bool = False) -> str:
    """The entry of the nearest size, in words. method: a preset, or the baseline of the model."""
    starts = (PRETRAINED if pretrained else STARTS).get(method)
    if starts is None:
        of = " for a pretrained model" if pretrained else ""
        return f"no rates of {method} have been measured yet{of}: see docs/choosing.md for how to search"
    start = min(starts, key=lambda s: abs(math.log(s.parameters / parameters)))
    gap = "" if start.update_proj_gap is None else f", update_proj_gap {start.update_proj_gap}"
    far = max(start.parameters / parameters, parameters / start.parameters)
    size = f"{start.parameters / 1e9:g} B" if start.parameters >= 1e9 else f"{start.parameters / 1e6:g} M"
    warning = f", {far:,.0f} times away: take them as a guess" if far > 10 else ""
    dense, what = ("", "it") if start.dense_lr is None else (f", dense_lr {start.dense_lr:g}", "both rates")
    return (
        f"lr {start.lr:g}{dense}{gap}: at {size} parameters{warning} ({start.source}); "
        f"search {what} again (docs/choosing.md)"
    )
