"""One sweep over a part of a parameter: read its moments, step the rule, write them back; eager, or compiled into one pass.

Eager, every operation of the sweep is a pass over memory of its own. torch.compile makes one of them all: each value is
read, decoded, stepped, encoded and written once. On a CPU codes are looked up before and written after it: a part at a
time, in cache, that takes less than decoding in a compiled loop.

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
from typing import Any, cast

import torch
from torch import Tensor

from subspan.optim.books import Bits, book_name, values_of
from subspan.optim.combine import LIMITED
from subspan.optim.feedback import KEYS
from subspan.optim.quant import BLOCK_SIZE, SIGNED, State, Store, encode, write_codes
from subspan.optim.refresh import Timetable
from subspan.optim.rules import Rule

OWN = ("step", *Timetable.KEYS, LIMITED, "basis", "basis.codes", "basis.scale", *KEYS)
"""State that is the optimizer's: no sweep touches it."""


def sweep(
    rule: Rule, store: Store, R: Tensor, state: State, step: Any, use: Tensor | None = None, spare: bool = False
) -> Tensor:
    """The direction U, fp32 or wider, of R's shape; brings the moments in `state`, kept as `store` says, forward by one step.

    step: 1 at the first update, or what the rule's `at` made of it.
    spare: nobody needs R any more, which may become U.
    """
    moments = store.load(state, R.shape)
    own = {key: X for key, X in moments.items() if key not in OWN}
    dtype = torch.promote_types(R.dtype, torch.float32)
    if _fuses(rule, R, own):
        U = R if spare and R.dtype == dtype else R.to(dtype, copy=True)
        tensors = {"": U, **own}
        if not U.is_contiguous():
            tensors = {key: X.mT for key, X in tensors.items()}
        rule.update_(tensors.pop(""), tensors, count_of(step), use)  # type: ignore[attr-defined]
    else:
        U = rule.update(R, moments, _at(rule, step, R), use)
    store.save(state, moments, use)
    return U


def _at(rule: Rule, step: Any, R: Tensor) -> Any:
    """What `Rule.update` wants for `step`."""
    if not isinstance(step, int):
        return step
    if hasattr(rule, "at"):
        return rule.at(step, torch.promote_types(R.dtype, torch.float32))
    return count_of(step)


def count_of(step: int) -> Tensor:
    """A count of steps as rules want it: 0-d, fp32, on the CPU whatever torch's defaults are."""
    return torch.tensor(float(step), dtype=torch.float32, device="cpu")


def _fuses(rule: Rule, R: Tensor, moments: State) -> bool:
    """Whether the rule's own kernel will do: see `Rule`."""
    tensors = R, *moments.values()
    return (
        not torch.compiler.is_compiling()
        and hasattr(rule, "fuses")
        and rule.fuses(moments)
        and all(X.dtype == torch.promote_types(R.dtype, torch.float32) for X in moments.values())
        and (all(X.is_contiguous() for X in tensors) or (R.ndim > 1 and all(X.mT.is_contiguous() for X in tensors)))
    )


def compiled_sweep(
    rule: Rule, store: Store, R: Tensor, state: State, step: Any, use: Tensor | None = None, spare: bool = False
) -> Tensor:
    """`sweep` in one pass. Equal up to the rounding of fused arithmetic, which may move a code to its neighbour.

    By the rule's own kernel where it has one (`Rule`). Eager, and said once, where torch.compile finds no compiler; eager
    for scalars, for parts whose codes do not lie in one piece (of a batch of matrices), and for rules that keep some moments in
    codes and some not.
    """
    moments = {key: X for key, X in state.items() if key not in OWN}
    coded = any(key.endswith(".codes") for key in moments)
    if R.ndim == 0 or (coded and not _in_one_piece(moments)) or (not coded and _fuses(rule, R, moments)):
        return sweep(rule, store, R, state, step, use, spare)
    if not coded:
        if R.is_contiguous() and all(X.is_contiguous() and X.shape == R.shape for X in moments.values()):
            flat = {key: X.view(-1) for key, X in moments.items()}  # one dimension is checked faster than two
            return _one_pass(None, rule, store, R.view(-1), flat, step, use).view(R.shape)
        return _one_pass(None, rule, store, R, moments, step, use)
    X = R.mT if store.transposed else R
    n, block = X.shape[-1], BLOCK_SIZE[store.bits]  # type: ignore[index]
    if n % block == 0 or n < block:
        U = _one_pass(min(n, block), rule, store, X.contiguous(), moments, step, use)
    else:
        directions = []
        for start, length in ((0, n - n % block), (n - n % block, n % block)):
            piece = {key: _columns(key, Y, start, length, store) for key, Y in moments.items()}
            copies = {key: Y.contiguous() for key, Y in piece.items()}
            x = X.narrow(-1, start, length).contiguous()
            directions.append(_one_pass(min(length, block), rule, store, x, copies, step, use))
            for key, Y in piece.items():
                Y.copy_(copies[key])
        U = torch.cat(directions, -1)
    return U.mT if store.transposed else U


