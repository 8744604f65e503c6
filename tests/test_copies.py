"""Low-rank data parallelism: copies of a model that average R train as one model on all data does."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from subspan.distributed import check_copies, ignore_projected
from subspan.optim.combine import Fira
from subspan.optim.groups import param_groups
from subspan.optim.optimizer import ProjectedOptimizer
from subspan.optim.projectors import SVD, RandomizedSVD
from subspan.optim.refresh import Refresh
from subspan.optim.rules import Adam, Muon
from subspan.training.processes import leave_group

COUNT, STEPS, MICRO_BATCHES, TOKENS, HIDDEN = 2, 6, 2, 256, 64

CASES: dict[str, dict[str, Any]] = {
    "hold": {},
    "project": {"gradients": "project", "max_grad_norm": 0.1},
    "update": {"gradients": "update"},
    "int8": {"gradients": "project", "state_dtype": torch.int8},
    "svd": {"projector": SVD(), "gradients": "project"},
    "randomized svd": {"projector": RandomizedSVD()},
    "muon": {"rule": Muon(), "dense_rule": Adam(), "gradients": "project"},
    "transport": {"refresh": Refresh(moments="transport", adaptive=0.3)},
}
NEVER_WAITS = "project, averaged after every micro-batch"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(70, HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)
        self.experts = nn.Parameter(torch.randn(3, HIDDEN, HIDDEN) / HIDDEN)
        self.head = nn.Linear(HIDDEN, 70)

    def forward(self, tokens: Tensor) -> Tensor:
        X = self.embedding(tokens)
        X = X + self.down(self.up(X).tanh())
        return self.head(X + torch.einsum("bd,edh->bh", X, self.experts))


def fit(case: str, rank: int, count: int) -> dict[str, Tensor]:
    torch.manual_seed(rank)  # copies start apart: the first one counts
    net: nn.Module = Net()
    groups = param_groups(
        net,
        rank=32,
        update_proj_gap=2,
        targets=["up.weight", "down.weight", "experts"],
        views={"experts": "batch"},
        verbose=False,
    )
    settings = CASES["project" if case == NEVER_WAITS else case]
    group = dist.group.WORLD if count > 1 else None
    optimizer = ProjectedOptimizer(groups, lr=0.001, average_over=group, **settings)
    model = net
    if count > 1:
        ignore_projected(net, groups)
        model = DistributedDataParallel(net)
    micro_batches = 1 if settings.get("gradients") == "update" else MICRO_BATCHES
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for i in range(micro_batches):
            tokens = torch.randint(0, 70, (2, TOKENS), generator=generator)
            mine = tokens[:, rank * TOKENS // count : (rank + 1) * TOKENS // count]
            with ExitStack() as stack:
                if count > 1 and i + 1 < micro_batches and case != NEVER_WAITS:
                    stack.enter_context(model.no_sync())
                    stack.enter_context(optimizer.no_sync())
                (nn.functional.cross_entropy(model(mine[0]), mine[1]) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    if count > 1:
        check_copies(net, optimizer)
        if case == "project":
            twin = copy.deepcopy(optimizer)
            assert twin.copies is not None
            assert twin.copies.group is group
        if case == "int8":
            check_that_differences_are_found(net, optimizer, rank)
    state = {f"{name}.{key}": X for name, p in net.named_parameters() for key, X in optimizer.state[p].items()}
    return {**{name: p.detach() for name, p in net.named_parameters()}, **state}


def check_that_differences_are_found(net: nn.Module, optimizer: ProjectedOptimizer, rank: int) -> None:
    """A bit of a weight, two values that have changed places in a basis, a code."""
    p = net.up.weight
    for name, X in (("up.weight", p.data), ("basis of up.weight", optimizer.state[p]["basis"])):
        before = X.clone()
        X[:1] += rank
        X[1:3] = X[1:3].flip(0) if rank else X[1:3]
        with pytest.raises(RuntimeError, match=rf"differ in 1 of \d+ tensors, the first of them {name}"):
            check_copies(net, optimizer)
        X.copy_(before)
    check_copies(net, optimizer)


def check_a_tied_weight() -> None:
    """DistributedDataParallel finds it by its last name."""
    net = nn.ModuleDict({"embedding": nn.Embedding(70, HIDDEN), "head": nn.Linear(HIDDEN, 70, bias=False)})
    net["head"].weight = net["embedding"].weight
    net.forward = lambda tokens: net["head"](net["embedding"](tokens))  # type: ignore[assignment]
    groups = [{"params": [("embedding.weight", net["embedding"].weight)], "rank": 8, "update_proj_gap": 100}]
    net.register_parameter("bias", nn.Parameter(torch.zeros(70)))  # DistributedDataParallel wants one of its own
    groups.append({"params": [("bias", net.bias)]})
    ignore_projected(net, groups)
    model = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = ProjectedOptimizer(groups, gradients="project", average_over=dist.group.WORLD)
    for _ in range(2):
        model(torch.arange(8) + dist.get_rank()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    check_copies(net, optimizer)


def check_what_is_refused() -> None:
    params = [nn.Parameter(torch.ones(8, 8)) for _ in range(2)]
    optimizer = ProjectedOptimizer([{"params": params, "rank": 2}], average_over=dist.group.WORLD)
    params[0].grad = torch.ones(8, 8)
    with pytest.raises(ValueError, match=r"1 of 2 projected parameters have no gradient.*freeze what is unused"):
        optimizer.step()
    params[1].requires_grad_(False)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(params[0].sum()).backward()
    with pytest.raises(ValueError, match=r"before average_over has averaged them.*use bfloat16"):
        scaler.step(optimizer)


def worker(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=COUNT)
    check_a_tied_weight()
    check_what_is_refused()
    torch.save({case: fit(case, rank, COUNT) for case in (*CASES, NEVER_WAITS)}, f"{file}.{rank}")
    leave_group()


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    file = str(tmp_path_factory.mktemp("copies") / "group")
    torch.multiprocessing.spawn(worker, (file,), nprocs=COUNT)
    return [torch.load(f"{file}.{rank}") for rank in range(COUNT)]


@pytest.mark.parametrize("case", [*CASES, NEVER_WAITS])
def test_copies_train_as_one(copies: list[dict[str, dict[str, Tensor]]], case: str) -> None:
    one = fit(case, 0, 1)
    first, second = (found[case] for found in copies)
    for key, X in one.items():
        assert torch.equal(first[key], second[key]), key  # bit by bit: or they would drift apart
        if key in dict(Net().named_parameters()):
            torch.testing.assert_close(
                first[key], X, rtol=0, atol=2e-4 if case == "int8" else 1e-5, msg=lambda text, n=key: f"{n}: {text}"
            )
        elif X.ndim == 0:
            assert first[key] == X, key


def test_a_combine_needs_whole_gradients() -> None:
    p = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="average_over=None"):
        ProjectedOptimizer([{"params": [p], "rank": 2}], combine=Fira(), average_over=object())
