"""Plans of several processes beside what such processes take and exchange: gloo on CPUs, 2 and 4 of them.

    python benchmarks/scaling/measured.py

Every row is planned once, and run for a few steps of the trainer's loop, twice. Bytes at once: allocator events of
torch.profiler(profile_memory=True) in the first process, in the fullest step. Bytes exchanged: of T steps, in which every basis
is refreshed once (subspan.traffic).
"""

from __future__ import annotations

import bisect
import gc
import json
import multiprocessing
import os
import platform
import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from subspan.cluster import pretended
from subspan.memory import count_memory
from subspan.optim.optimizer import ProjectedOptimizer
from subspan.plan import Planner
from subspan.traffic import Traffic
from subspan.training.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from subspan.training.models import build_model
from subspan.training.optimizers import build_optimizer, groups_of
from subspan.training.processes import Processes, make_mesh, shard_model

HERE = Path(__file__).parent
MIB = 2**20
GAP, VOCABULARY, TOKENS, SEQUENCES = 3, 2048, 256, 2
CHANNELS = ("gather", "scatter", "sum", "copy", "exchange")


@dataclass(frozen=True)
class Row:
    """SEQUENCES x TOKENS a pass of each process."""

    shard: int
    replicate: int
    preset: str = "galore"
    gradients: str = "hold"
    passes: int = 1
    model: str = "llama-9m"
    rank: int = 64

    @property
    def name(self) -> str:
        times = f"x{self.passes}" if self.passes > 1 else ""
        return f"{self.model} {self.preset} {self.gradients}{times} shard {self.shard} replicate {self.replicate}"

    def config(self) -> TrainConfig:
        count = self.shard * self.replicate
        return TrainConfig(
            model=ModelConfig(name=self.model, dtype="float32"),
            data=DataConfig(seq_len=TOKENS, vocab_size=VOCABULARY),
            optim=OptimConfig(
                preset=self.preset, rank=self.rank, update_proj_gap=GAP, gradients=self.gradients, compile=False
            ),
            run=RunConfig(batch_size=SEQUENCES * self.passes * count, micro_batch=SEQUENCES),
            parallel=ParallelConfig(self.shard, self.replicate),
        )


ROWS = (
    Row(1, 1),
    Row(2, 1),
    Row(4, 1),
    Row(4, 1, gradients="project", passes=2),
    Row(4, 1, gradients="update"),
    Row(2, 2),
    Row(2, 2, gradients="project", passes=2),
    Row(4, 1, preset="galore8bit", gradients="project"),
    Row(4, 1, preset="adamw"),
    Row(4, 1, preset="subspan"),
    Row(1, 2, gradients="project"),
    Row(1, 4, gradients="project", passes=2),
    Row(1, 4, preset="adamw"),
    Row(1, 4, preset="subspan"),
)


def build(config: TrainConfig) -> tuple[Callable[[], None], torch.nn.Module, ProjectedOptimizer]:
    """A step as the trainer makes it."""
    processes = Processes(config.parallel)
    torch.manual_seed(0)
    model = build_model(config.model.name, vocab_size=VOCABULARY, seq_len=TOKENS)
    if config.parallel.shard > 1:
        shard_model(model, groups_of(model, config.optim), make_mesh(config.parallel, "cpu"))
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, ProjectedOptimizer)
    copy = processes.copy(model, optimizer)
    generator = torch.Generator().manual_seed(processes.rank)

    def step() -> None:
        total = torch.zeros(())
        for i in range(config.accumulation):
            with copy.sync(last=i + 1 == config.accumulation):
                x = torch.randint(0, VOCABULARY, (SEQUENCES, TOKENS), generator=generator)
                loss = copy.model(input_ids=x, labels=x, use_cache=False).loss / config.accumulation
                total += loss.detach()
                loss.backward()
                del loss
        optimizer.prepare(total)
        optimizer.step()
        optimizer.zero_grad()

    return step, model, optimizer


