"""One update of one weight, part by part: what a step holds beside weight, gradient and state is a few parts, not a matrix.

A part is some rows of R as its moments lie, contiguous and about 2^18 values on a CPU, which stay in cache between two passes,
and 2^22 elsewhere, where each part costs launches (2^24 if compiled). First the rule, for every part, then the weight:

    R <- sweep(R, moments)            (r, k), sweep.py: the direction U takes R's place and dtype
    W <- keep W - size orient(Q R)    one product in place; by parts where W is rounded at random

A combine (combine.py) needs R and U, and the gradient: U gets a place of its own, and the weight moves by parts. The gradient of
a dense parameter stays as it is, so each part moves its rows of W at once. Rules that need all of R together (Adafactor) get all
of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from subspan.optim.combine import Combine
from subspan.optim.int8 import Int8Weight
from subspan.optim.marks import mark
from subspan.optim.norms import parts_of, row_norms
from subspan.optim.projectors import Side, orient, project_back
from subspan.optim.quant import SIGNED, State, Store, stochastic_round
from subspan.optim.rules import Muon, Rule
from subspan.optim.sweep import compiled_sweep, compiles, count_of, sweep

if TYPE_CHECKING:
    from subspan.optim.shards import Shards

WHOLE_NUMBERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""Of the same size."""


def update_weight(
    W: Tensor,
    R: Tensor,
    state: State,
    rule: Rule,
    store: Store,
    *,
    count: int,
    side: Side | None,
    Q: Tensor | None,
    size: float,
    keep: float,
    live: Tensor,
    factor: Tensor | None = None,
    use: Tensor | None = None,
    generator: torch.Generator | None = None,
    combine: Combine | None = None,
    gradient: Tensor | None = None,
    compiled: bool = False,
    shards: Shards | None = None,
) -> None:
    """W <- keep W - size orient(Q rule(R)), or keep W - size rule(R) for a dense W; `state` is brought forward by one step.

    W: weight, a matrix or a batch of matrices (..., m, n), of any shape if it is dense.
    count: of this step, 1 at the first update; state["step"] as the host knows it.
    R: low-rank gradient (..., r, k), with basis Q (..., d, r) of W's dtype on `side`; it is used up. Of a dense W (side, Q None)
        its gradient, which only loses what `live`, a bool tensor that broadcasts to R, says is to count as zero, and is
        multiplied by `factor`, 0-d.
    use: 0-d bool tensor on W's device. If it is False, and R zero, W and the moments stay as they are.
    generator: of the random bits with which bf16 and INT8 weights are rounded; None: bf16 is rounded to nearest.
    combine: what becomes of the rest of W's `gradient` (as W is: (..., m, n)); None: it is left out, and not needed.
    compiled: sweep in one pass, made by torch.compile, where the rule works by parts.
    shards: W is one part of a matrix, and R, moments and gradient are its parts (shards.py); Q has the rows that it needs.
    """
    move = functools.partial(_move, W, side=side, Q=Q, size=size, keep=keep, use=use, generator=generator)
    direction = R if combine is None or not R.numel() else None
    if not works_by_parts(rule) or R.ndim == 0:
        with mark("rule"):
            moments = store.load(state, R.shape)
            U = _update_whole(rule, shards, _clean(R, live, factor), moments, count_of(count), use)
            store.save(state, moments, use)
            direction = U if use is None else torch.where(use, U, 0)  # of a state of zeros it may be nan
    else:
        dim = store.dim(state, R)
        whole = R.shape[dim]
        for start, length in parts_of(R, dim, compiled=compiled and compiles(state)):
            with mark("rule"):
                r, lives, part = R, live, state
                if length < whole:
                    part = store.part(state, start, length)
                    r, lives = R.narrow(dim, start, length), _rows(live, dim, start, length)
                _clean(r, lives, factor)
                spare = side is not None and combine is None
                U = (compiled_sweep if compiled else sweep)(rule, store, r, part, count, use, spare)
                U = U if use is None else torch.where(use, U, 0)
            if side is None:
                with mark("apply"):
                    move(U, start)
            elif length == whole:
                direction = U
            elif U is not r or combine is not None:
                direction = torch.empty_like(R) if direction is None else direction
                direction.narrow(dim, start, length).copy_(U)
        if side is None:
            return
    with mark("apply"):
        assert direction is not None
        if shards is not None and shards.axis == "d":
            direction, R = shards.gather(direction), R if combine is None else shards.gather(R)
        if combine is None or Q is None or side is None:
            move(direction)
        else:
            assert gradient is not None
            A = orient(gradient, side)
            move(direction, lift=_combined(combine, Q, A, R, direction, factor, state, use, shards), whole=A)


