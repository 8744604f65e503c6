"""The basis of one parameter is replaced by the projector's for its gradient, and its moments follow.

When that is due, refresh.py knows; `ProjectedOptimizer` inherits it.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspan.optim.dtensors import local
from subspan.optim.groups import as_matrix
from subspan.optim.projectors import Projector, align, orient, overlap, seed_of
from subspan.optim.quant import SIGNED, write_basis
from subspan.optim.state import StatefulOptimizer
from subspan.optim.sweep import OWN

if TYPE_CHECKING:
    from subspan.optim.copies import Copies


class RefreshingOptimizer(StatefulOptimizer):
    """The refreshes of a `ProjectedOptimizer`."""

    projector: Projector
    copies: Copies | None
    refresh_seconds: float
    """Of the host; on a GPU with what it waits for."""

    def _refresh_basis(self, group: dict[str, Any], p: Tensor, G: Tensor) -> None:
        """p's basis <- the projector's basis for G, in place; untouched, and still due, if G is zero or not finite (looking at it
        is a sync)."""
        begin = time.perf_counter()
        if self.feedback is not None and self._timetable.refreshes[p]:
            self._follow(group, p, G)
            self.refresh_seconds += time.perf_counter() - begin
            return
        state, shards = self.state_here(p), self._shards[p]
        here = local(G)
        batch = shards if shards is not None and shards.axis == "batch" else None
        sharers = self.copies or shards
        most = _largest(as_matrix(here.contiguous(), group))
        if sharers is not None and batch is None:
            most = sharers.max(most)
        of_all = most.amax() if most.numel() else most.new_zeros(())
        largest = float(batch.max(of_all) if batch else of_all)
        if math.isfinite(largest) and largest > 0:
            G = as_matrix((here if batch else G).contiguous(), group)  # of a batch every process finds its own bases
            G = self.copies.spread(G) if self.copies else G
            rank = self.shapes(p)[0][-1]
            count = self._timetable.refreshes[p]
            old = self.basis(p)
            previous = old if count else None  # a random first basis knows nothing of the gradient
            side = self.side(p)
            seed = seed_of(self._seed(p, count + 1), batch.mine(batch.size)[0] if batch else 0)
            new = self.projector.basis(G, side, rank, previous, seed)
            if self.refresh.align:
                new = align(new, old)
            if most.ndim:  # an expert that saw no tokens keeps its basis
                new = torch.where((most > 0)[..., None, None], new, old.to(new.dtype))
            same = None
            if self.refresh.needs_overlap:
                overlaps, live = (
                    overlap(old, new),
                    most > 0,
                )  # a basis that was kept says nothing of how far others turned
                same = float(batch.mean(overlaps, live) if batch else overlaps[live].mean())
            if self._steps[p]:
                self._move_moments(group, p, new, old, same)
            write_basis(state, new)
            self._timetable.found(p, state, self._steps[p], self._gap(p), same if count else None)
        self.refresh_seconds += time.perf_counter() - begin

    def _follow(self, group: dict[str, Any], p: Tensor, G: Tensor) -> None:
        """`_refresh_basis` with a feedback, from the second on: without a host sync, since it may come at every step. Of a
        gradient that is not finite the basis stays until the next one is due."""
        assert self.feedback is not None
        state, (rule, store, _) = self.state_here(p), self.memory(group)
        A = orient(as_matrix(G.contiguous(), group), self.side(p))
        moments = store.load(state, self._shape_here(p))
        new, finite = self.feedback.follow(state, A, self.basis(p), moments, rule, self._steps[p])
        store.save(state, moments, finite)
        write_basis(state, new)
        self._timetable.found(p, state, self._steps[p], self._gap(p), None)

    def _move_moments(self, group: dict[str, Any], p: Tensor, new: Tensor, old: Tensor, same: float | None) -> None:
        """What becomes of moments in the basis `old` when `new` takes its place: see `Refresh`."""
        how, state = self.refresh.moments, self.state_here(p)
        if how in (None, "keep") or (self.refresh.gate is not None and same is not None and same <= self.refresh.gate):
            return
        rule, store, _ = self.memory(group)
        moments = store.load(state, self._shape_here(p))
        if how == "reset":
            for name in moments.keys() - set(OWN):
                moments[name].zero_()
            self._timetable.reset_at(p, state, self._steps[p])
        else:
            C = new.mT @ old.to(new.dtype)
            shards = self._shards[p]
            if shards is not None and shards.axis == "batch" and not moments.keys() & SIGNED.keys():
                C = shards.gather(C)  # Adafactor's rows and columns are whole on each process
            rule.transport(moments, C, self._steps[p])  # type: ignore[attr-defined]
        store.save(state, moments)


def _largest(X: Tensor) -> Tensor:
    """The largest absolute value of a matrix, 0-d, or of each of a batch; nan where there is one."""
    return X.new_zeros(X.shape[:-2]) if not X.numel() else torch.linalg.vector_norm(X, ord=math.inf, dim=(-2, -1))
