"""Ranges that a profile shows: what the optimizer and the trainer do, by name."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function

PREFIX = "subspan."

_NOTHING = nullcontext()


def mark(name: str) -> AbstractContextManager[object]:
    """A range of a profile: `with mark("rule"): ...`. Nothing outside of profiles, where torch's own takes its time too."""
    return record_function(PREFIX + name) if torch.autograd.profiler._is_profiler_enabled else _NOTHING
