"""Planned memory beside measured memory, for several models, presets and modes of `gradients`.

    python benchmarks/planner/run.py

Every row is planned once and measured twice, each time in a process of its own, over 3 real steps of the trainer's loop with
their refreshes:

    events      allocator events of torch.profiler(profile_memory=True) from before the model is built: bytes of the
                optimizer after 3 steps, and the most bytes at once during the steps
    resident    growth of the process's resident memory (VmHWM) over that before the model is built; once with glibc as it is and
                once with every block of 256 KiB or more given back to the system when freed

A row leaves a file in results/; what is there is not measured again. The tables of README.md are written from these files.
Linux with glibc only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import platform
import re
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from subspan.live import plain_tensors
from subspan.optim.optimizer import ProjectedOptimizer
from subspan.plan import plan_memory
from subspan.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from subspan.training.models import build_model
from subspan.training.optimizers import build_optimizer

HERE = Path(__file__).parent
MIB = 2**20
STEPS = 3
ADDRESS_SPACE = 6_000_000 * 1024  # as `ulimit -v 6000000`: a mistake ends the process, not the machine
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h

RANKS = {"llama-9m": 64, "llama-60m": 128, "llama-130m": 256, "llama-350m": 256}


@dataclass(frozen=True)
class Row:
    """One line of the table: one sequence of `tokens`, `micro_batches` times a step."""

    model: str
    preset: str
    gradients: str
    dtype: str = "bfloat16"
    micro_batches: int = 1
    checkpointing: bool = False
    tokens: int = 256

    @property
    def name(self) -> str:
        parts = [self.model, self.preset, self.gradients, self.dtype, f"x{self.micro_batches}"]
        return "_".join([*parts, "checkpointing"] if self.checkpointing else parts)

    def config(self) -> TrainConfig:
        # T = 3: with random first bases every basis is refreshed within the 3 steps
        optim = {"preset": self.preset, "gradients": self.gradients, "rank": RANKS[self.model], "update_proj_gap": 3}
        return TrainConfig(
            ModelConfig(name=self.model, dtype=self.dtype, activation_checkpointing=self.checkpointing),  # type: ignore[arg-type]
            DataConfig(seq_len=self.tokens),
            OptimConfig(**optim),  # type: ignore[arg-type]
            RunConfig(batch_size=self.micro_batches, micro_batch=1),
        )


ROWS = [
    *(
        Row(model, preset, gradients, dtype)
        for model in ("llama-9m", "llama-60m", "llama-130m")
        for preset, gradients in (
            ("galore", "hold"),
            ("galore8bit", "project"),
            ("qgalore", "update"),
            ("adamw", "hold"),
        )
        for dtype in ("bfloat16", "float32")
    ),
    Row("llama-60m", "galore", "project", micro_batches=4),
    Row("llama-130m", "galore8bit", "update", checkpointing=True),
    Row("llama-350m", "galore8bit", "project"),
]


# ---------------------------------------------------------------------------------------------------------- measuring


class Bench:
    """The trainer's model, optimizer and step, on random tokens."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def build_model(self) -> None:
        config = self.config
        torch.manual_seed(0)
        self.model = build_model(
            config.model.name, seq_len=config.data.seq_len, dtype=config.model.dtype, **int8(config)
        )
        self.model.train()
        if config.model.activation_checkpointing:
            self.model.activation_checkpointing_enable()
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        self.data = torch.randint(vocabulary, (config.run.batch_size, 1, config.data.seq_len))

    def build_optimizer(self) -> None:
        optimizer = build_optimizer(self.model, self.config)
        assert isinstance(optimizer, ProjectedOptimizer)
        self.optimizer = optimizer

    def step(self) -> None:
        total = torch.zeros(())
        for x in self.data.unbind():
            loss = self.model(input_ids=x, labels=x, use_cache=False).loss / len(self.data)
            total += loss.detach()
            loss.backward()
            del loss
        self.optimizer.prepare(total)
        self.optimizer.step()
        self.optimizer.zero_grad()


def int8(config: TrainConfig) -> dict[str, bool]:
    return {"int8": True} if config.int8_weights else {}


def warm_up() -> None:
    """What is made once a process, by whichever step is first: code pages, oneDNN's kernels, tables of codes."""
    for dtype in ("float32", "bfloat16"):
        for preset in ("galore8bit", "qgalore"):
            config = Row("llama-9m", preset, "project", dtype, tokens=16).config()
            config.model.overrides = {"vocab_size": 64, "num_hidden_layers": 1}
            bench = Bench(config)
            bench.build_model()
            bench.build_optimizer()
            bench.step()
            del bench
    gc.collect()


