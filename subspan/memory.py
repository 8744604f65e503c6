"""Memory in four columns: weights, gradients, optimizer (basis and moments), counted from the tensors themselves."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GIB = 2**30


@dataclass(frozen=True)
class MemoryTable:
    """Bytes. `adam_full_rank` is what two full-size fp32 moments of the same trainable parameters would take."""

    weights: int
    gradients: int
    basis: int
    moments: int
    adam_full_rank: int

    @property
    def optimizer(self) -> int:
        """Basis and moments."""
        return self.basis + self.moments

    def rows(self) -> list[tuple[str, int]]:
        """(name, bytes) in the order of the printed table."""
        return [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer: basis", self.basis),
            ("optimizer: moments", self.moments),
            ("total", self.weights + self.gradients + self.optimizer),
        ]

    def __str__(self) -> str:
        lines = [f"  {name:<20}{size / GIB:10.4f} GiB" for name, size in self.rows()]
        share = self.optimizer / max(self.adam_full_rank, 1)
        full = f"{self.adam_full_rank / GIB:.4f} GiB"
        return "\n".join([*lines, f"  optimizer state is {share:.0%} of full-rank Adam's in fp32 ({full})"])


def count_memory(model: nn.Module, optimizer: torch.optim.Optimizer) -> MemoryTable:
    """Exact bytes of weights, of their gradients (the parameter's dtype, alive between backward and step) and of
    optimizer state as it is now: all of it for Subspan's optimizers, whose state exists from construction. Works on meta
    tensors."""
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    basis = moments = 0
    for state in optimizer.state.values():
        for key, value in state.items():
            if key == "basis":
                basis += _bytes(value)
            elif isinstance(value, Tensor):
                moments += _bytes(value)
    return MemoryTable(
        weights=sum(map(_bytes, [*parameters, *model.buffers()])),
        gradients=sum(map(_bytes, trainable)),
        basis=basis,
        moments=moments,
        adam_full_rank=sum(8 * p.numel() for p in trainable),
    )


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Peak bytes so far: of torch's allocator on an accelerator, resident bytes of the whole process on the CPU."""
    device = torch.device(device)
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _bytes(X: Tensor) -> int:
    return X.numel() * X.element_size()
