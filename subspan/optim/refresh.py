"""When bases change: what the user says (`Refresh`), and where every parameter stands (`Timetable`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from subspan.checks import check_whole

Moments = Literal["keep", "reset", "transport"]


@dataclass(frozen=True)
class Refresh:
    """When bases change: every `update_proj_gap` (T, a group key) steps, and before the first T steps are over as said here.

    first="gradient" (the paper): every basis is found from the gradient of step 0.
    first="random": bases are seeded random orthonormal at construction, and parameter i of N has its first true refresh at
        step floor(i S / N), S = `stagger` (None: T), so that no step stalls on all of them, or holds all their gradients.
    first=None: "gradient" with gradients="hold", else "random".
    adaptive: T of a parameter doubles at a refresh whose new basis overlaps the old one by more than this (`overlap`, in
        [0, 1]), so that a subspace that rests is not searched for so often; None: never. Decided at refreshes alone, from the
        bases alone. Q-GaLore (arXiv 2407.08296) does so by cosines of singular vectors.
    max_gap: the longest T that doubling may reach; None: 8 T.
    moments: what becomes of the rule's moments when the basis changes, on which published measurements disagree. "keep" (the
        paper): they stay as they are. "reset": they begin anew, step count of the bias correction included (FRUGAL).
        "transport": they are moved into the new basis by C = Q_new^T Q_old (the rule's `transport`; LDAdam). None: "keep", but
        for presets of other papers.
    gate: moments are reset or transported only where the overlap of old and new basis is more than this, in [0, 1), and kept
        elsewhere; None: always.
    align: change signs of new basis vectors so that none points away from the old one. Subspace iteration keeps signs by
        itself; those of an SVD are arbitrary.
    seed: of every random draw of the optimizer; equal on all processes.
    """

    first: Literal["gradient", "random"] | None = None
    stagger: int | None = None
    adaptive: float | None = None
    max_gap: int | None = None
    moments: Moments | None = None
    gate: float | None = None
    align: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.first not in (None, "gradient", "random"):
            raise ValueError(f"first={self.first!r} is unknown: use 'gradient' or 'random'")
        if self.stagger is not None:
            check_whole("stagger", self.stagger, minimum=1)
            if self.first == "gradient":
                raise ValueError("stagger needs a basis before the first refresh: set first='random' or drop stagger")
        if self.adaptive is not None and not 0 <= self.adaptive < 1:
            raise ValueError(f"adaptive={self.adaptive!r} must be an overlap in [0, 1), such as 0.6, or None")
        if self.max_gap is not None:
            check_whole("max_gap", self.max_gap, minimum=1)
            if self.adaptive is None:
                raise ValueError(
                    f"max_gap={self.max_gap} bounds a gap that grows: set adaptive=0.6, say, or drop max_gap"
                )
        if self.moments not in (None, *get_args(Moments)):
            raise ValueError(f"moments={self.moments!r} is unknown: use 'keep', 'reset' or 'transport'")
        if self.gate is not None and not 0 <= self.gate < 1:
            raise ValueError(f"gate={self.gate!r} must be an overlap in [0, 1), such as 0.5, or None")
        if self.gate is not None and self.moments in (None, "keep"):
            raise ValueError(f"gate={self.gate} says when moments are not kept: set moments='transport' or drop gate")

    @property
    def needs_overlap(self) -> bool:
        return self.adaptive is not None or self.gate is not None


class Timetable:
    """Where every projected parameter stands between two refreshes.

    0-d tensors of the optimizer's state say it: `refreshes` (how many), `last_refresh` (the step at which the last one was due;
    -1 before), `stretch` (what T has been multiplied by) and, with moments="reset", `reset` (the step at which they began anew).
    Their values are kept here as numbers too, so that asking whether a refresh is due costs no host sync.
    """

    KEYS = ("refreshes", "last_refresh", "stretch", "reset")

    def __init__(self, refresh: Refresh) -> None:
        self.refresh = refresh
        self.refreshes: dict[Tensor, int] = {}
        self.last: dict[Tensor, int] = {}
        self.stretch: dict[Tensor, int] = {}
        self.reset: dict[Tensor, int] = {}
        self._first: dict[Tensor, int] = {}

    def add(self, p: Tensor) -> dict[str, Tensor]:
        """Take in a parameter that was never refreshed; returns its state."""
        self.refreshes[p], self.last[p], self.stretch[p], self.reset[p] = 0, -1, 1, 0
        state = {"refreshes": 0, "last_refresh": -1, "stretch": 1}
        state |= {"reset": 0} if self.refresh.moments == "reset" else {}
        return {key: torch.tensor(float(value), dtype=torch.float32, device="cpu") for key, value in state.items()}

    def drop(self, p: Tensor) -> None:
        """Forget a parameter, if it was taken in."""
        for of in (self.refreshes, self.last, self.stretch, self.reset, self._first):
            of.pop(p, None)

    def stagger(self, parameters: Sequence[Tensor], gap: Callable[[Tensor], int]) -> None:
        """Spread the first refreshes of `parameters` over their first steps; `gap`: their T."""
        for i, p in enumerate(parameters):
            self._first[p] = i * min(self.refresh.stagger or gap(p), gap(p)) // len(parameters)

    def first(self, p: Tensor) -> int:
        """The step of p's first refresh."""
        return 0 if self.refresh.first == "gradient" else self._first[p]

    def due(self, p: Tensor, step: int, gap: int) -> bool:
        """Whether `step`, counted from 0, finds p a new basis; `gap`: T. Until one is found it stays due."""
        return step >= self._due(p, gap)

    def found(self, p: Tensor, state: dict[str, Tensor], step: int, gap: int, overlap: float | None) -> None:
        """Note that p has a new basis; `overlap`: with the one before, None if that knew nothing of the gradient."""
        # A gradient that is zero or not finite finds no basis and leaves the refresh to the next step; the one after it comes
        # when it would have come, so that refreshes stay staggered.
        self.last[p] = step - (step - self._due(p, gap)) % (gap * self.stretch[p])
        state["last_refresh"].fill_(self.last[p])
        self.refreshes[p] += 1
        state["refreshes"].fill_(self.refreshes[p])
        adaptive, longest = self.refresh.adaptive, self.refresh.max_gap or 8 * gap
        rests = adaptive is not None and overlap is not None and overlap > adaptive
        if rests and 2 * self.stretch[p] * gap <= longest:
            self.stretch[p] *= 2
            state["stretch"].fill_(self.stretch[p])

    def forget(self, p: Tensor, state: dict[str, Tensor]) -> None:
        """Back to what `add` said."""
        for key, value in self.add(p).items():
            state[key].copy_(value)

    def reset_at(self, p: Tensor, state: dict[str, Tensor], step: int) -> None:
        """Note that p's moments begin anew after `step` steps."""
        self.reset[p] = step
        state["reset"].fill_(step)

    def _due(self, p: Tensor, gap: int) -> int:
        return self.first(p) if self.last[p] < 0 else self.last[p] + gap * self.stretch[p]

    def load(self, p: Tensor, state: dict[str, Tensor]) -> None:
        """Take over what a loaded state says."""
        of = {"refreshes": self.refreshes, "last_refresh": self.last, "stretch": self.stretch, "reset": self.reset}
        for key in of.keys() & state.keys():
            of[key][p] = int(state[key])
