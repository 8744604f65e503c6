"""Bytes that cross processes, collective by collective: of a run, or of processes that are only pretended (cluster.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "allreduce": "sum",
    "all_reduce": "sum",
    "reduce_scatter": "scatter",
    "allgather": "gather",
    "all_gather": "gather",
    "broadcast": "copy",
    "alltoall": "exchange",
}
"""How the name of a collective of torch begins -> what it is called here."""

Ranks = tuple[int, ...]
Payload = Mapping[tuple[str, Ranks], int]
"""(kind, processes) -> bytes."""


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what collectives get inside it, by kind and by who takes part: `payload`.

    Of a sum: its result; of a scatter (reduce-scatter): what goes in; of a gather (all-gather): what comes out; of a copy
    (broadcast): the tensor; of an exchange (all-to-all): what goes in. RuntimeError for a collective that is not counted,
    point-to-point messages among them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.payload: Counter[tuple[str, Ranks]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.name().split("::")[1]
            if not any(word in name for word in ("wait", "wrap", "barrier")):
                self._count(name, [*_leaves([args, list((kwargs or {}).values())])], [*_leaves([out])])
        return out

    def _count(self, name: str, given: list[Any], out: list[Any]) -> None:
        kind = next((kind for start, kind in KINDS.items() if name.lstrip("_").startswith(start)), None)
        if kind is None:
            raise RuntimeError(f"{name} is not counted")
        sizes = [X.numel() * X.element_size() for X in (*given, *out) if isinstance(X, Tensor)]
        (group,) = (found for x in given if (found := _group(x)) is not None)
        self.payload[kind, tuple(dist.get_process_group_ranks(group))] += max(sizes)


def _leaves(item: Any) -> Iterator[Any]:
    if isinstance(item, (list, tuple)):
        for part in item:
            yield from _leaves(part)
    else:
        yield item


def _group(x: Any) -> dist.ProcessGroup | None:
    """The process group that an argument of a collective is, by itself or by its name."""
    if isinstance(x, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(x)
        except RuntimeError:  # the operation of a reduction
            return None
    if isinstance(x, str):
        try:
            return dist.distributed_c10d._resolve_process_group(x)  # type: ignore[attr-defined, arg-type]
        except (LookupError, RuntimeError):  # likewise
            return None
    return None


def sent(kind: str, payload: int, count: int) -> float:
    """Bytes that each of `count` processes sends for a collective in a ring (as NCCL's documentation counts bus bandwidth)."""
    share = (count - 1) / count
    return payload * {"sum": 2 * share, "scatter": share, "gather": share, "copy": share, "exchange": share}[kind]
