"""The processes of a run, as torchrun starts them: what they have to agree on, and the model cut or copied among them."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from subspan.optim.copies import check_copies, ignore_projected
from subspan.optim.optimizer import ProjectedOptimizer
from subspan.training.config import ParallelConfig
from subspan.training.models import blocks_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class Processes:
    """This process among those of the run: number `rank` of `count`. Of one process alone every method is free.

    What the host decides by (stop, skip, counts of tokens) is agreed on over gloo, so that an accelerator is not waited for.
    """

    def __init__(self, parallel: ParallelConfig) -> None:
        """Joins the group that torchrun's environment names. ValueError: shard x replicate is another number of processes."""
        self.parallel = parallel
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if parallel.count != self.count:
            raise ValueError(
                f"parallel.shard={parallel.shard} times parallel.replicate={parallel.replicate} is not {self.count}, the number "
                f"of processes: start with `torchrun --nproc-per-node {parallel.count} -m subspan ...`, or change one"
            )
        self._joined = self.count > 1 and not dist.is_initialized()
        if self._joined:
            _join()

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def leave(self) -> None:
        if self._joined:
            leave_group()

    def device(self, device: torch.device) -> torch.device:
        """This process' own of several accelerators; a CPU is shared."""
        if self.count == 1 or device.type == "cpu":
            return device
        number = int(os.environ.get("LOCAL_RANK", "0"))
        torch.accelerator.set_device_index(number)
        return torch.device(device.type, number)

    def say(self, text: str, **options: Any) -> None:
        """print, of the first process."""
        if self.first:
            print(text, **options)

    # What all have to agree on.

    def total(self, number: int) -> int:
        """The sum of a number of every process."""
        return number if self.count == 1 else int(self._reduced(number, dist.ReduceOp.SUM))

    def largest(self, number: int) -> int:
        """The largest of a number of every process."""
        return number if self.count == 1 else int(self._reduced(number, dist.ReduceOp.MAX))

    def sum(self, X: Tensor) -> Tensor:
        """The sum of a tensor of every process, in place."""
        if self.count > 1:
            dist.all_reduce(X)
        return X

    def first_does(self, what: Callable[[], T]) -> T:
        """The result of `what`, which the first process alone does, on all; so is an error that it raises."""
        if self.count == 1:
            return what()
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = what()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return found[0]  # type: ignore[no-any-return]

    def deal(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """Every `count`-th of `items`, and whether it counts: all get equally many, the last of some for nothing."""
        round_: list[T] = []
        for item in items:
            round_.append(item)
            if len(round_) == self.count:
                yield round_[self.rank], True
                round_ = []
        if round_:
            yield round_[min(self.rank, len(round_) - 1)], self.rank < len(round_)

    def _reduced(self, number: int, op: Any) -> Tensor:
        X = torch.tensor(number)
        dist.all_reduce(X, op=op)
        return X

    # The model and its optimizer.

    def copy(self, model: nn.Module, optimizer: Optimizer) -> Copy:
        """What a forward pass goes through: where processes have whole copies of the model, DistributedDataParallel, in whose
        buckets gradients lie."""
        if self.count == 1 or self.parallel.shard > 1:
            return Copy(model)
        if getattr(optimizer, "copies", None) is None:
            return Copy(DistributedDataParallel(model, gradient_as_bucket_view=True))
        assert isinstance(optimizer, ProjectedOptimizer)
        ignore_projected(model, optimizer.param_groups)
        return Copy(DistributedDataParallel(model, gradient_as_bucket_view=True), optimizer)

    def fill(self, model: nn.Module, build: Callable[[], nn.Module], device: torch.device) -> None:
        """Give a cut model on the meta device its memory, on `device`, and the values of `build()`, which the first process alone
        calls: one whole model in one host's memory, and never more than a tensor of it on an accelerator."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        built: list[nn.Module] = []
        self.first_does(lambda: built.append(build()))
        model.to_empty(device=device)
        state = built[0].state_dict() if built else {}
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
        for name, X in model.named_buffers():  # those that no state_dict has
            if built:
                X.copy_(built[0].get_buffer(name))
            dist.broadcast(X, 0)

    def check_copies(self, model: nn.Module, optimizer: Optimizer) -> None:
        """RuntimeError unless all copies are the same, bit by bit."""
        group = None
        if self.parallel.shard > 1:
            group = next(p.device_mesh for p in model.parameters()).get_group("replicate")  # type: ignore[attr-defined]
        check_copies(model, optimizer, group)


def make_mesh(parallel: ParallelConfig, device_type: str) -> DeviceMesh:
    """The processes by copy and part, or by part alone."""
    from torch.distributed.device_mesh import init_device_mesh

    sizes, names = (parallel.replicate, parallel.shard), ("replicate", "shard")
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=names)
    return mesh if parallel.replicate > 1 else mesh["shard"]


def shard_model(model: nn.Module, groups: list[dict[str, Any]], mesh: DeviceMesh) -> None:
    """Cut the model's parameters, block by block, over the last dimension of `mesh` (FSDP2).

    groups: of the model before, as `param_groups` makes them.
    """
    from torch.distributed.fsdp import fully_shard

    from subspan.optim.shards import shard_along

    along = shard_along(groups, mesh.size(-1))
    for module in (*blocks_of(model), model):
        fully_shard(module, mesh=mesh, shard_placement_fn=along)


def _join() -> None:
    """init_process_group: gloo for what lies on the CPU, and for an accelerator its own.

    On one node torchrun keeps its store through a restart, and in it the addresses of processes that are gone, which new ones
    would try to connect to: each start has names of its own.
    """
    store, rank, count = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(count):
        store = PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(store=store, rank=rank, world_size=count)


def leave_group() -> None:
    """destroy_process_group, and a moment for gloo's threads, which live on while a device mesh does: they let go of tensors a
    little after a collective is over, and one that does so while Python shuts down aborts the process."""
    dist.destroy_process_group()
    gc.collect()  # meshes in circles: without them the threads end here
    time.sleep(0.2)


@dataclass(frozen=True)
class Copy:
    """A model whose backward passes average gradients over processes, or the model itself. optimizer: of low-rank averages."""

    model: nn.Module
    optimizer: ProjectedOptimizer | None = None

    @contextmanager
    def sync(self, *, last: bool) -> Iterator[None]:
        """A micro-batch of a step, forward and backward: what is averaged is so in the last one."""
        with ExitStack() as stack:
            if not last and isinstance(self.model, DistributedDataParallel):
                stack.enter_context(self.model.no_sync())
                if self.optimizer is not None:
                    stack.enter_context(self.optimizer.no_sync())
            yield
