"""Memory in four columns: weights, gradients, optimizer (basis and moments), counted from the tensors themselves."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from subspan.optim.dtensors import local
from subspan.optim.int8 import stored_tensors
from subspan.optim.optimizer import ProjectedOptimizer

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
    """Exact bytes of weights, of the gradients that wait between backward and step (the parameter's dtype; at most, with
    gradients="project") and of optimizer state as it is now: all of it for Subspan's optimizers, whose state exists from
    construction. Works on meta tensors. Of sharded tensors, this process' parts."""
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    basis = moments = 0
    for state in optimizer.state.values():
        for key, value in state.items():
            if key.startswith("basis"):
                basis += _bytes(value)
            elif isinstance(value, Tensor):
                moments += _bytes(value)
    return MemoryTable(
        weights=sum(_bytes(X) for p in [*parameters, *model.buffers()] for X in stored_tensors(p)),
        gradients=_waiting_gradients(trainable, optimizer),
        basis=basis,
        moments=moments,
        adam_full_rank=sum(8 * local(p).numel() for p in trainable),
    )


def _waiting_gradients(trainable: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of gradients between backward and step, in the step that has the most of them.

    hold: of every parameter. project: of dense ones, the low-rank gradients of projected ones, and full gradients of those
    that are refreshed together. update: none, each is freed before the next one is there.
    """
    mode = getattr(optimizer, "gradients", "hold")
    if mode == "update":
        return 0
    if not isinstance(optimizer, ProjectedOptimizer) or mode == "hold":
        return sum(map(_bytes, trainable))
    waiting, refreshed = 0, dict[tuple[int, int], int]()
    for p in trainable:
        if "refreshes" not in optimizer.state.get(p, {}):
            waiting += _bytes(p)
            continue
        d, r = optimizer.shapes(p)[0][-2:]
        low_rank = _bytes(p) // d * r
        waiting += low_rank
        when = (optimizer.first_refresh(p), optimizer.group_of(p)["update_proj_gap"])
        refreshed[when] = refreshed.get(when, 0) + _bytes(p) - low_rank
    return waiting + max(refreshed.values(), default=0)


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Peak bytes so far: of torch's allocator on an accelerator, resident bytes of the whole process on the CPU. Apple's GPUs
    keep no peak: what the driver has given out now."""
    device = torch.device(device)
    if device.type != "cpu":
        module = torch.get_device_module(device)
        peak = getattr(module, "max_memory_allocated", None)
        return int(peak(device) if peak else module.driver_allocated_memory())
    # Linux: not from getrusage, which a new process starts with the peak of the one that made it.
    own = [line.split()[1] for line in _text(Path("/proc/self/status")).splitlines() if line.startswith("VmHWM:")]
    if own:
        return 1024 * int(own[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that can still be allocated, or None where the system does not tell (only Linux does).

    The least of what the machine has left, what the control groups (cgroup v2) of the process have left, and what its own
    limit of address space (`ulimit -v`) leaves. root: the folder with proc and sys.
    """
    rooms = [*_machine_room(root), *_cgroup_rooms(root), *_address_room(root)]
    return max(0, min(rooms)) if rooms else None


def _machine_room(root: Path) -> list[int]:
    lines = _text(root / "proc/meminfo").splitlines()
    return [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]


def _cgroup_rooms(root: Path) -> list[int]:
    """Of every control group with a limit, from the process's own up to the root's."""
    top = root / "sys/fs/cgroup"
    own = [
        line.removeprefix("0::/") for line in _text(root / "proc/self/cgroup").splitlines() if line.startswith("0::/")
    ]
    folders = [folder for name in own for folder in (top / name, *(top / name).parents) if folder.is_relative_to(top)]
    rooms = []
    for folder in folders:
        limit, used = _text(folder / "memory.max").strip(), _text(folder / "memory.current").strip()
        if limit.isdigit() and used.isdigit():
            # File cache counts as used, but gives way: without this a written checkpoint would look like lost memory.
            stat = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
            rooms.append(int(limit) - int(used) + int(stat.get("inactive_file", 0)))
    return rooms


def _address_room(root: Path) -> list[int]:
    limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], _text(root / "proc/self/statm").split()
    if limit == resource.RLIM_INFINITY or not pages:
        return []
    return [limit - int(pages[0]) * resource.getpagesize()]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _bytes(X: Tensor) -> int:
    """On this process."""
    X = local(X)
    return X.numel() * X.element_size()
