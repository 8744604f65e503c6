"""One update of one weight, part by part: what a step holds beside weight, gradient and state is a few parts, not a matrix.

A part is some columns of R (r, k), and so of orient(W) (d, k), or some rows of a dense weight: about 2^18 values on a CPU,
where products of that size run as fast as one of the whole matrix, and 2^22 elsewhere, where each part costs launches. For
every part:

    U = sweep(R, moments)             (r, c), sweep.py
    W <- keep W - size orient(Q U)    in W's own dtype by one in-place product, or in fp32 and rounded at random

Rules that need all of R at once (Adafactor) get all of it; then only the last line goes by parts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from subspan.optim.int8 import Int8Weight
from subspan.optim.marks import mark
from subspan.optim.projectors import Side, orient, project_back
from subspan.optim.quant import State, Store, stochastic_round
from subspan.optim.rules import Rule
from subspan.optim.sweep import compiled_sweep, sweep


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
    zero: Tensor,
    factor: Tensor | None = None,
    use: Tensor | None = None,
    generator: torch.Generator | None = None,
    compiled: bool = False,
) -> None:
    """W <- keep W - size orient(Q rule(R)), or keep W - size rule(R) for a dense W; `state` is brought forward by one step.

    W: weight, a matrix or a batch of matrices (..., m, n), of any shape if it is dense.
    count: of this step, 1 at the first update; state["step"] as the host knows it.
    R: low-rank gradient (..., r, k), with basis Q (..., d, r) of W's dtype on `side`; of a dense W (side, Q None) its gradient.
        It is changed in place: zero where `zero`, a bool tensor that broadcasts to it, says so, and times `factor`, 0-d.
    use: 0-d bool tensor on W's device. If it is False, and R zero, W and the moments stay as they are.
    generator: of the random bits with which bf16 and INT8 weights are rounded; None: bf16 is rounded to nearest.
    compiled: sweep in one pass, made by torch.compile, where the rule works by parts.
    """
    step = state["step"]
    if not works_by_parts(rule) or R.ndim == 0:
        with mark("rule"):
            U = rule.update(_clean(R, zero, factor), state, step, use)
        U, W = (U, W) if R.ndim else (U.view(1), W.view(1))
        for start, length in _parts(U, W, side):
            with mark("apply"):
                _move(W, U.narrow(_dim(side, U), start, length), start, side, Q, size, keep, use, generator)
        return
    at = rule.at(count, torch.promote_types(R.dtype, torch.float32)) if hasattr(rule, "at") else step
    whole = R.shape[_dim(side, R)]
    for start, length in _parts(R, W, side):
        with mark("rule"):
            part = state if length == whole else store.part(state, start, length)
            r = _clean(R.narrow(_dim(side, R), start, length), zero, factor)
            U = (compiled_sweep if compiled else sweep)(rule, store, r, part, at, use)
        with mark("apply"):
            _move(W, U, start, side, Q, size, keep, use, generator)


def _clean(R: Tensor, zero: Tensor, factor: Tensor | None) -> Tensor:
    if factor is not None:
        R.mul_(factor)  # nan, where the norm is: before the zeros
    return R.masked_fill_(zero, 0)


def parts_of(X: Tensor, dim: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """(start, length) of the parts along `dim` that X (1-d or more) is worked through in; starts are multiples of `multiple`."""
    whole = X.shape[dim]
    most = (2**18 if X.device.type == "cpu" else 2**22) * whole // max(X.numel(), 1)
    length = max(most // multiple * multiple, multiple)
    for start in range(0, whole, length):
        yield start, min(length, whole - start)


def works_by_parts(rule: Rule) -> bool:
    """Whether `rule` sees one element at a time: part by part, and with moments in few bits."""
    return getattr(rule, "elementwise", False)


def _parts(X: Tensor, W: Tensor, side: Side | None) -> Iterator[tuple[int, int]]:
    return parts_of(X, _dim(side, X), W.group_size if isinstance(W, Int8Weight) and side == "left" else 1)


def _dim(side: Side | None, X: Tensor) -> int:
    """Where a part is cut: columns of R and orient(W), rows of a dense gradient and weight."""
    return -1 if side is not None or X.ndim == 1 else -2


def _move(
    W: Tensor,
    U: Tensor,
    start: int,
    side: Side | None,
    Q: Tensor | None,
    size: float,
    keep: float,
    use: Tensor | None,
    generator: torch.Generator | None,
) -> None:
    """Apply U (..., r, c), the direction of c columns of orient(W) or rows of a dense W, from `start` on."""
    length = U.shape[_dim(side, U)]
    dim = _dim(side, U) if side is None else (-1 if side == "left" else -2)  # in W itself
    decay = keep if use is None else torch.where(use, torch.full((), keep, device=U.device), 1.0)
    if isinstance(W, Int8Weight) or (generator is not None and W.dtype == torch.bfloat16):
        D = U if Q is None or side is None else orient(project_back(U.to(W.dtype), Q), side)
        D = D if use is None else D * use
        if isinstance(W, Int8Weight):  # what does not change keeps its codes
            X = W.read_block(dim % 2, start, length)
            W.write_block(dim % 2, start, X.mul_(decay).sub_(D, alpha=size), generator)
        else:
            part = W.narrow(dim, start, length)
            part.copy_(stochastic_round(part.float().mul_(decay).sub_(D, alpha=size), generator=generator))
        return
    part = W.narrow(dim, start, length)
    if use is not None:
        part.mul_(decay)
        U, keep = U * use, 1.0
    if Q is None or side is None:
        if keep != 1:
            part.mul_(keep)
        part.sub_(U, alpha=size)
    else:
        part = orient(part, side)
        (part.addmm_ if part.ndim == 2 else part.baddbmm_)(Q, U.to(part.dtype), beta=keep, alpha=-size)