def worker(rank: int, port: int, row: Row, what: str, queue: Any) -> None:
    config = row.config()
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": str(config.parallel.count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    if config.parallel.count > 1:
        dist.init_process_group(
            "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=config.parallel.count
        )
    found = {"bytes": measure_bytes, "traffic": measure_traffic}[what](config)
    if rank == 0:
        queue.put(found)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class Settled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """After every collective, waits until gloo's threads have let go of its tensors: the profiler does not see what they free."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for work in out if isinstance(out, (tuple, list)) else (out,):
            if func.namespace == "c10d" and isinstance(work, torch.ScriptObject):
                work.wait()
                time.sleep(0.005)
        return out


def measure_bytes(config: TrainConfig) -> dict[str, int]:
    first = int(os.environ["RANK"]) == 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) if first else nullcontext() as profiler:
        step, model, optimizer = build(config)
        gc.collect()
        for _ in range(GAP + 2):
            with record_function("STEP"), Settled():
                step()
    if profiler is None:
        return {}
    memory = count_memory(model, optimizer)
    events = list(profiler.profiler.kineto_results.events())
    starts = sorted(event.start_ns() for event in events if event.name() == "STEP")
    allocations = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    # Each step is counted from its own start: a free that was missed all the same does not add up.
    before = sum(size for at, size in allocations if at < starts[0])
    step_of = Counter[int]()
    peak = 0
    for at, size in sorted(allocations):
        number = bisect.bisect(starts, at)
        if number:
            step_of[number] += size
            peak = max(peak, before + step_of[number])
    return {"weights": memory.weights, "basis": memory.basis, "moments": memory.moments, "peak": peak}


def measure_traffic(config: TrainConfig) -> dict[str, int]:
    """Of T steps, in which every basis is refreshed once, and not for the first time."""
    step, _, _ = build(config)
    for _ in range(GAP + 1):
        step()
    with Traffic() as traffic:
        for _ in range(GAP):
            step()
    return by_kind(traffic.payload)


def by_kind(payload: Any) -> dict[str, int]:
    kinds = Counter[str]()
    for (kind, _), size in payload.items():
        kinds[kind] += size
    return by_order(kinds)


def by_order(kinds: Counter[str]) -> dict[str, int]:
    return {kind: kinds[kind] for kind in CHANNELS if kinds[kind]}


def plan(row: Row, queue: Any) -> None:
    config = row.config()
    with pretended(config.parallel):
        planner = Planner(VOCABULARY)
        planned = planner.plan(config)
        traffic = planner.traffic(config) if config.parallel.count > 1 else {}
    steps = Counter[str]()
    for payload in traffic.values():
        steps.update({kind: GAP * size for kind, size in by_kind(payload).items()})
    queue.put({
        "bytes": {key: getattr(planned, key) for key in ("weights", "basis", "moments", "peak")},
        "traffic": by_order(steps),
    })  # fmt: skip


def in_processes(count: int, target: Callable[..., None], *args: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=target, args=(*([i] if target is worker else []), *args, queue)) for i in range(count)
    ]
    for process in processes:
        process.start()
    found = queue.get(timeout=600)
    for process in processes:
        process.join()
    return found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def main(only: str = "") -> None:
    """Measure what has no result yet, then write the tables.

    Args:
        only: rows whose name contains this
    """
    (HERE / "results").mkdir(exist_ok=True)
    for row in ROWS:
        file = result_file(row)
        result = json.loads(file.read_text()) if file.exists() else {}
        if only not in row.name or {"bytes", "traffic"} <= result.get("measured", {}).keys():
            continue
        count = row.config().parallel.count
        result["planned"] = in_processes(1, plan, row)
        measured = result.setdefault("measured", {})
        for what in {"bytes", "traffic"} - measured.keys():
            measured[what] = in_processes(count, worker, free_port(), row, what)
        result["about"] = {"torch": torch.__version__, "machine": platform.machine()}
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(row.name, flush=True)
    write_tables()


def write_tables() -> None:
    """The tables of README.md, from results/*.json."""
    found = [(row, json.loads(path.read_text())) for row in ROWS if (path := result_file(row)).exists()]
    memory = [
        "| shard x replicate | preset, gradients | weights, MiB | basis | moments | peak, planned | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    traffic = [
        "| shard x replicate | preset, gradients | gathered, KiB: planned, measured | scattered | summed | copied |",
        "|---|---|---|---|---|---|",
    ]
    for row, result in found:
        planned, measured = result["planned"], result["measured"]
        name = f"| {row.shard} x {row.replicate} | {row.preset}, {row.gradients}{f' x{row.passes}' if row.passes > 1 else ''}"
        parts = [exact(planned["bytes"][key], measured["bytes"][key], MIB) for key in ("weights", "basis", "moments")]
        peaks = planned["bytes"]["peak"], measured["bytes"]["peak"]
        parts += [f"{peaks[0] / MIB:.2f}", f"{peaks[1] / MIB:.2f}"]
        memory.append(f"{name} | {' | '.join(parts)} |")
        if row.shard * row.replicate > 1:
            cells = []
            for kind in CHANNELS:
                both = [found["traffic"].get(kind, 0) for found in (planned, measured)]
                cells.append(f"{both[0] / 1024:,.1f}, {both[1] / 1024:,.1f}" if any(both) else "-")
            traffic.append(f"{name} | {' | '.join(cells)} |")
    readme = HERE / "README.md"
    text = readme.read_text()
    for name, lines in (("memory", memory), ("traffic", traffic)):
        content = "\n".join(lines)
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{content}\n\g<2>", text, flags=re.DOTALL)
    readme.write_text(text)


def exact(planned: int, measured: int, unit: int) -> str:
    """One number if both are the same."""
    return f"{planned / unit:.2f}" if planned == measured else f"{planned / unit:.2f} ({measured / unit:.2f} measured)"


def result_file(row: Row) -> Path:
    return HERE / "results" / f"{row.name.replace(' ', '_')}.json"


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
