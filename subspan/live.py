"""Bytes alive, operation by operation, also of tensors that hold no memory: the instrument of the planner.

torch's own MemTracker (torch.distributed._tools.mem_tracker) works the same way; docs/LOG.md says why it is not used.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from subspan.optim.dtensors import local

Kind = Literal["kept", "gradients", "activations", "temporaries"]

aten = torch.ops.aten
_GROUPED = aten._grouped_mm.default


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that are alive, by kind, after every operation that runs inside it; enter it inside FakeTensorMode.

    A storage counts once, from the operation that returns it until it is freed, however many views look at it. What an
    operation needs beside its results, and frees before it returns, no mode can see: `workspace` has it by formula.

    kept: tensors that are alive before and after (weights, optimizer state); whoever plans counts them by themselves.
    kind: what storages made from now on are; assign to it.
    now: bytes of gradients, activations and temporaries that are alive; peak: the most so far; assign to it to start again.
    series: (activations, temporaries) after every operation, its workspace among the temporaries.

    Code that looks at a value, as in float(norm) or bool(finite), sees 1: fake tensors have none, and 1 is finite and not zero.
    """

    def __init__(self, kept: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: dict[Kind, int] = {"kept": 0, "gradients": 0, "activations": 0, "temporaries": 0}
        self.series: list[tuple[int, int]] = []
        self.peak = 0
        self._known = WeakIdKeyDictionary()
        self._undo = contextlib.ExitStack()
        self.kind: Kind = "kept"
        for X in kept:
            self._add(X)
        self.kind = "temporaries"

    @property
    def now(self) -> int:
        return self.bytes["gradients"] + self.bytes["activations"] + self.bytes["temporaries"]

    def mark(self, X: Tensor, kind: Kind) -> None:
        """From now on what X keeps alive is of another kind."""
        for plain in plain_tensors(X):
            entry = self._known[plain.untyped_storage()][0]
            self.bytes[entry[0]] -= entry[1]
            self.bytes[kind] += entry[1]
            entry[0] = kind

    def _add(self, X: Tensor) -> None:
        for plain in plain_tensors(X):
            storage = plain.untyped_storage()
            if storage not in self._known:
                self._register(storage, self.kind)

    def _register(self, storage: torch.UntypedStorage, kind: Kind) -> None:
        entry: list[Any] = [kind, storage.nbytes()]
        self._known[storage] = (entry, weakref.ref(storage, functools.partial(self._free, entry)))
        self.bytes[kind] += entry[1]

    def _free(self, entry: list[Any], _: object) -> None:
        self.bytes[entry[0]] -= entry[1]

    def __enter__(self) -> LiveBytes:
        # FSDP2 frees and makes its buffers by resizing storages, which is no operation. torch's MemTracker does the same.
        resize = torch.UntypedStorage.resize_

        @functools.wraps(resize)
        def watched(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._resized(storage)
            return result

        setattr(torch.UntypedStorage, "resize_", watched)  # noqa: B010
        self._undo.callback(setattr, torch.UntypedStorage, "resize_", resize)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        self._undo.close()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """Whatever it was, it is a temporary from now on: weights that FSDP2 gathers, say."""
        if storage in self._known:
            entry = self._known[storage][0]
            self.bytes[entry[0]] -= entry[1]
            entry[:] = "temporaries", storage.nbytes()
            self.bytes["temporaries"] += entry[1]
        else:
            self._register(storage, "temporaries")
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(cls not in (Tensor, nn.Parameter, FakeTensor) for cls in types):
            return NotImplemented  # a subclass says which plain operations it consists of, and those come back here
        if func is aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        result = _grouped(func, args, kwargs or {}) if func is _GROUPED else func(*args, **(kwargs or {}))
        for X in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(X, Tensor):
                self._add(X)
        extra = workspace(func, args, kwargs or {}, result)
        self.series.append((self.bytes["activations"], self.bytes["temporaries"] + extra))
        self.peak = max(self.peak, self.now + extra)
        return result


def _grouped(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The products of a mixture of experts. torch's meta kernel of them wants bf16, its other kernels do not."""
    narrow = [X.bfloat16() if isinstance(X, Tensor) and X.is_floating_point() else X for X in args]
    return func(*narrow, **kwargs).to(args[0].dtype)


def plain_tensors(X: Tensor) -> Iterator[Tensor]:
    """X, or the tensors that a wrapper around some consists of; of a DTensor those on this process."""
    X = local(X)
    if hasattr(X, "__tensor_flatten__"):
        for name in X.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(X, name))
    else:
        yield X


# ------------------------------------------------------------------------------------------------------- workspaces


def workspace(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Bytes that the CPU kernel of an operation takes beside its results and frees before it returns.

    Each was read off allocator events of torch.profiler (benchmarks/planner); the rest have none, or a few hundred KiB that do
    not grow with the matrix (oneDNN's bf16 products, the blocks of attention).
    """
    if func in _LINALG:
        return _LINALG[func](args[0])
    if func in _REDUCTIONS and (dtype := kwargs.get("dtype")) is not None:
        # ATen/native/ReduceOpsUtils.h, make_reduction: on a CPU the input is copied to the wider dtype first.
        return 0 if args[0].dtype == dtype else args[0].numel() * dtype.itemsize
    if isinstance(result, Tensor) and torch.Tag.pointwise in func.tags:
        return _promoted([X for X in (*args, *kwargs.values()) if isinstance(X, Tensor)], result)
    return 0


def _promoted(inputs: Sequence[Tensor], result: Tensor) -> int:
    """ATen/TensorIterator.cpp, compute_types: on a CPU, operands of mixed dtypes are copied to the common one, and a result of
    another dtype, that of an operation in place, is computed in a copy."""
    operands = [X for X in inputs if X.ndim and X.dtype != torch.bool]
    if len({X.dtype for X in operands}) < 2 or result.dtype == torch.bool:
        return 0
    common = functools.reduce(torch.promote_types, (X.dtype for X in operands))
    return sum(X.numel() * common.itemsize for X in (*operands, result) if X.dtype != common)


def _qr(Y: Tensor) -> int:
    """Y (..., d, r): Householder's r factors and LAPACK's work for ?geqrf and ?orgqr, r nb with blocks of nb <= 64 (ilaenv)."""
    return 65 * min(Y.shape[-2:]) * Y.element_size()


def _svd(G: Tensor) -> int:
    """G (..., m, n): ?gesdd overwrites a copy of it; with jobz='S' its documentation asks for 4 l^2 + 7 l numbers of work, l
    the short side, and 8 l integers."""
    short = min(G.shape[-2:])
    return (G.numel() + 4 * short * short + 7 * short) * G.element_size() + 32 * short


_LINALG = {aten.linalg_qr.default: _qr, aten._linalg_svd.default: _svd}
_REDUCTIONS = {
    aten.linalg_vector_norm.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
}
