"""When bases change: what the user says (`Refresh`), and where every parameter stands (`Timetable`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from subspan.optim.groups import check_whole


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
    seed: of every random draw of the optimizer; equal on all processes.
    """

    first: Literal["gradient", "random"] | None = None
    stagger: int | None = None
    adaptive: float | None = None
    max_gap: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.first not in (None, "gradient", "random"):
            raise ValueError(f"first={self.first!r} is unknown: use 'gradient' or 'random'")
        if self.stagger is not None:
            check_whole("stagger", self.stagger)
            if self.first == "gradient":
                raise ValueError("stagger needs a basis before the first refresh: set first='random' or drop stagger")
        if self.adaptive is not None and not 0 <= self.adaptive < 1:
            raise ValueError(f"adaptive={self.adaptive!r} must be an overlap in [0, 1), such as 0.6, or None")
        if self.max_gap is not None:
            check_whole("max_gap", self.max_gap)
            if self.adaptive is None:
                raise ValueError(
                    f"max_gap={self.max_gap} bounds a gap that grows: set adaptive=0.6, say, or drop max_gap"
                )


class Timetable:
    """Where every projected parameter stands between two refreshes.

    Three 0-d tensors of the optimizer's state say it: `refreshes` (how many), `last_refresh` (the step at which the last one
    was due; -1 before), `stretch` (what T has been multiplied by). Their values are kept here as numbers too, so that
    asking whether a refresh is due costs no host sync.
    """

    KEYS = ("refreshes", "last_refresh", "stretch")

    def __init__(self, refresh: Refresh) -> None:
        self.refresh = refresh
        self.refreshes: dict[Tensor, int] = {}
        self.last: dict[Tensor, int] = {}
        self.stretch: dict[Tensor, int] = {}
        self._first: dict[Tensor, int] = {}

    def add(self, p: Tensor) -> dict[str, Tensor]:
        """Take in a parameter that was never refreshed; returns its state."""
        self.refreshes[p], self.last[p], self.stretch[p] = 0, -1, 1
        return {key: torch.tensor(float(value)) for key, value in zip(self.KEYS, (0, -1, 1), strict=True)}

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

    def _due(self, p: Tensor, gap: int) -> int:
        return self.first(p) if self.last[p] < 0 else self.last[p] + gap * self.stretch[p]

    def load(self, p: Tensor, state: dict[str, Tensor]) -> None:
        """Take over what a loaded state says."""
        self.refreshes[p], self.last[p], self.stretch[p] = (int(state[key]) for key in self.KEYS)
