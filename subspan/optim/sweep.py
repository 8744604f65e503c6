"""One sweep over a part of a parameter: read its moments, step the rule, write them back; eager, or compiled into one pass.

Eager, every operation of the sweep is a pass over memory of its own. torch.compile makes one of them all: each value is
read, decoded, stepped, encoded and written once.

What is compiled sees one canonical form, so that a model of many shapes needs few graphs. Moments in codes lie as (rows, n).
Where blocks of b values fill a row they are taken as (rows n / b, b), and the number of rows is dynamic: one graph for each
rule, block length and gradient dtype. What is left at the end of a row goes through a graph of its own, as (rows, rest), and all
of it by way of copies: a graph that fills up short blocks takes thirty times as long. Everything else is dynamic in all its
dimensions. The first step of each graph takes some seconds to half a minute; the next process finds it on disk.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from subspan.optim.quant import BLOCK_SIZE, State, Store
from subspan.optim.refresh import Timetable
from subspan.optim.rules import Rule

OWN = ("step", *Timetable.KEYS, "basis", "basis.codes", "basis.scale")
"""State that is the optimizer's: no sweep touches it."""


def sweep(rule: Rule, store: Store, R: Tensor, state: State, step: Any, use: Tensor | None = None) -> Tensor:
    """The direction U, fp32, of R's shape; brings the moments in `state`, kept as `store` says, forward by one step."""
    moments = store.load(state, R.shape)
    U = rule.update(R, moments, step, use)
    store.save(state, moments, use)
    return U


def compiled_sweep(rule: Rule, store: Store, R: Tensor, state: State, step: Any, use: Tensor | None = None) -> Tensor:
    """`sweep` in one pass. Equal up to the rounding of fused arithmetic, which may move a code to its neighbour.

    Eager, and said once, where torch.compile finds no compiler; eager for scalars, for parts whose codes do not lie in one piece
    (of a batch of matrices), and for rules that keep some moments in codes and some not.
    """
    moments = {key: X for key, X in state.items() if key not in OWN}
    coded = any(key.endswith(".codes") for key in moments)
    in_one_piece = all(key.endswith((".codes", ".scale")) and X.is_contiguous() for key, X in moments.items())
    if R.ndim == 0 or (coded and not in_one_piece):
        return sweep(rule, store, R, state, step, use)
    as_it_lies = replace(store, transposed=False)
    if not coded:
        return _one_pass(None, rule, as_it_lies, R, moments, step, use)
    X = R.mT if store.transposed else R
    directions = []
    for start, length, b in _whole_blocks_and_rest(X.shape[-1], BLOCK_SIZE[store.bits]):  # type: ignore[index]
        piece = {key: _columns(key, Y, start, length, store) for key, Y in moments.items()}
        flat = {key: Y.reshape(-1, Y.shape[-1] * b // length) for key, Y in piece.items()}
        x = X.narrow(-1, start, length).reshape(-1, b)
        for Y in (x, *flat.values()):
            torch._dynamo.maybe_mark_dynamic(Y, 0)
        directions.append(_one_pass(b, rule, as_it_lies, x, flat, step, use).view(*X.shape[:-1], length))
        for key, Y in piece.items():
            if not Y.is_contiguous():  # then `flat` is a copy
                Y.copy_(flat[key].view(Y.shape))
    U = directions[0] if len(directions) == 1 else torch.cat(directions, -1)
    return U.mT if store.transposed else U


def _whole_blocks_and_rest(n: int, block: int) -> list[tuple[int, int, int]]:
    """(start, length, length of a block) of the pieces of a row of n values."""
    whole = n // block * block
    pieces = [(0, whole, block), (whole, n - whole, n - whole)]
    return [piece for piece in pieces if piece[1]]


def _columns(key: str, Y: Tensor, start: int, length: int, store: Store) -> Tensor:
    """What belongs to `length` values from `start` on, in codes or scales Y of rows of values."""
    bits = store.bits
    assert bits is not None
    if key.endswith(".codes"):
        return Y.narrow(-1, start * bits // 8, -(-length * bits // 8))
    block = BLOCK_SIZE[bits]
    return Y.narrow(-1, start // block, -(-length // block))


_works = True
_backend = "inductor"


def _one_pass(
    b: int | None, rule: Rule, store: Store, R: Tensor, moments: State, step: Any, use: Tensor | None
) -> Tensor:
    """`sweep`, compiled if that works."""
    global _works
    if _works:
        try:
            return _compile(cast("Hashable", rule), store, b)(R, moments, step, use)
        except torch._dynamo.exc.TorchDynamoException as error:
            _works = False
            reason = " ".join(str(error).split("\n\n")[0].split())
            warnings.warn(
                f"torch.compile does not work here, so steps are taken eagerly, and slower: {reason}", stacklevel=2
            )
    return sweep(rule, store, R, moments, step, use)


@functools.cache
def _compile(rule: Rule, store: Store, b: int | None) -> Callable[..., Tensor]:
    """A compiled function of its own for each block length b; one for all that is not in codes."""

    def whole(R: Tensor, state: State, step: Any, use: Tensor | None) -> Tensor:
        return sweep(rule, store, R, state, step, use)

    # torch allows eight graphs for each code object, and the code of all these functions is one object but for this line.
    whole.__code__ = whole.__code__.replace()
    dynamic = True if b is None else None
    compiled: Callable[..., Tensor] = torch.compile(whole, fullgraph=True, dynamic=dynamic, backend=_backend)
    return compiled
