"""Processes that train copies of a model on different data, and average low-rank gradients instead of whole ones.

R = Q^T A is linear in A, and Q is the same everywhere, so the mean of R is the R of the mean gradient, for r/d of the bytes. Only
a refresh needs whole gradients, and sends (k, r) and (d, r) for every product with one (projectors.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work


class Copies:
    """The processes of `group`, and the averages that are on their way. `syncing`: whether a backward pass starts them."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.syncing = group, True
        self._pending: dict[Tensor, Work | None] = {}

    def start(self, p: Tensor, R: Tensor) -> None:
        """Average p's R in place, beside what comes next."""
        self._pending[p] = self._reduce(R, async_op=True)

    def interrupt(self, p: Tensor) -> None:
        """Before something is added to p's R: the average of averages is the same."""
        self._wait(p)
        self._pending.pop(p, None)

    def settle(self, p: Tensor, R: Tensor) -> None:
        """p's R is the average when this returns."""
        if p in self._pending:
            self.interrupt(p)
        else:
            self.average(R)

    def wait(self) -> None:
        """For all that was started: what is averaged may be read."""
        for p in self._pending:
            self._wait(p)

    def clear(self) -> None:
        self.wait()
        self._pending.clear()

    def average(self, R: Tensor) -> None:
        """Average R in place, now."""
        self._reduce(R, async_op=False)

    def spread(self, G: Tensor) -> Tensor:
        """G as what it is one addend of: products with it are averages over all processes."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Partial

        mesh = DeviceMesh.from_group(self.group, G.device.type)
        return DTensor.from_local(G, mesh, [Partial("avg")], run_check=False)

    def max(self, X: Tensor) -> Tensor:
        """The largest of a number (0-d) of every process; inf for nan."""
        return largest(X, self.group)

    def _wait(self, p: Tensor) -> None:
        work = self._pending.get(p)
        if work is not None:
            work.wait()
            self._pending[p] = None

    def _reduce(self, R: Tensor, async_op: bool) -> Work | None:
        R.div_(dist.get_world_size(self.group))  # first: a sum may be too large for bf16
        work: Work | None = dist.all_reduce(R if R.is_contiguous() else R.mT, group=self.group, async_op=async_op)
        return work


def largest(X: Tensor, group: ProcessGroup) -> Tensor:
    """The largest of a number (0-d) of every process of `group`; inf for nan, which a maximum may lose."""
    X = X.nan_to_num(nan=float("inf"), posinf=float("inf"))
    dist.all_reduce(X, op=dist.ReduceOp.MAX, group=group)
    return X


def ignore_projected(
    model: nn.Module, groups: Iterable[dict[str, Any]], process_group: ProcessGroup | None = None
) -> None:
    """Make DistributedDataParallel(model) leave projected parameters alone: an optimizer with `average_over` averages for them.

    groups: of the model, as `param_groups` makes them. As DistributedDataParallel would, takes their values from the first
    process of `process_group` (None: all). Call it before the model is wrapped.
    """
    names = {p: name for name, p in model.named_parameters()}
    projected = [item[1] if isinstance(item, tuple) else item for g in groups if "rank" in g for item in g["params"]]
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for p in projected:
        dist.broadcast(p.detach(), group=process_group, group_src=0)
        ignored += [names[p], f".{names[p]}"]  # of the root module's own parameters it looks for the latter
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        model, ignored
    )