def measure_plan(row: Row) -> dict[str, Any]:
    begin = time.perf_counter()
    plan = plan_memory(row.config())
    return {**plan.as_dict(), "seconds": time.perf_counter() - begin, "resident_peak": resident("VmHWM")}


def measure_events(row: Row) -> dict[str, Any]:
    """Bytes, all from allocator events. The norm that step() leaves behind (4 bytes) is not state and is dropped."""
    warm_up()
    bench = Bench(row.config())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        bench.build_model()
        with record_function("MODEL BUILT"):
            bench.build_optimizer()
        with record_function("OPTIMIZER BUILT"):
            for _ in range(STEPS):
                bench.step()
            bench.optimizer.grad_norm = None  # type: ignore[assignment]
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    marks = {event.name(): event for event in events if event.name().endswith("BUILT")}
    memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")

    def before(moment: int) -> int:
        return sum(size for at, size in memory if at < moment)

    start = marks["OPTIMIZER BUILT"].start_ns()
    now = peak = before(start)
    for _, size in memory[sum(at < start for at, _ in memory) :]:
        now += size
        peak = max(peak, now)
    model = before(marks["MODEL BUILT"].start_ns())
    tokens = bench.data.untyped_storage().nbytes()
    weights = [X for p in (*bench.model.parameters(), *bench.model.buffers()) for X in plain_tensors(p)]
    left = (
        sum(X.untyped_storage().nbytes() for X in weights) + tokens - model
    )  # weights that were not there before, if any
    return {"weights": model - tokens, "optimizer": now - model - left, "peak": peak - tokens, "events": len(memory)}


def measure_resident(row: Row, holes: bool = True) -> dict[str, Any]:
    libc = ctypes.CDLL(None)
    if not holes:
        libc.mallopt(M_MMAP_THRESHOLD, 2**18)
    warm_up()
    bench = Bench(row.config())
    libc.malloc_trim(0)
    before = resident("VmRSS")
    bench.build_model()
    bench.build_optimizer()
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # else the peak would be that of building the model
    for _ in range(STEPS):
        bench.step()
    return {"before": before, "peak": resident("VmHWM") - before}


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS is resident now, VmHWM at its peak."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def measure(row: Row, what: str) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    torch.set_num_threads(1)
    return MEASUREMENTS[what](row)


MEASUREMENTS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "planned": measure_plan,
    "events": measure_events,
    "resident": measure_resident,
    "resident_without_holes": partial(measure_resident, holes=False),
}


# ------------------------------------------------------------------------------------------------------------- tables


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; MiB, and planned over measured."""
    lines = [
        "| model | preset | gradients | dtype | optimizer, planned - measured | peak planned, in | events | | resident | "
        "| resident, heap without holes | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        planned = result["planned"]
        mode = result["gradients"] + (f" x{result['micro_batches']}" if result["micro_batches"] > 1 else "")
        mode += ", checkpointing" if result["checkpointing"] else ""
        difference = planned["optimizer"] - result["events"]["optimizer"]
        cells = [f"{planned['peak'] / MIB:.1f}, {planned['peak_at']}"]
        for what in ("events", "resident", "resident_without_holes"):
            peak = result[what]["peak"]
            cells += [f"{peak / MIB:.1f}", f"{planned['peak'] / peak - 1:+.1%}"]
        first = [
            result["model"],
            result["preset"],
            mode,
            result["dtype"],
            f"{difference} B of {planned['optimizer']:,}",
        ]
        lines.append(f"| {' | '.join([*first, *cells])} |")
    return "\n".join(lines)


def write_tables() -> None:
    """The table of README.md, from results/*.json."""
    paths = [HERE / "results" / f"{row.name}.json" for row in ROWS]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    results = [result for result in results if all(what in result for what in MEASUREMENTS)]
    readme = HERE / "README.md"
    if results and readme.exists():
        text = re.sub(
            r"(<!-- table -->\n).*?(<!-- end -->)",
            rf"\g<1>{table(results)}\n\g<2>",
            readme.read_text(),
            flags=re.DOTALL,
        )
        readme.write_text(text)


def processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def main(only: str = "") -> None:
    """Measure what has no result yet, then write the table.

    Args:
        only: only rows whose name contains this, such as llama-130m or qgalore
    """
    (HERE / "results").mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    for row in ROWS:
        path = HERE / "results" / f"{row.name}.json"
        about = {"torch": torch.__version__, "processor": processor()}
        result = json.loads(path.read_text()) if path.exists() else {**asdict(row), **about}
        for what in MEASUREMENTS:
            if only in row.name and what not in result:
                with ProcessPoolExecutor(1, context) as pool:  # a process of its own for every measurement
                    result[what] = pool.submit(measure, row, what).result()
                path.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{row.name}: {what} {result[what]['peak'] / MIB:.1f} MiB", flush=True)
    write_tables()


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
