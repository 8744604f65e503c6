"""How to keep weights: eight bits a value, group by group, in a tensor that layers and optimizers take for a floating one.

A group of g = `group_size` neighbours along a row of W (m, n) shares one scale (INT8 weights of Q-GaLore, arXiv 2407.08296):

    scale >= max_group |W| / 127,      code in -127..127,      W ~ code scale,      0 is code 0

`from_float` takes the nearest code. An update of a weight is mostly smaller than half a scale, and the nearest code would
lose it: `write_block` rounds up or down at random, so that the mean is exact (stochastic rounding, as there).

The scale is bfloat16, rounded up. A code has 7 bits and such a scale 8: their product is exact in fp32, and rounded once in a
narrower dtype. A group keeps its scale while its largest value fits it, so that values that did not change stay on their
codes: a block that is read and written back is the same, bit for bit. A fresh scale at every step would round every value of
the group anew, and the noise of that adds up (docs/LOG.md).

Nothing makes a floating tensor of W's size, except `dequantize` and the gradient, which is a plain tensor of W's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

GROUP_SIZE = 256
"""Values to a scale, as arXiv 2407.08296 has it: the scales take 0.8 % of the codes."""

KEEP = 0.875
"""A group gets a smaller scale when its largest value has fallen below this share of what the old one reaches."""

_LARGEST = 127
_ALIGN = 16
"""Blocks of rows are multiples of this where they can be: what matrix units work in."""


class Int8Weight(Tensor):
    """A matrix (m, n) in codes (m, n) int8 and scale (m, ceil(n/g)) bfloat16; the last group of a row may be short.

    To everything else it is a tensor of a floating `dtype`: `nn.Parameter(Int8Weight.from_float(W))` is trained like any other
    parameter, and its `grad` is a plain tensor. It can be the weight of F.linear, F.embedding and torch.addmm(bias, X, W)
    (GPT-2's Conv1D), under autocast, activation checkpointing and torch.compile too. It can be detached, cloned, copied
    (deepcopy), moved, saved (torch.load with weights_only=True), and filled: by `copy_`, as load_state_dict does, from a
    floating tensor or its own kind, and by normal_, uniform_, fill_ and zero_, as torch.nn.init does. Tensors made like it
    (`torch.zeros_like`) are plain. Every other operation raises ValueError. A backward pass cannot be differentiated again.
    """

    codes: Tensor
    scale: Tensor
    group_size: int

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, group_size: int, dtype: torch.dtype) -> Int8Weight:
        weight: Int8Weight = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)
        return weight

    def __init__(self, codes: Tensor, scale: Tensor, group_size: int, dtype: torch.dtype) -> None:
        self.codes, self.scale, self.group_size = codes, scale, group_size

    @classmethod
    def from_float(cls, W: Tensor, group_size: int = GROUP_SIZE, dtype: torch.dtype | None = None) -> Int8Weight:
        """The nearest codes of W (m, n), any floating dtype, on its device: |W - read| <= scale / 2.

        dtype: what the result looks like; None: W's. A group with a nan or inf, and no other, reads back as nan or inf.
        Raises ValueError: W is no floating matrix, group_size below 1, dtype not floating.
        """
        if W.ndim != 2 or not W.is_floating_point():
            raise ValueError(
                f"W of shape {tuple(W.shape)} and dtype {W.dtype} is no floating matrix: leave it as it is"
            )
        if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
            raise ValueError(f"group_size={group_size!r} must be a whole number of at least 1: {GROUP_SIZE} is usual")
        weight = _empty(W.shape, group_size, _floating(dtype or W.dtype), W.device)
        weight._fill(functools.partial(W.detach().narrow, 0))
        return weight

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """All of it, (m, n), as a plain tensor of `dtype` (None: its own), without a graph. The one temporary is a block."""
        X = torch.empty(self.shape, dtype=_floating(dtype or self.dtype), device=self.codes.device)
        for start, length in self.blocks(0):
            X.narrow(0, start, length).copy_(self._decode(0, start, length, X.dtype))
        return X

    # ------------------------------------------------------------------------------------------ block by block

    def blocks(self, dim: int) -> Iterator[tuple[int, int]]:
        """(start, length) of blocks that cover the rows (dim 0) or columns (dim 1, whole groups): small beside a large W, and
        large enough for fast products, about 2^20 values on a CPU and 2^24 elsewhere."""
        size, other = self.shape[dim], max(1, self.shape[1 - dim])
        most = {"cpu": 2**20, "meta": 2**62}.get(self.device.type, 2**24)
        unit = self.group_size if dim else _ALIGN
        step = max(1, most // (other * unit)) * unit
        return ((start, min(step, size - start)) for start in range(0, size, step))

    @torch.no_grad()
    def read_block(self, dim: int, start: int, length: int) -> Tensor:
        """Rows (dim 0) or columns (dim 1) start ... start + length - 1 in fp32, exactly what is stored: a new tensor.

        Raises ValueError: not inside W; columns that are not whole groups.
        """
        return self._decode(dim, start, length, torch.float32)

    @torch.no_grad()
    def write_block(self, dim: int, start: int, X: Tensor, generator: torch.Generator | None = None) -> None:
        """Store X, fp32 (length, n) for dim 0 or (m, length) for dim 1, rounded at random so that the mean of it is X.

        A scale changes when its group's largest value no longer fits it, or has fallen below 7/8 of what it reaches.
        generator: on W's device; None: torch's default. X must be finite: a group with a nan or inf reads back as such
        throughout. X itself stays as it is; temporaries are three times its size.

        Raises ValueError: as `read_block`, and for an X of another shape or dtype.
        """
        codes, scale = self._part(dim, start, X.shape[dim] if X.ndim == 2 else -1)
        if X.shape != codes.shape or X.dtype != torch.float32:
            raise ValueError(
                f"X of shape {tuple(X.shape)} and dtype {X.dtype} does not fit dim={dim!r} of {tuple(self.shape)}: "
                f"pass float32 of shape {('length', self.shape[1]) if dim == 0 else (self.shape[0], 'length')}"
            )
        _encode(X, codes, scale, self.group_size, functools.partial(_round_at_random, generator=generator), keep=True)
        torch.autograd.graph.increment_version(self)  # a backward pass that still needs the old values says so

    def _part(self, dim: int, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Views of the codes and scales of some rows or columns."""
        if dim not in (0, 1) or start < 0 or length < 0 or start + length > self.shape[dim]:
            raise ValueError(
                f"dim={dim!r}, start={start!r} and length={length!r} are not inside {tuple(self.shape)}: use blocks(dim)"
            )
        if dim == 0:
            return self.codes.narrow(0, start, length), self.scale.narrow(0, start, length)
        g, end = self.group_size, start + length
        if start % g or (end % g and end != self.shape[1]):
            raise ValueError(
                f"columns {start} to {end} of {self.shape[1]} cut a group: start and end at multiples of group_size={g}, "
                "or use blocks(1)"
            )
        return self.codes.narrow(1, start, length), self.scale.narrow(1, start // g, -(-length // g))

    def _decode(self, dim: int, start: int, length: int, dtype: torch.dtype) -> Tensor:
        return _decode(*self._part(dim, start, length), self.group_size, dtype)

    def _fill(self, rows: Callable[[int, int], Tensor]) -> None:
        """Store the nearest codes of all rows. rows: (start, length) -> those rows, of any floating dtype."""
        for start, length in self.blocks(0):
            codes, scale = self._part(0, start, length)
            X = rows(start, length).to(scale.device, torch.float32)
            _encode(X, codes, scale, self.group_size, Tensor.round_, keep=False)

    # ------------------------------------------------------------------------------------- what torch asks for

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, group_size={self.group_size}, "
            f"device={str(self.device)!r}, requires_grad={self.requires_grad})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, torch.dtype]]:
        return ["codes", "scale"], (self.group_size, self.dtype)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[int, torch.dtype], outer_size: Any, outer_stride: Any
    ) -> Int8Weight:
        return cls(inner["codes"], inner["scale"], *context)

    def _stable_hash_for_caching(self) -> str:
        """What torch.compile's cache on disk tells weights apart by."""
        return repr((self.shape, self.dtype, self.group_size, self.device, self.requires_grad))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FUNCTIONS:
            return _FUNCTIONS[func](*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # torch's own would make results of this class
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func not in _OPERATIONS:
            raise _unsupported(str(func))
        return _OPERATIONS[func](*args, **(kwargs or {}))


def stored_tensors(p: Tensor) -> list[Tensor]:
    """The plain tensors that hold p: codes and scale of an `Int8Weight`, else p itself. Their bytes are p's true bytes."""
    return [p.codes, p.scale] if isinstance(p, Int8Weight) else [p]


def quantize_weights(model: nn.Module, names: Iterable[str], group_size: int = GROUP_SIZE) -> None:
    """Make each named parameter of `model`, a weight of Linear, Embedding or Conv1D modules, an `Int8Weight`, in place.

    One by one, each floating weight being freed before the next is touched. A weight that several modules share stays shared.
    Call it before an optimizer is built: the parameters are new objects, without grad or hooks.

    Raises ValueError: a name that `model.named_parameters()` has not, a parameter that is no floating matrix.
    """
    for name in names:
        _quantize(model, name, group_size)


def _quantize(model: nn.Module, name: str, group_size: int) -> None:
    path, _, key = name.rpartition(".")
    try:
        old = model.get_submodule(path)._parameters[key]
    except (AttributeError, KeyError):
        old = None
    if old is None:
        raise ValueError(f"names: {name!r} is no parameter of the model: use names of model.named_parameters()")
    if isinstance(old, Int8Weight):
        return
    new = nn.Parameter(Int8Weight.from_float(old, group_size), requires_grad=old.requires_grad)
    for module in model.modules():
        for own, p in module._parameters.items():
            if p is old:
                module._parameters[own] = new


# ---------------------------------------------------------------------------------------------- codes and scales


def _groups(X: Tensor, scale: Tensor, g: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views (rows, groups, g) of X and (rows, groups, 1) of its scales: the whole groups, then the short last ones."""
    whole, rest = divmod(X.shape[1], g)
    if whole:
        yield X.narrow(1, 0, whole * g).view(-1, whole, g), scale.narrow(1, 0, whole).unsqueeze(-1)
    if rest:
        yield X.narrow(1, whole * g, rest).unsqueeze(1), scale.narrow(1, whole, 1).unsqueeze(-1)


def _decode(codes: Tensor, scale: Tensor, g: int, dtype: torch.dtype) -> Tensor:
    """A new tensor, rounded to `dtype` once."""
    X = codes.to(dtype)
    for x, s in _groups(X, scale, g):
        x.mul_(s)
    return X


def _encode(X: Tensor, codes: Tensor, scale: Tensor, g: int, round_: Callable[[Tensor], Tensor], keep: bool) -> None:
    """Fill codes and scale from X (rows, columns) fp32. round_: to whole numbers, in place. keep: a scale that still fits."""
    for (x, s), (c, _) in zip(_groups(X, scale, g), _groups(codes, scale, g), strict=True):
        least = x.abs().amax(-1, keepdim=True) / _LARGEST
        fresh = least.bfloat16()
        above = (fresh.view(torch.int16) + 1).view(torch.bfloat16)  # the next one that bfloat16 has
        fresh = torch.where(fresh < least, above, fresh)
        if keep:
            fresh = torch.where((least <= s) & (least >= KEEP * s), s, fresh)
        s.copy_(fresh)
        numbers = x / torch.where(fresh > 0, fresh, 1.0)  # of a group of zeros, and of one with a nan
        c.copy_(round_(numbers).clamp_(-_LARGEST, _LARGEST))


def _round_at_random(X: Tensor, generator: torch.Generator | None) -> Tensor:
    """X, in place, to one of the two whole numbers beside it, up as often as its fraction says, to 2^-16; whole numbers stay.

    |X| < 2^8: then X + u is exact for a whole X and u = 0, 2^-16, ..., 1 - 2^-16, and rounding down leaves X.
    """
    # One draw of 64 bits for four numbers: torch draws numbers one by one, which took three times as long.
    words = torch.empty(-(-X.numel() // 4), dtype=torch.int64, device=X.device)
    words.random_(-(2**63), None, generator=generator)
    noise = words.view(torch.int16)[: X.numel()].view(X.shape)
    return X.add_(noise, alpha=2**-16).add_(0.5).floor_()


# ----------------------------------------------------------------------------- functions that take it as a weight


class _Product(torch.autograd.Function):
    """X W^T + bias (transposed) or X W + bias, for X of two dimensions."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, W: Int8Weight, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.save_for_backward(X, W)
        ctx.transposed = transposed
        return _multiply(X, W, bias, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        X, W = ctx.saved_tensors
        for_X, for_W, for_bias, _ = ctx.needs_input_grad
        dX = _multiply(dY, W, None, not ctx.transposed) if for_X else None
        dW = (dY.T @ X if ctx.transposed else X.T @ dY).to(W.dtype) if for_W else None
        return dX, dW, dY.sum(0) if for_bias else None, None


def _multiply(X: Tensor, W: Int8Weight, bias: Tensor | None, transposed: bool) -> Tensor:
    """Block by block of what becomes columns of the result, so that no sum is cut into parts."""
    dim = 0 if transposed else 1
    shape = (X.shape[0], W.shape[dim])
    Y = X.new_empty(shape) if bias is None else bias.expand(shape).clone(memory_format=torch.contiguous_format)
    for start, length in W.blocks(dim):
        block = W._decode(dim, start, length, X.dtype)
        Y.narrow(1, start, length).addmm_(X, block.T if transposed else block, beta=0 if bias is None else 1)
    return Y


class _Lookup(torch.autograd.Function):
    """Rows of W by number."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, W: Int8Weight, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.settings = W.shape[0], padding_idx, scale_grad_by_freq
        rows = tokens.flatten()
        X = _decode(W.codes.index_select(0, rows), W.scale.index_select(0, rows), W.group_size, W.dtype)
        return X.view(*tokens.shape, W.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[None, Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        return None, torch.ops.aten.embedding_dense_backward(dY, tokens, *ctx.settings), None, None


def _product(X: Tensor, W: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """`_Product` for X of any leading dimensions, in the dtype that autocast asks for."""
    if not isinstance(W, Int8Weight) or isinstance(X, Int8Weight):
        raise _unsupported("a product with it on the left")
    if torch.amp.is_autocast_available(X.device.type) and torch.is_autocast_enabled(X.device.type):
        dtype = torch.get_autocast_dtype(X.device.type)
        X, bias = X.to(dtype), None if bias is None else bias.to(dtype)
    elif X.dtype != W.dtype:
        raise ValueError(
            f"an input of {X.dtype} meets an Int8Weight of {W.dtype}: cast the input, or use torch.autocast"
        )
    Y: Tensor = _Product.apply(X.reshape(-1, X.shape[-1]), W, bias, transposed)  # type: ignore[no-untyped-call]
    return Y.view(*X.shape[:-1], Y.shape[-1])


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _product(input, weight, bias, True)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if input.ndim != 1 or beta != 1 or alpha != 1:
        raise _unsupported("torch.addmm other than bias + X W")
    return _product(mat1, mat2, input, False)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or sparse:
        raise _unsupported("F.embedding with max_norm or sparse=True")
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    X: Tensor = _Lookup.apply(input, weight, padding, scale_grad_by_freq)  # type: ignore[no-untyped-call]
    return X


def _set_data(W: Tensor, new: Tensor) -> None:
    """W.data = new. torch would change the outside only, and the codes would stay."""
    if not isinstance(W, Int8Weight) or not isinstance(new, Int8Weight) or _outside(W) != _outside(new):
        raise ValueError(
            f"data of an Int8Weight cannot become {type(new).__name__} {_outside(new)} where it is {_outside(W)}: "
            "use copy_(), or make a new parameter"
        )
    W.codes, W.scale, W.group_size = new.codes, new.scale, new.group_size
    torch.autograd.graph.increment_version(W)


def _outside(X: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    return tuple(X.shape), X.dtype, X.device


def _share_memory(W: Int8Weight) -> Int8Weight:
    for part in (W.codes, W.scale):
        part.share_memory_()  # type: ignore[no-untyped-call]
    return W


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    nn.functional.linear: _linear,
    nn.functional.embedding: _embedding,
    torch.addmm: _addmm,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.share_memory_: _share_memory,
}


# ------------------------------------------------------------------------- operations that keep, move or fill it


def _share(W: Int8Weight) -> Int8Weight:
    return Int8Weight(W.codes, W.scale, W.group_size, W.dtype)


def _clone(W: Int8Weight, *, memory_format: torch.memory_format | None = None) -> Int8Weight:
    return Int8Weight(W.codes.clone(), W.scale.clone(), W.group_size, W.dtype)


def _to_copy(
    W: Int8Weight,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **others: Any,
) -> Int8Weight:
    dtype = _floating(dtype or W.dtype)
    codes, scale = (X.to(device or X.device, copy=True, non_blocking=non_blocking) for X in (W.codes, W.scale))
    return Int8Weight(codes, scale, W.group_size, dtype)


def _empty_like(
    W: Int8Weight, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **others: Any
) -> Int8Weight:
    """Of its kind, so that Module.to_empty is."""
    return _empty(W.shape, W.group_size, _floating(dtype or W.dtype), device or W.device)


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """to.copy_(source), where at least one of the two is an Int8Weight."""
    if to.shape != source.shape:
        raise ValueError(
            f"source of shape {tuple(source.shape)} cannot fill an Int8Weight's {tuple(to.shape)}: make them equal"
        )
    if isinstance(to, Int8Weight) and isinstance(source, Int8Weight) and to.group_size == source.group_size:
        to.codes.copy_(source.codes)
        to.scale.copy_(source.scale)
    elif isinstance(to, Int8Weight):
        to._fill(functools.partial(source.read_block if isinstance(source, Int8Weight) else source.narrow, 0))
    elif isinstance(source, Int8Weight):
        for start, length in source.blocks(0):
            to.narrow(0, start, length).copy_(source._decode(0, start, length, to.dtype))
    return to


def _plain(func: Any) -> Callable[..., Tensor]:
    """`func`, such as zeros_like, of a plain tensor that looks like W."""

    def make(W: Int8Weight, *args: Any, device: torch.device | None = None, **kwargs: Any) -> Tensor:
        template = torch.empty(W.shape, dtype=W.dtype, device="meta")
        made: Tensor = func(template, *args, device=device or W.device, **kwargs)
        return made

    return make


def _initial(func: Any) -> Callable[..., Int8Weight]:
    """`func`, such as normal_: what it puts into a plain tensor of W's dtype, on a CPU from the same random bits."""

    def fill(W: Int8Weight, *args: Any, **kwargs: Any) -> Int8Weight:
        def rows(start: int, length: int) -> Tensor:
            X: Tensor = func(torch.empty(length, W.shape[1], dtype=W.dtype, device=W.device), *args, **kwargs)
            return X

        W._fill(rows)
        return W

    return fill


def _empty(shape: torch.Size, group_size: int, dtype: torch.dtype, device: torch.device) -> Int8Weight:
    m, n = shape
    codes = torch.empty(m, n, dtype=torch.int8, device=device)
    scale = torch.empty(m, -(-n // group_size), dtype=torch.bfloat16, device=device)
    return Int8Weight(codes, scale, group_size, dtype)


def _floating(dtype: torch.dtype) -> torch.dtype:
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not floating: use torch.bfloat16 or torch.float32, and codes for the int8")
    return dtype


def _unsupported(what: str) -> ValueError:
    return ValueError(
        f"{what} is not supported for an Int8Weight: use its dequantize(), change it by read_block() and write_block(), or leave "
        "this weight out of the int8 ones"
    )


_aten = torch.ops.aten

_OPERATIONS: dict[Any, Callable[..., Tensor]] = {
    _aten.detach.default: _share,
    _aten.alias.default: _share,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.empty_like.default: _empty_like,
    _aten.copy_.default: _copy,
    **{
        func: _initial(func)
        for func in (_aten.normal_.default, _aten.uniform_.default, _aten.fill_.Scalar, _aten.zero_.default)
    },
    **{
        func: _plain(func)
        for func in (
            _aten.zeros_like.default,
            _aten.ones_like.default,
            _aten.full_like.default,
            _aten.rand_like.default,
            _aten.randn_like.default,
            _aten.new_empty.default,
            _aten.new_zeros.default,
            _aten.new_ones.default,
            _aten.new_full.default,
        )
    },
}

torch.serialization.add_safe_globals([Int8Weight])  # for torch.load(weights_only=True)
