"""Gradient lifetime: the backward hooks of one optimizer, so that full gradients need not wait for step().

    hold       no hook: gradients live until the caller frees them.
    project    R += Q^T A as soon as a gradient is there, then p.grad = None. Exact over micro-batches, because projection is
               linear and a basis never changes between two of them. A matrix whose basis is due for a refresh keeps its
               full gradient until step(), and dense parameters keep theirs; both in memory of their own with FSDP2.
    update     the weight is updated and p.grad freed at once: no accumulation, no clipping over all gradients.

The hooks are torch's `register_post_accumulate_grad_hook`. They know the optimizer weakly: an optimizer that is gone leaves
gradients alone.
"""

from __future__ import annotations

import functools
import math
import weakref
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from subspan.optim.dtensors import is_spread, local, settle_gradient

if TYPE_CHECKING:
    from subspan.optim.optimizer import ProjectedOptimizer

Gradients = Literal["hold", "project", "update"]

_ALIVE: weakref.WeakSet[Backward] = weakref.WeakSet()


class Backward:
    """The hooks, and what they leave for step(): low-rank gradients, or the norms of gradients already used.

    `low_rank`: p -> R (r, k), in the gradient's dtype, summed over backward passes (`project`).
    `updated`: p -> norm of its (low-rank) gradient, 0-d (`update`).
    """

    def __init__(self, optimizer: ProjectedOptimizer) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.low_rank: dict[Tensor, Tensor] = {}
        self.updated: dict[Tensor, Tensor] = {}
        self.handles: dict[Tensor, RemovableHandle] = {}
        _watch_others()
        _ALIVE.add(self)
        weakref.finalize(optimizer, Backward.detach, self).atexit = False

    def attach(self) -> None:
        """Hook every trainable parameter that has no hook yet; cheap enough to be called every step."""
        optimizer = self.optimizer()
        assert optimizer is not None
        receive = {"project": self._project, "update": self._update}[optimizer.gradients]
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and p not in self.handles:
                    self.handles[p] = p.register_post_accumulate_grad_hook(receive)

    def detach(self) -> None:
        """Remove the hooks and what they kept."""
        for handle in self.handles.values():
            handle.remove()
        self.handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forget what the hooks kept since the last step."""
        if (optimizer := self.optimizer()) and optimizer.copies:
            optimizer.copies.clear()
        self.low_rank.clear()
        self.updated.clear()

    def check(self, p: Tensor) -> None:
        """ValueError if somebody wrote p.grad after the hook had taken it."""
        if p.grad is not None and (p in self.low_rank or p in self.updated):
            raise ValueError(
                "a gradient was written after its hook had taken it, as DistributedDataParallel does, whose buckets hold "
                "every gradient: use gradients='hold' with it"
            )

    @torch.no_grad()
    def _project(self, p: Tensor) -> None:
        optimizer, G = self._take(p)
        group = optimizer.group_of(p)
        if "rank" not in group or (p not in self.low_rank and optimizer.refresh_due(p)):
            _own_memory(p, G)
            return
        copies = optimizer.copies
        if copies:
            copies.interrupt(p)
        self.low_rank[p] = optimizer.low_rank_gradient(group, p, G, self.low_rank.get(p))
        if copies and copies.syncing:
            copies.start(p, self.low_rank[p])
        p.grad = None

    @torch.no_grad()
    def _update(self, p: Tensor) -> None:
        optimizer, _ = self._take(p)
        if optimizer.copies and "rank" not in optimizer.group_of(p):
            return  # DistributedDataParallel has not averaged it yet
        if p in self.updated:
            raise ValueError(
                "gradients='update' got a second gradient of a parameter before step(): call optimizer.step() after every "
                "backward pass; for micro-batches, or a weight shared by blocks under reentrant activation "
                "checkpointing, use gradients='project'"
            )
        group = optimizer.group_of(p)
        R = optimizer.project(group, p)
        norm, live = optimizer.gauge(group, p, R)
        self.updated[p] = norm
        optimizer.apply(group, p, R, live, use=norm < math.inf)
        p.grad = None

    def _take(self, p: Tensor) -> tuple[ProjectedOptimizer, Tensor]:
        optimizer = self.optimizer()
        assert optimizer is not None  # or `finalize` had removed the hook
        if p.grad is None:
            raise ValueError(
                "a parameter's gradient was taken before this optimizer's hook saw it, as by another optimizer over the "
                "same parameters: delete that one first"
            )
        if optimizer.prepared is not None:
            raise ValueError(
                "a backward pass between prepare() and step() would be lost: call step() or zero_grad() first"
            )
        check_dense(p.grad)
        settle_gradient(p)
        return optimizer, p.grad


@functools.cache
def _watch_others() -> None:
    """From now on another optimizer's step raises ValueError where hooks have taken the gradients that it looks for: it would
    leave those parameters as they are, without a word."""

    def check(other: Optimizer, *_: Any) -> None:
        for backward in _ALIVE:
            own, taken = backward.optimizer(), (backward.low_rank, backward.updated)
            if own is other or not any(taken):
                continue
            if any(p in kept for group in other.param_groups for p in group["params"] for kept in taken):
                raise ValueError(
                    f"{type(other).__name__} steps parameters whose gradients an earlier {type(own).__name__} has taken during "
                    "the backward pass: call release() of that one, or let go of it, before another optimizer trains the model"
                )

    register_optimizer_step_pre_hook(check)


def check_dense(G: Tensor) -> None:
    """ValueError for a sparse gradient."""
    if G.is_sparse:
        raise ValueError("sparse gradients are not supported: use nn.Embedding(sparse=False)")


def _own_memory(p: Tensor, G: Tensor) -> None:
    """Copy a gradient G that waits for step() out of the memory that FSDP2 has made for all gradients of a block at once: the
    smallest that looks into it would keep all of it alive."""
    if is_spread(G) and local(G).untyped_storage().nbytes() > local(G).nbytes:
        p.grad = G.clone()
