"""One sweep over a part of a parameter: read its moments, step the rule, write them back; eager, or compiled into one pass.

Eager, every operation of the sweep is a pass over memory of its own. torch.compile makes one of them all: each value is
read, decoded, stepped, encoded and written once.

What is compiled sees one canonical form, so that a model of many shapes needs few graphs. Moments in codes lie as (rows, n);
where blocks of b values fill a row they are taken as (rows n / b, b), and the number of rows is dynamic: one graph for each
rule, block length and gradient dtype. Everything else is dynamic in all its dimensions. The first step of each graph takes
some seconds to half a minute; it is found again on disk by the next process.
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
    global _works
    moments = {key: X for key, X in state.items() if key not in OWN}
    coded = any(key.endswith(".codes") for key in moments)
    in_one_piece = all(key.endswith((".codes", ".scale")) and X.is_contiguous() for key, X in moments.items())
    if not _works or R.ndim == 0 or (coded and not in_one_piece):
        return sweep(rule, store, R, state, step, use)
    turned = coded and store.transposed
    X = (R.mT if turned else R).contiguous() if coded else R
    shape, b = X.shape, None
    if coded:
        n, block = shape[-1], BLOCK_SIZE[store.bits]  # type: ignore[index]
        b = block if n % block == 0 else n
        X, moments = X.view(-1, b), {key: Y.view(X.numel() // b, -1) for key, Y in moments.items()}
        for Y in (X, *moments.values()):
            torch._dynamo.maybe_mark_dynamic(Y, 0)
    try:
        U: Tensor = _compile(cast("Hashable", rule), replace(store, transposed=False), b)(X, moments, step, use)
    except torch._dynamo.exc.TorchDynamoException as error:
        _works = False
        reason = " ".join(str(error).split("\n\n")[0].split())
        warnings.warn(
            f"torch.compile does not work here, so steps are taken eagerly, and slower: {reason}", stacklevel=2
        )
        return sweep(rule, store, R, state, step, use)
    U = U.view(shape)
    return U.mT if turned else U


_works = True
_backend = "inductor"


@functools.cache
def _compile(rule: Rule, store: Store, b: int | None) -> Callable[..., Tensor]:
    """A compiled function of its own for each block length b; one for all that is not in codes."""

    def one_pass(R: Tensor, state: State, step: Any, use: Tensor | None) -> Tensor:
        return sweep(rule, store, R, state, step, use)

    # torch allows eight graphs for each code object, and the code of all these functions is one object but for this line.
    one_pass.__code__ = one_pass.__code__.replace()
    dynamic = True if b is None else None
    compiled: Callable[..., Tensor] = torch.compile(one_pass, fullgraph=True, dynamic=dynamic, backend=_backend)
    return compiled
