"""FSDP2: several processes train as one does, whatever the axis of a matrix that is cut, and hold a part of the state each."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from subspan.distributed import shard_along
from subspan.optim.combine import Apollo, Fira, Frugal
from subspan.optim.groups import param_groups
from subspan.optim.optimizer import ProjectedOptimizer
from subspan.optim.projectors import SVD, Random, RandomizedSVD
from subspan.optim.refresh import Refresh
from subspan.optim.rules import Adafactor, Adam, ColumnNorm, Lion, Muon, SGDMomentum, orthogonalize
from subspan.optim.shards import Shards
from subspan.training.processes import leave_group

RANK, GAP, STEPS = 32, 2, 6  # three refreshes
HIDDEN, WIDE = 64, 132  # WIDE / 4 = 33 columns a process
TOKENS = 256  # a step: gradients of full rank, so that rounding noise stays small

CASES: dict[str, dict[str, Any]] = {
    "hold": {},
    "project": {"gradients": "project", "max_grad_norm": 0.2},
    "project, deferred": {"gradients": "project"},  # FSDP2 sums the gradients of micro-batches and scatters them once
    "update": {"gradients": "update"},
    "int8": {"state_dtype": torch.int8, "basis_dtype": torch.int4},
    "int4, project": {"state_dtype": torch.int4, "gradients": "project"},
    "adafactor": {"rule": Adafactor()},
    "muon": {"rule": Muon(), "dense_rule": Adam()},
    "muon, int8": {"rule": Muon(), "dense_rule": Adam(), "state_dtype": torch.int8},
    "muon, full rank": {"rule": Muon(), "dense_rule": Adam()},
    "column norm": {"rule": ColumnNorm(), "dense_rule": SGDMomentum()},
    "lion": {"rule": Lion()},
    "fira": {"combine": Fira()},
    "frugal": {"combine": Frugal(0.1), "refresh": Refresh(moments="reset")},
    "apollo mini": {"combine": Apollo(by="tensor"), "gradients": "update"},
    "transport": {"refresh": Refresh(moments="transport", adaptive=0.5, gate=0.1, align=True)},
    "svd": {"projector": SVD()},
    "randomized svd": {"projector": RandomizedSVD()},
    "random": {"projector": Random()},
}
AXES = {"k": (1, 0), "d": (0, 1), "rows": (0, 0)}
"""Of `Net.down` and `Net.up`: which dimension is cut, so that both matrices are along k, or along d; or FSDP2's default."""


