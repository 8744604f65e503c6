"""Plans of several processes: what lies on each and what it sends is what real processes have and exchange."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_cli import run

from subspan import budget
from subspan.cluster import Sent, layout, plan_traffic, pretended, sent_of
from subspan.live import LiveBytes
from subspan.memory import count_memory
from subspan.plan import MemoryPlan, Planner
from subspan.traffic import Payload, Traffic
from subspan.training.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from subspan.training.models import LLAMA, build_model
from subspan.training.optimizers import build_optimizer, groups_of
from subspan.training.processes import Processes, leave_group, make_mesh, shard_model

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 96,
}
RANK, GAP, TOKENS = 16, 2, 16
OPTIMS: dict[str, dict[str, Any]] = {
    "galore": {"gradients": "hold"},
    "project": {"gradients": "project", "update_proj_gap": 100},
    "galore8bit": {"preset": "galore8bit", "gradients": "project", "update_proj_gap": 100},
    "adamw": {"preset": "adamw"},
    "subspan": {"preset": "subspan"},
}


def make_config(shard: int, replicate: int, passes: int = 1, **optim: Any) -> TrainConfig:
    count = shard * replicate
    return TrainConfig(
        ModelConfig(name="llama-9m", overrides=dict(SHAPE)),
        DataConfig(seq_len=TOKENS),
        OptimConfig(**{"rank": RANK, "update_proj_gap": GAP, "compile": False, **optim}),
        RunConfig(batch_size=passes * count, micro_batch=1),
        ParallelConfig(shard, replicate),
    )


def plan_of(config: TrainConfig) -> tuple[MemoryPlan, dict[str, Payload]]:
    with pretended(config.parallel):
        planner = Planner()
        return planner.plan(config), planner.traffic(config) if config.parallel.count > 1 else {}


def by_kind(*payloads: Payload) -> dict[str, int]:
    kinds = Counter[str]()
    for payload in payloads:
        for (kind, _), size in payload.items():
            kinds[kind] += size
    return {kind: size for kind, size in kinds.items() if size}


# ------------------------------------------------------------------------------------------------- planned = measured


def measured(shard: int, replicate: int, passes: int, optim: dict[str, Any]) -> dict[str, Any]:
    """In one of several processes: bytes of state, and what a step without a refresh exchanges."""
    config = make_config(shard, replicate, passes, **optim)
    processes = Processes(config.parallel)
    model = build_model("llama-9m", overrides=SHAPE)
    if shard > 1:
        shard_model(model, groups_of(model, config.optim), make_mesh(config.parallel, "cpu"))
    optimizer: Any = build_optimizer(model, config)
    copy = processes.copy(model, optimizer)
    ids = torch.arange(TOKENS)[None]
    found = {}
    for _ in range(4):
        due = [optimizer.refresh_due(p) for group in optimizer.param_groups if "rank" in group for p in group["params"]]
        with Traffic() as traffic:
            for i in range(passes):
                with copy.sync(last=i + 1 == passes):
                    copy.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.prepare()
            optimizer.step()
            optimizer.zero_grad()
        found["refresh" if any(due) else "plain"] = by_kind(traffic.payload)
    memory = count_memory(model, optimizer)
    return {**found, "bytes": [memory.weights, memory.basis, memory.moments]}


CASES = [
    (2, 1, 1, "galore"),
    (2, 1, 2, "project"),
    (2, 1, 1, "galore8bit"),
    (2, 1, 1, "subspan"),
    (1, 2, 1, "galore"),
    (1, 2, 2, "project"),
    (1, 2, 1, "adamw"),
]


def worker(rank: int, store: str, file: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = [measured(*case[:3], OPTIMS[case[3]]) for case in CASES]
    if rank == 0:
        Path(file).write_text(json.dumps(found))
    leave_group()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(worker, (str(folder / "store"), str(folder / "found")), nprocs=2)
    return json.loads((folder / "found").read_text())


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_a_plan_is_what_processes_have_and_exchange(real: list[dict[str, Any]], number: int) -> None:
    shard, replicate, passes, name = CASES[number]
    found = real[number]
    plan, traffic = plan_of(make_config(shard, replicate, passes, **OPTIMS[name]))
    assert [plan.weights, plan.basis, plan.moments] == found["bytes"]
    planned = by_kind(traffic["passes"], traffic["optimizer"])
    assert set(planned) == set(found["plain"])
    for kind, size in planned.items():
        assert size == pytest.approx(found["plain"][kind], rel=1e-3, abs=512), kind  # norms, a number each
    if name == "galore":  # all refreshed in one step
        more = found["refresh"]["sum"] - found["plain"]["sum"]
        assert GAP * by_kind(traffic["refreshes"])["sum"] == pytest.approx(more, rel=1e-3, abs=1024)


# ------------------------------------------------------------------------------------------------------------ formulas


def test_parts_add_up_and_the_basis_is_on_each() -> None:
    alone, _ = plan_of(make_config(1, 1, **OPTIMS["galore"]))
    for count in (2, 4, 8):
        plan, _ = plan_of(make_config(count, 1, **OPTIMS["galore"]))
        assert plan.parameters == alone.parameters
        assert plan.basis == alone.basis
        assert count * plan.weights == pytest.approx(alone.weights, rel=0.01)
        assert count * plan.moments == pytest.approx(alone.moments, rel=0.01)
        assert plan.peak < alone.peak


def test_low_rank_averages_are_r_over_d_of_all_gradients() -> None:
    model = build_model("llama-9m", overrides=SHAPE, device="meta")
    dense = sum(p.nbytes for name, p in model.named_parameters() if "layers" not in name or p.ndim < 2)
    matrices = sum(p.nbytes for p in model.parameters()) - dense
    for mode in ("hold", "project"):
        _, traffic = plan_of(make_config(1, 4, 2, gradients=mode))
        assert by_kind(traffic["passes"])["sum"] == dense
        assert by_kind(traffic["optimizer"])["sum"] == pytest.approx(matrices * RANK / 64, rel=0.01)
    _, traffic = plan_of(make_config(1, 4, 2, preset="adamw"))
    assert by_kind(traffic["passes"])["sum"] == dense + matrices


def test_muon_sums_a_square_of_each_matrix_five_times() -> None:
    """And exchanges, there and back, what FSDP2 has cut along its shorter dimension."""
    model = build_model("llama-9m", overrides=SHAPE, device="meta")
    matrices = [p for name, p in model.named_parameters() if "layers" in name and p.ndim == 2]
    optimizer = plan_of(make_config(4, 1, **OPTIMS["subspan"]))[1]["optimizer"]
    squares = sum(min(p.shape) ** 2 * p.element_size() for p in matrices)
    assert by_kind(optimizer)["sum"] == pytest.approx(5 * squares, rel=0.01)
    across = sum(p.nbytes for p in matrices if p.shape[0] < p.shape[1])
    assert by_kind(optimizer)["exchange"] == pytest.approx(2 * across / 4, rel=0.01)


def test_fsdp_gathers_and_scatters_in_every_pass() -> None:
    once, twice = (plan_of(make_config(4, 1, passes, **OPTIMS["galore"]))[1]["passes"] for passes in (1, 2))
    assert {place: 2 * size for place, size in once.items()} == dict(twice)
    everyone = (0, 1, 2, 3)
    weights = sum(p.nbytes for p in build_model("llama-9m", overrides=SHAPE, device="meta").parameters())
    assert once["scatter", everyone] == pytest.approx(weights, rel=0.01)
    assert weights < once["gather", everyone] <= 2 * weights


def test_copies_of_parts_exchange_parts() -> None:
    _, traffic = plan_of(make_config(2, 2, **OPTIMS["galore"]))
    passes = traffic["passes"]
    assert passes["sum", (0, 2)] == passes["scatter", (0, 1)] // 2
    nodes = {gpus: sent_of(passes, gpus) for gpus in (2, 4)}
    assert nodes[4].between == 0 < nodes[4].within
    assert nodes[2].between == passes["sum", (0, 2)]  # 2 (N - 1) / N of it, N = 2
    assert nodes[2].within + nodes[2].between == nodes[4].within


@pytest.mark.parametrize(
    ("kind", "share"), [("sum", 2 * 3 / 4), ("scatter", 3 / 4), ("gather", 3 / 4), ("copy", 3 / 4)]
)
def test_what_a_ring_sends(kind: str, share: float) -> None:
    payload = {(kind, (0, 1, 2, 3)): 1000}
    assert sent_of(payload, 4) == Sent(within=1000 * share)
    assert sent_of(payload, 2) == Sent(between=1000 * share)


def test_layouts() -> None:
    assert layout(2, 8) == ParallelConfig(16, 1)
    assert layout(2, 8, 8) == ParallelConfig(8, 2)
    assert layout(2, 8, 1) == ParallelConfig(1, 16)


def test_nothing_is_left_behind() -> None:
    with contextlib.suppress(RuntimeError), pretended(ParallelConfig(2, 1)):
        assert dist.get_world_size() == 2
        raise RuntimeError
    assert not dist.is_initialized()
    with (
        pretended(ParallelConfig(2, 1)),
        pytest.raises(ValueError, match="there is one"),
        pretended(ParallelConfig(2, 1)),
    ):
        pass


def test_the_first_plan_of_a_process_is_as_the_next() -> None:
    """In a process of its own: DTensor keeps what it has tried once."""
    code = (
        "from test_cluster import make_config, plan_of; "
        "print(*(plan_of(make_config(2, 1, gradients='project'))[0].peak for _ in range(2)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert found.returncode == 0, found.stderr
    first, second = found.stdout.split()
    assert first == second


def test_storages_that_are_resized_are_counted() -> None:
    X = torch.empty(100)
    with LiveBytes([X]) as live:
        Y = torch.empty(50)
        assert live.bytes == {"kept": 400, "gradients": 0, "activations": 0, "temporaries": 200}
        Y.untyped_storage().resize_(0)
        assert live.bytes["temporaries"] == 0
        X.untyped_storage().resize_(800)
        assert (live.bytes["kept"], live.bytes["temporaries"], live.peak) == (0, 800, 800)
        del Y
    del X
    assert live.bytes["temporaries"] == 0
    Z = torch.empty(10)
    Z.untyped_storage().resize_(0)  # nobody looks any more
    assert live.now == 0


# --------------------------------------------------------------------------------------------------------- the command

WORDS = ["plan", "--model", "llama-2m", "--rank", "32", "--seq-len", "64"]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*WORDS, "--nodes", "2", "--gpus-per-node", "2", "--shard", "2") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("4 processes on 2 nodes: 2 parts, 2 copies; of each process:")
    for row in ("weights and gradients", "optimizer", "refreshes, mean over T", "in all"):
        assert re.search(rf"{row} +[\d.]+ GiB +[\d.]+ GiB", shown)


def json_of(capsys: pytest.CaptureFixture[str], *words: str) -> Mapping[str, Any]:
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, *WORDS, "--gpus-per-node", "4")
    assert (found["parallel"]["shard"], found["parallel"]["replicate"]) == (4, 1)
    assert found["parallel"]["sent"]["passes"]["within"] > 0 == found["parallel"]["sent"]["passes"]["between"]
    assert found["micro_batch"] == 1


def test_a_recipe_of_several_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {name: llama-2m}\ndata: {seq_len: 64}\noptim: {rank: 32}\n"
        "run: {batch_size: 16, micro_batch: 2}\nparallel: {shard: 2, replicate: 2}\n"
    )
    found = json_of(capsys, "plan", "--config", str(recipe))
    assert (found["parallel"]["shard"], found["micro_batch"], found["accumulation"]) == (2, 2, 2)
    found = json_of(capsys, "plan", "--config", str(recipe), "--gpus-per-node", "4", "--shard", "1")
    assert (found["parallel"]["replicate"], found["accumulation"]) == (4, 2)


def test_a_recipe_on_other_processes_is_what_they_would_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {name: llama-2m}\ndata: {seq_len: 64}\noptim: {rank: 32}\nrun: {batch_size: 16, micro_batch: 4}\n"
    )
    words = ["plan", "--config", str(recipe), "--shard", "2"]
    found = [json_of(capsys, *words, *more) for more in ([], ["--micro-batch", "2"], ["--accumulation", "1"])]
    assert [(row["micro_batch"], row["accumulation"]) for row in found] == [(4, 2), (2, 4), (4, 1)]


def test_nodes_without_their_gpus_have_those_that_share_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*WORDS, "--nodes", "2", "--shard", "2") == 0
    assert capsys.readouterr().out.startswith("4 processes on 2 nodes: 2 parts, 2 copies; of each process:")


def test_the_largest_model_of_a_budget(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LLAMA", {name: LLAMA[name] for name in ("llama-2m", "llama-9m", "llama-60m")})
    words = ["plan", "--budget", "300MiB", "--seq-len", "64", "--preset", "adamw", "--micro-batch", "1"]
    sizes = [json_of(capsys, *words, *more)["fits"][0]["model"] for more in ([], ["--gpus-per-node", "4"])]
    assert sizes == ["llama-9m", "llama-60m"]


def test_a_plan_says_what_the_sent_bytes_are() -> None:
    config = make_config(2, 1, **OPTIMS["galore"])
    with pretended(config.parallel):
        rows = plan_traffic(Planner(), config, gpus_per_node=2)
    assert list(rows) == ["passes", "optimizer", "refreshes"]
    assert rows["passes"].within > rows["optimizer"].within > 0