def _combined(
    combine: Combine,
    Q: Tensor,
    A: Tensor,
    R: Tensor,
    U: Tensor,
    factor: Tensor | None,
    state: State,
    use: Tensor | None,
    shards: Shards | None,
) -> Callable[[int, int], Tensor]:
    """What makes columns `start` to `start + length` of D."""
    a, r, u = (row_norms(X.mT) for X in (A, R, U))
    d = Q.shape[-2]
    if shards is not None and shards.axis == "d":
        a, d = shards.norm(a), shards.rows
    joined = shards if shards is not None and shards.axis != "d" else None
    if joined is not None:
        a, r, u = (joined.gather(x) for x in (a, r, u))
    finite = torch.linalg.vector_norm(a) < math.inf
    a = a if factor is None else a * factor
    weights = combine.weights(a, r, u, (d, Q.shape[-1]), state, use)
    if joined is not None and weights is not None:
        weights = joined.part(weights)

    def lift(start: int, length: int) -> Tensor:
        G = A.narrow(-1, start, length)
        G = (G.view(WHOLE_NUMBERS[G.dtype]) * finite).view(G.dtype)
        G = G if factor is None else G.mul_(factor)
        w = None if weights is None else weights.narrow(-1, start, length)
        return combine.direction(Q, G, R.narrow(-1, start, length), U.narrow(-1, start, length), w)

    return lift


def _update_whole(
    rule: Rule, shards: Shards | None, R: Tensor, moments: State, step: Tensor, use: Tensor | None
) -> Tensor:
    """`rule.update` of a rule that sees a whole matrix: of which R, and the moments that are large, are parts, if `shards`."""
    if shards is None:
        return rule.update(R, moments, step, use)
    if isinstance(rule, Muon):
        return rule.update(R, moments, step, use, shards)
    parts = [name for name in moments if name in SIGNED]
    gathered = {**moments, **{name: shards.gather(moments[name]) for name in parts}}
    U = rule.update(shards.gather(R), gathered, step, use)
    for name in parts:
        moments[name].copy_(shards.part(gathered[name]))
    return shards.part(U)


def _clean(R: Tensor, live: Tensor, factor: Tensor | None) -> Tensor:
    if factor is not None:
        R.mul_(factor)  # nan, where the norm is: before the zeros
    # By its bits, since 0 nan is nan; masked_fill_ takes five times as long on a CPU.
    R.view(WHOLE_NUMBERS[R.dtype]).mul_(live)
    return R


def _rows(live: Tensor, dim: int, start: int, length: int) -> Tensor:
    """What belongs to some rows of R: `live` itself if they share it."""
    shared = live.ndim < -dim or live.shape[dim] == 1
    return live if shared else live.narrow(dim, start, length)


def works_by_parts(rule: Rule) -> bool:
    """Whether `rule` sees one element at a time, and so may see them part by part."""
    return getattr(rule, "elementwise", False)


def stores_in_few_bits(rule: Rule) -> bool:
    """Whether `rule` has moments for codes, or none at all: Adafactor's are small and stay as they are."""
    moments = rule.init(torch.empty(1, 1, device="meta"))
    return not moments or any(name in SIGNED for name in moments)


def _move(
    W: Tensor,
    U: Tensor,
    first: int = 0,
    *,
    side: Side | None,
    Q: Tensor | None,
    size: float,
    keep: float,
    use: Tensor | None,
    generator: torch.Generator | None,
    lift: Callable[[int, int], Tensor] | None = None,
    whole: Tensor | None = None,
) -> None:
    """W <- keep W - size orient(Q U), or keep W - size U of a dense W, of some of its rows from `first` on. U is zero, and W
    stays as it is, where `use` is False. lift: makes columns of D (d, k), of the shape of `whole`, instead of Q U."""
    decay = keep if use is None else torch.where(use, torch.full((), keep, device=U.device), 1.0)
    rounded = isinstance(W, Int8Weight) or (generator is not None and W.dtype == torch.bfloat16)
    if Q is not None and side is not None and lift is None and not rounded:
        A = orient(W, side)
        if use is not None and keep != 1:
            A.mul_(decay)
            keep = 1.0
        (A.addmm_ if A.ndim == 2 else A.baddbmm_)(Q, U.to(A.dtype), beta=keep, alpha=-size)
        return
    # Some columns of orient(W), some rows of a dense W: an fp32 copy, or one of the product, is of a part.
    W, U = (W, U) if U.ndim else (W.view(1), U.view(1))
    dim = -1 if side is not None or U.ndim == 1 else -2
    dim_W = -2 if side == "right" else dim
    multiple = W.group_size if isinstance(W, Int8Weight) and side == "left" else 1
    for start, length in parts_of(U if whole is None else whole, dim, multiple):
        if Q is None or side is None:
            D = U.narrow(dim, start, length)
        elif lift is None:
            D = orient(project_back(U.narrow(dim, start, length).to(W.dtype), Q), side)
        else:
            D = orient(lift(start, length), side)
        start += first
        if isinstance(W, Int8Weight):
            X = W.read_block(dim_W % 2, start, length)
            W.write_block(dim_W % 2, start, X.mul_(decay).sub_(D, alpha=size), generator)  # what stays keeps its codes
            continue
        part = W.narrow(dim_W, start, length)
        if rounded:
            part.copy_(stochastic_round(part.float().mul_(decay).sub_(D, alpha=size), generator=generator))
        else:
            (part if keep == 1 else part.mul_(decay)).sub_(D, alpha=size)