class Experts(nn.Module):
    """Three matrices as one parameter: two processes get two and one of them, four get one or none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, HIDDEN, HIDDEN) / HIDDEN)

    def forward(self, X: Tensor) -> Tensor:
        return torch.einsum("bd,edh->bh", X, self.weight)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(70, HIDDEN)
        self.up = nn.Linear(HIDDEN, WIDE)
        self.down = nn.Linear(WIDE, HIDDEN)
        self.experts = Experts()
        self.head = nn.Linear(HIDDEN, 70, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        X = self.embedding(tokens)
        X = X + self.down(self.up(X).tanh())
        return self.head(X + self.experts(X))


def groups_of(net: nn.Module, rank: int | None = RANK) -> list[dict[str, Any]]:
    targets = ["up.weight", "down.weight", "experts.weight"]
    views = {"experts.weight": "batch"}
    return param_groups(net, rank=rank, update_proj_gap=GAP, targets=targets, views=views, verbose=False)


def fit(case: str, count: int, axis: str, replicas: int = 1) -> dict[str, Any]:
    """Losses, whole weights and state, this process' bytes, gradients before the last step; count 0: without a process group."""
    torch.manual_seed(0)
    net = Net()
    if count:
        shape, names = ((replicas, count), ("replicate", "shard")) if replicas > 1 else ((count,), ("shard",))
        dims = dict(zip((net.down.weight, net.up.weight), AXES[axis], strict=True))
        fully_shard(
            net,
            mesh=init_device_mesh("cpu", shape, mesh_dim_names=names),
            shard_placement_fn=lambda p: Shard(dims[p]) if p in dims else None,
        )
    optimizer = ProjectedOptimizer(
        groups_of(net, None if "full rank" in case else RANK), lr=0.003, weight_decay=0.1, **CASES[case]
    )
    parts, rank = max(count * replicas, 1), dist.get_rank() if count else 0
    micro_batches = 2 if CASES[case].get("gradients") == "project" else 1
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        total = torch.zeros(())
        for i in range(micro_batches):
            if count and case.endswith("deferred"):
                net.set_requires_gradient_sync(i + 1 == micro_batches)
            tokens = torch.randint(0, 70, (2, TOKENS), generator=generator)
            mine = tokens[:, rank * TOKENS // parts : (rank + 1) * TOKENS // parts]
            loss = nn.functional.cross_entropy(net(mine[0]), mine[1]) / micro_batches
            loss.backward()
            total += loss.detach()
        if count:
            dist.all_reduce(total)
        losses.append(float(total) / parts)
        waiting = {name: here(p.grad) for name, p in net.named_parameters() if p.grad is not None}
        memory = {G.untyped_storage().data_ptr(): G.untyped_storage().nbytes() for G in waiting.values()}
        optimizer.step()
        optimizer.zero_grad()
    state = {f"{name}.{key}": X for name, p in net.named_parameters() for key, X in optimizer.state[p].items()}
    return {
        "losses": torch.tensor(losses),
        "weights": {name: whole(p.detach()) for name, p in net.named_parameters()},
        "state": {key: whole(X) for key, X in state.items()},
        "bytes": {key: here(X).nbytes for key, X in state.items()},
        "waiting": {name: G.nbytes for name, G in waiting.items()},
        "memory": sum(memory.values()),
    }


def whole(X: Tensor) -> Tensor:
    return X.full_tensor() if isinstance(X, DTensor) else X


def here(X: Tensor) -> Tensor:
    return X.to_local() if isinstance(X, DTensor) else X


def worker(rank: int, count: int, file: str, layouts: dict[int, list[tuple[str, str]]], check: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=count)
    check_orthogonal(count)
    if check:
        check_bits()
        check_errors_copies_and_loading()
    found = {
        f"{case}, {axis}, {replicas}": fit(case, count // replicas, axis, replicas)
        for replicas, runs in layouts.items()
        for case, axis in runs
    }
    if rank == 0:
        torch.save(found, f"{file}.pt")
    leave_group()


def together(
    folder: Path, count: int, layouts: dict[int, list[tuple[str, str]]], check: bool = False
) -> dict[str, dict[str, Any]]:
    """Runs by number of copies, all on the same processes: to start them takes longest."""
    file = folder / "group"
    torch.multiprocessing.spawn(worker, (count, str(file), layouts, check), nprocs=count)
    return dict(torch.load(f"{file}.pt"))


@functools.cache
def alone(case: str) -> dict[str, Any]:
    return fit(case, 0, "k")


ALONG_D = ("project", "int8", "muon", "fira", "transport", "svd")
FULL_RANK = ("muon, full rank", "rows")
TWO = [*((case, "k") for case in CASES if case != FULL_RANK[0]), *((case, "d") for case in ALONG_D), FULL_RANK]
FOUR = [("project", "k"), ("int8", "k"), ("muon", "d"), ("fira", "d"), FULL_RANK]
ATOL = {"int8": 2e-4, "int4, project": 2e-4, "muon, int8": 2e-4, "frugal": 4e-4}
"""Where rounding may choose another code, or the sign of a residual near 0, 1.5e-4 each: of weights after 6 steps of 0.003."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return together(tmp_path_factory.mktemp("two"), 2, {1: TWO}, check=True)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return together(tmp_path_factory.mktemp("four"), 4, {1: FOUR, 2: FOUR})


def check_equal(many: dict[str, Any], case: str) -> None:
    one, atol = alone(case), ATOL.get(case, 1e-5)
    torch.testing.assert_close(many["losses"], one["losses"], rtol=1e-5, atol=1e-5)
    assert many["weights"].keys() == one["weights"].keys()
    for name, W in one["weights"].items():
        torch.testing.assert_close(many["weights"][name], W, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
    assert many["state"].keys() == one["state"].keys()
    for key, X in one["state"].items():
        if X.ndim == 0 and not key.endswith("limited_norm"):
            assert many["state"][key] == X, key  # counters
        elif key.endswith(".codes"):
            assert (many["state"][key] != X).float().mean() < 0.05, key


@pytest.mark.parametrize(("case", "axis"), TWO)
def test_two_processes_train_as_one(two: dict[str, Any], case: str, axis: str) -> None:
    check_equal(two[f"{case}, {axis}, 1"], case)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(("case", "axis"), FOUR)
def test_four_processes_train_as_one(four: dict[str, Any], case: str, axis: str, copies: int) -> None:
    """Four parts, or two copies of two."""
    check_equal(four[f"{case}, {axis}, {copies}"], case)


@pytest.mark.parametrize("case", ["project", "int4, project"])
def test_projected_gradients_leave_no_block_behind(two: dict[str, Any], case: str) -> None:
    """FSDP2 has one piece of memory for all gradients of a block; those of biases must not keep it."""
    found = two[f"{case}, k, 1"]
    assert found["waiting"].keys() == alone(case)["waiting"].keys()
    assert not {"up.weight", "down.weight"} & found["waiting"].keys()
    assert found["memory"] == sum(found["waiting"].values())


@pytest.mark.parametrize("case", ["project", "int8"])
def test_moments_are_shared_out_and_bases_are_not(two: dict[str, Any], four: dict[str, Any], case: str) -> None:
    """132 rows or columns, which 2 and 4 divide."""
    one = alone(case)["bytes"]
    moments = [key for key in one if key.startswith(("up.weight.", "down.weight.")) and ".exp_avg" in key]
    bases = [key for key in one if key.startswith(("up.weight.basis", "down.weight.basis"))]
    assert len(moments) >= 4
    assert len(bases) >= 2
    for count, found in ((2, two), (4, four)):
        many = found[f"{case}, k, 1"]["bytes"]
        assert [many[key] * count for key in moments] == [one[key] for key in moments]
        assert [many[key] for key in bases] == [one[key] for key in bases]


def check_orthogonal(count: int) -> None:
    """Parts of any size, empty ones too, become what the whole would."""
    mesh = init_device_mesh("cpu", (count,))
    for shape in ((5, 13), (13, 5), (6, 6), (1, 7), (2, 5, 9)):
        X = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        U = orthogonalize(X)
        for axis, dim in (("rows", 0), ("k", len(shape) - 1)):
            shards = Shards(mesh, 0, axis, shape[0], *shape[-2:])
            start, length = shards.mine(shape[dim])
            part = orthogonalize(X.narrow(dim, start, length), shards)
            torch.testing.assert_close(part, U.narrow(dim, start, length), msg=lambda text, s=shape: f"{s}: {text}")


def check_bits() -> None:
    """Equal gradients, dense parameters in 8 bits: blocks are rows, which no process shares, so codes are equal bit by bit."""
    broken = torch.zeros(99, 64)
    broken[-1, -1] = math.inf  # on one process alone, and yet it must count as zero everywhere
    weight, *gradients = (torch.randn(99, 64) for _ in range(4))
    for X in (weight, *gradients):
        dist.broadcast(X, 0)
    mesh = init_device_mesh("cpu", (2,))
    states = []
    for placed in (lambda X: X.clone(), lambda X: distribute_tensor(X, mesh, [Shard(0)])):
        p = nn.Parameter(placed(weight))
        optimizer = ProjectedOptimizer([p], lr=0.01, state_dtype=torch.int8)
        for G in (*gradients, broken):
            p.grad = placed(G)
            norm = optimizer.prepare()
            optimizer.step()
        assert norm == math.inf
        states.append({**optimizer.state[p], "weight": p.detach()})
    for key, X in states[0].items():
        assert torch.equal(whole(states[1][key]), X), key


def check_placements(mesh: DeviceMesh) -> None:
    """Gradients whose sum DTensor has left open, and batches of matrices however they are cut."""
    W, *inputs = (torch.randn(3, 33, 64) for _ in range(STEPS + 1))
    for X in (W, *inputs):
        dist.broadcast(X, 0)
    for placement, options in (
        (Replicate(), {}),
        (Replicate(), {"rank": 16}),
        (Replicate(), {"rank": 16, "gradients": "project"}),
        (Shard(0), {"rank": 16, "rule": Adafactor(), "refresh": Refresh(moments="transport")}),
        (Shard(1), {"rank": 16, "gradients": "project"}),
        (Shard(1), {"rank": 16, "combine": Fira()}),
        (Shard(2), {"rank": 16, "state_dtype": torch.int8}),
    ):
        group = {"rank": options.pop("rank"), "update_proj_gap": GAP} if "rank" in options else {}
        if isinstance(placement, Shard):
            group["view"] = "batch"
        ends = []
        for spread in (False, True):
            start = W if "view" in group else W[0]
            p = nn.Parameter(distribute_tensor(start, mesh, [placement]) if spread else start.clone())
            optimizer = ProjectedOptimizer([{"params": [p], **group}], lr=0.01, **options)
            for X in inputs:
                if "view" in group:
                    p.grad = distribute_tensor(X, mesh, [placement]) if spread else X.clone()
                else:  # of rows that lie on both processes: each has an addend of the gradient
                    rows = distribute_tensor(X[1], mesh, [Shard(0)]) if spread else X[1]
                    (rows @ p.mT).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            ends.append(whole(p.detach()))
        torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5, msg=lambda text, o=options: f"{o}: {text}")


def check_errors_copies_and_loading() -> None:
    mesh = init_device_mesh("cpu", (2,))
    square = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))

    # What cannot be stepped is refused when the optimizer is made.
    for group, placements, where, words in (
        ({}, [Shard(1)], mesh, "sharded along dimension 1"),
        ({"rank": 2}, [Shard(0), Shard(1)], square, "only one Shard"),
        ({"rank": 2, "view": "conv"}, [Shard(1)], mesh, "in no regular way"),
        ({"view": "batch", "full_rank": True}, [Shard(0)], mesh, "in no regular way"),
    ):
        X = torch.zeros(4, 4, 2, 2) if "view" in group else torch.zeros(4, 4)
        p = nn.Parameter(distribute_tensor(X, where, placements))
        with pytest.raises(ValueError, match=words):
            ProjectedOptimizer([{"params": [p], **group}])

    # Copies everywhere need nothing.
    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
    optimizer = ProjectedOptimizer([{"params": [p], "rank": 2}], lr=0.1)
    p.grad = distribute_tensor(torch.eye(4), mesh, [Replicate()])
    optimizer.step()
    assert not torch.equal(whole(p.detach()), torch.ones(4, 4))

    check_placements(mesh)

    # State goes from one process to several and back.
    torch.manual_seed(0)
    single, sharded = Net(), Net()
    sharded.load_state_dict(single.state_dict())
    placement = shard_along(groups_of(sharded), 2)
    assert [placement(p) for p in (sharded.up.weight, sharded.down.weight, sharded.head.weight)] == [
        Shard(0),
        Shard(1),
        None,
    ]
    assert shard_along(groups_of(sharded), 8)(sharded.down.weight) == Shard(0)  # 8 does not divide 132
    fully_shard(sharded, mesh=mesh, shard_placement_fn=placement)
    optimizers = [
        ProjectedOptimizer(groups_of(net), gradients="project", state_dtype=torch.int8) for net in (single, sharded)
    ]
    tokens = torch.randint(0, 70, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(single(tokens[0]), tokens[1]).backward()
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    back = ProjectedOptimizer(groups_of(single), gradients="project", state_dtype=torch.int8)
    back.load_state_dict(optimizers[1].state_dict())
    for p, q in zip(single.parameters(), sharded.parameters(), strict=True):
        for key, X in optimizers[0].state[p].items():
            assert torch.equal(whole(optimizers[1].state[q][key]), X), key
            assert torch.equal(back.state[p][key], X), key