def compiles(state: State) -> bool:
    """Whether `compiled_sweep` makes one pass of moments in codes, without temporaries of a part's size."""
    moments = {key: X for key, X in state.items() if key not in OWN}
    return _works and not torch._dynamo.config.disable and bool(moments) and _in_one_piece(moments)


def _in_one_piece(moments: State) -> bool:
    """Whether all of them are in codes, each of which lies in one piece."""
    return all(key.endswith((".codes", ".scale")) and X.is_contiguous() for key, X in moments.items())


def _columns(key: str, Y: Tensor, start: int, length: int, store: Store) -> Tensor:
    """What belongs to `length` values from `start` on, in codes or scales Y of rows of values."""
    bits = store.bits
    assert bits is not None
    if key.endswith(".codes"):
        return Y.narrow(-1, start * bits // 8, -(-length * bits // 8))
    block = BLOCK_SIZE[bits]
    return Y.narrow(-1, start // block, -(-length // block))


DECODED = {"cpu"}
"""Devices on which codes are read and written by torch's own kernels: there a look-up takes a third of the arithmetic that stands
in for it in a compiled loop, which converts bytes slowly, too."""

_works = True
_backend = "inductor"


def _one_pass(
    b: int | None, rule: Rule, store: Store, R: Tensor, moments: State, step: Any, use: Tensor | None
) -> Tensor:
    """`sweep`, compiled if that works. b: length of the blocks that R and its moments' codes, contiguous, consist of."""
    global _works
    if _works:
        try:
            decoded = b is not None and R.device.type in DECODED
            kind = (R.device, R.dtype, use is None)
            whole = _compile(cast("Hashable", rule), store.bits, b, decoded, kind)
            return whole(R, moments, _at(rule, step, R), use)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            _works = False
            reason = " ".join(str(error).split("\n\n")[0].split())
            warnings.warn(
                f"torch.compile does not work here, so steps are taken eagerly, and slower: {reason}", stacklevel=2
            )
    return sweep(rule, Store(store.bits), R, moments, step, use)


@functools.cache
def _compile(rule: Rule, bits: Bits | None, b: int | None, decoded: bool, kind: Hashable) -> Callable[..., Tensor]:
    """A compiled function of its own for each block length b, and one for all that is not in codes, for each `kind` of
    gradient. decoded: codes are read and written outside of the graph."""

    def whole(R: Tensor, state: State, step: Any, use: Tensor | None) -> Any:
        if decoded:
            return _step_decoded(rule, R, state, step, use, bits)  # type: ignore[arg-type]
        return sweep(rule, Store(bits), R, state, step, use)

    # torch allows eight graphs for each code object, and the code of all these functions is one object but for this line.
    whole.__code__ = whole.__code__.replace()
    dynamic = True if b is None else None
    compiled: Callable[..., Any] = torch.compile(whole, fullgraph=True, dynamic=dynamic, backend=_backend)
    if b is None or bits is None:
        return compiled
    width = {".codes": -(-b * bits // 8), ".scale": 1}
    marked = False

    def by_blocks(R: Tensor, state: State, step: Any, use: Tensor | None) -> Tensor:
        nonlocal marked
        blocks = {key: Y.view(-1, width[key[key.rindex(".") :]]) for key, Y in state.items()}
        inputs = {key: _decode(key, Y, bits, b) if decoded else Y for key, Y in blocks.items()}
        X = R.view(-1, b)
        if not marked:  # marks cost more than the sweep of a small part, and matter to the first call alone
            marked = True
            for Y in (X, *inputs.values()):
                torch._dynamo.maybe_mark_dynamic(Y, 0)
        result = compiled(X, inputs, step, use)
        if not decoded:
            return cast("Tensor", result).view(R.shape)
        U, codes = result
        for key, nearest in codes.items():
            write_codes(blocks[key], nearest, bits, use)
        return cast("Tensor", U).view(R.shape)

    return by_blocks


def _decode(key: str, Y: Tensor, bits: Bits, b: int) -> Tensor:
    """Of codes (rows, ...) of blocks of b values their values in the book, (rows, b), fp32; a scale as it is."""
    if key.endswith(".scale"):
        return Y
    return values_of(Y, book_name(bits, SIGNED[key.removesuffix(".codes")]))[:, :b].contiguous()


def _step_decoded(
    rule: Rule, R: Tensor, inputs: State, step: Any, use: Tensor | None, bits: Bits
) -> tuple[Tensor, State]:
    """`sweep` of blocks of values: R (rows, b), values in the book (rows, b) and scales (rows, 1), which are brought forward;
    U, and the new codes, int32, not packed."""
    names = [key.removesuffix(".codes") for key in inputs if key.endswith(".codes")]
    moments = {name: inputs[f"{name}.codes"] * inputs[f"{name}.scale"] for name in names}
    U = rule.update(R, moments, step, use)
    codes = {}
    for name in names:
        codes[f"{name}.codes"], absmax = encode(moments[name], book_name(bits, SIGNED[name]))
        scale = inputs[f"{name}.scale"]
        scale.copy_(absmax.unsqueeze(-1) if use is None else torch.where(use, absmax.unsqueeze(-1), scale))
    return U, codes
