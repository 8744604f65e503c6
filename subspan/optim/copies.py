"""Processes that train copies of a model on different data, and average low-rank gradients instead of whole ones.

R = Q^T A is linear in A, and Q is the same everywhere, so the mean of R is the R of the mean gradient, for r/d of the bytes. Only
a refresh needs whole gradients, and sends (k, r) and (d, r) for every product with one (projectors.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work
from torch.optim import Optimizer

from subspan.live import plain_tensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Copies:
    """The processes of `group`, and the averages that are on their way. `syncing`: whether a backward pass starts them."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.syncing = group, True
        self._pending: dict[Tensor, Work | None] = {}
        self._meshes: dict[str, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Copies:
        return Copies(self.group)  # which cannot be copied

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
        from torch.distributed.tensor import DTensor, Partial

        return DTensor.from_local(G, self.mesh(G.device.type), [Partial("avg")], run_check=False)

    def mesh(self, device_type: str) -> DeviceMesh:
        """The same processes as DTensors know them."""
        from torch.distributed.device_mesh import DeviceMesh

        if device_type not in self._meshes:
            self._meshes[device_type] = DeviceMesh.from_group(self.group, device_type)
        mesh: DeviceMesh = self._meshes[device_type]
        return mesh

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


def check_copies(model: nn.Module, optimizer: Optimizer, process_group: ProcessGroup | None = None) -> None:
    """RuntimeError, on every process, unless weights and optimizer state of all processes of `process_group` (None: all) are the
    same bits. It names what differs.

    To find out why copies drift apart: it compares sums, reads everything once and waits for all processes. Of tensors that are
    cut, the parts here count: give the group of those that have the same parts.
    """
    tensors: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        tensors[name] = p
        state = optimizer.state.get(p, {})
        tensors |= {f"{key} of {name}": X for key, X in state.items() if isinstance(X, Tensor)}
    device = next(model.parameters()).device  # some state lies on the host
    sums = torch.stack([_checksum(X).to(device) for X in tensors.values()])
    least, most = sums.clone(), sums.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=process_group)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=process_group)
    differ = [name for name, same in zip(tensors, (least == most).tolist(), strict=True) if not same]
    if differ:
        raise RuntimeError(
            f"copies of the model differ in {len(differ)} of {len(tensors)} tensors, the first of them {', '.join(differ[:3])}: "
            "a process had other gradients averaged, or changed a weight by itself"
        )


def _checksum(X: Tensor, length: int = 2**20) -> Tensor:
    """A sum (0-d, int64) of X's bytes, each with its place."""
    total = torch.zeros((), dtype=torch.int64, device=X.device)
    for plain in plain_tensors(X):
        codes = plain.detach().contiguous().view(-1).view(torch.uint8)
        for start in range(0, len(codes), length):
            part = codes[start : start + length].long()
            total = total.mul_(31).add_(part.mul_(torch.arange(1, len(part) + 1, device=part.device)).sum())
    return total


def ignore_projected(
    model: nn.Module, groups: Iterable[dict[str, Any]], process_group: ProcessGroup | None = None
) -> None:
    """Make DistributedDataParallel(model) leave projected parameters alone: an optimizer with `average_over` averages for them.

    groups: of the model, as `param_groups` makes them. As DistributedDataParallel would, takes their values from the first
    process of `process_group` (None: all). Call it before the model is wrapped.
    """
    names: dict[Tensor, list[str]] = {}  # of a tied weight DistributedDataParallel finds the last one
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    projected = [item[1] if isinstance(item, tuple) else item for g in groups if "rank" in g for item in g["params"]]
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for p in projected:
        dist.broadcast(p.detach(), group=process_group, group_src=0)
        for name in names[p]:
            ignored += [name, f".{name}"]  # of the root module's own parameters it looks for the latter
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        model, ignored
    )
