"""LLaMA-7B on a 24 GiB machine: a real model, real steps, the process's own peak memory.

    python benchmarks/train_7b/run.py                    # every row that has no result yet, one after the other
    python benchmarks/train_7b/run.py --rows '[a]'       # one of them

Each row builds a LLaMA with random weights, trains it for some steps on one batch that repeats, so that the loss must fall, and
writes results/ROW.json after every step: resident memory (VmHWM, the kernel's own peak) after the build and after each step,
loss, and where the time went. Every row runs in a process of its own with a limit on its address space (RLIMIT_AS). The
tables of README.md are written from these files. Linux with glibc only; needs the whole machine.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

# 13B of the LLaMA family: 5120, 13824, 40 heads, 40 layers. Between it and 7B: its width with fewer layers.
WIDE = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_key_value_heads": 40}


@dataclass(frozen=True)
class Row:
    """One run. A step is `micro_batches` times `tokens` tokens; overrides: of the model's configuration."""

    preset: str = "galore8bit"
    gradients: str = "update"
    checkpointing: bool = True
    micro_batches: int = 1
    rank: int = 1024
    proj_type: str = "std"
    steps: int = 5
    tokens: int = 256
    overrides: dict[str, Any] = field(default_factory=dict)


ROWS = {
    "a": Row(),
    "a_plain": Row(checkpointing=False, steps=3),
    "b": Row(
        gradients="project", micro_batches=8, rank=896, steps=2
    ),  # the largest multiple of 128 below 22.5 GiB with all leftovers
    "c": Row(preset="qgalore", steps=2),
    "d": Row(preset="qgalore", proj_type="reverse_std", steps=1, overrides=WIDE | {"num_hidden_layers": 40}),
}

LR, SCALE = 0.002, 0.25
GAP = 20  # T, short so that true refreshes are seen: from random bases, a twentieth of the matrices each step


def resident(key: str) -> int:
    """VmHWM (peak) or VmRSS of this process, bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", text)[1])  # type: ignore[index]


class Clock:
    """Seconds by name, of functions that are wrapped, inner ones taken out of outer ones."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inner = 0.0

    def __call__(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before, self.inner = self.inner, 0.0
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - begin
                self.seconds[name] = self.seconds.get(name, 0.0) + whole - self.inner
                self.inner = before + whole

        return timed


def configure(row: Row) -> Any:
    """The run of a row, as the trainer and the planner take it."""
    from subspan.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

    return TrainConfig(
        model=ModelConfig(
            name="llama-7b", dtype="bfloat16", overrides=row.overrides, activation_checkpointing=row.checkpointing
        ),
        data=DataConfig(seq_len=row.tokens),
        optim=OptimConfig(
            preset=row.preset,  # type: ignore[arg-type]
            gradients=row.gradients,  # type: ignore[arg-type]
            rank=row.rank,
            proj_type=row.proj_type,  # type: ignore[arg-type]
            lr=LR,
            dense_lr=LR * SCALE,
            scale=SCALE,
            update_proj_gap=GAP,
        ),
        run=RunConfig(steps=row.steps, warmup_steps=0, batch_size=row.micro_batches, micro_batch=1),
    )


def train(name: str, row: Row, address_space: float) -> None:
    """Build, train, and write what was seen; in a process of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (int(address_space * GIB),) * 2)
    libc = ctypes.CDLL("libc.so.6")
    # Freed gradients and activations of 2 MiB and more go back to the system at once, instead of becoming holes in the heap;
    # most of the optimizer's parts, 1 MiB, stay there: mapping their pages anew each time took as long as the arithmetic.
    libc.mallopt(M_MMAP_THRESHOLD, 2**21)
    libc.mallopt(M_TRIM_THRESHOLD, 2**25)

    from subspan.memory import count_memory
    from subspan.training.models import build_model
    from subspan.training.optimizers import build_optimizer

    torch.manual_seed(0)
    config = configure(row)
    result: dict[str, Any] = {
        "row": asdict(row),
        "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__, "libc": platform.libc_ver()[1]},
        "imported": resident("VmHWM"),
    }
    begin = time.perf_counter()
    model = build_model(
        config.model.name,
        dtype=config.model.dtype,
        overrides=config.model.overrides,
        seq_len=row.tokens,
        int8=config.int8_weights,
    )
    model.train()
    if row.checkpointing:
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)()
    result |= {"built": resident("VmHWM"), "build_seconds": time.perf_counter() - begin}
    optimizer = build_optimizer(model, config)
    gc.collect()
    libc.malloc_trim(0)
    bytes_ = count_memory(model, optimizer)
    result |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": asdict(bytes_),
        "ready": resident("VmRSS"),
        "optimizer_peak": resident("VmHWM"),
        "steps": [],
    }
    save(name, result)
    print(
        f"{name}: ready after {time.perf_counter() - begin:.0f} s, {result['ready'] / GIB:.2f} GiB resident", flush=True
    )

    clock = Clock()
    for method, label in (("project", "project"), ("apply", "rule and update"), ("_refresh_basis", "refresh")):
        setattr(optimizer, method, clock(label, getattr(optimizer, method)))
    batches = torch.randint(
        model.config.vocab_size, (row.micro_batches, 1, row.tokens), generator=torch.Generator().manual_seed(1)
    )
    forward = clock("forward", lambda batch: model(input_ids=batch, labels=batch, use_cache=False).loss)
    backward = clock("backward", lambda loss: loss.backward())
    step = clock("step, rest", optimizer.step)
    for number in range(1, row.steps + 1):
        clock.seconds.clear()
        refreshes = count_refreshes(optimizer)
        begin, total = time.perf_counter(), 0.0
        for batch in batches:
            loss = forward(batch) / row.micro_batches
            backward(loss)
            total += float(loss.detach())
        step()
        optimizer.zero_grad()
        seen = {
            "loss": total,
            "grad_norm": float(optimizer.grad_norm),
            "seconds": time.perf_counter() - begin,
            "split": {key: round(value, 2) for key, value in clock.seconds.items()},
            "refreshes": count_refreshes(optimizer) - refreshes,
            "peak": resident("VmHWM"),
            "resident": resident("VmRSS"),
        }
        result["steps"].append(seen)
        save(name, result)
        print(
            f"{name}: step {number} loss {total:.4f} {seen['seconds']:.0f} s peak {seen['peak'] / GIB:.2f} GiB {seen['split']}",
            flush=True,
        )


def count_refreshes(optimizer: Any) -> int:
    return int(sum(state["refreshes"] for state in optimizer.state.values() if "refreshes" in state))


def save(name: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def done(name: str, row: Row) -> bool:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return False
    result = json.loads(path.read_text())
    return result["row"] == asdict(row) and len(result.get("steps", ())) == row.steps


def main(rows: list[str] | None = None, address_space: float = 24.0, layers: int | None = None) -> None:
    """Run rows that have no result yet and write the tables.

    Args:
        rows: some of a, a_plain, b, c, d; none: all
        address_space: GiB that the process may map, libraries included
        layers: only so many, to try the script on a smaller machine
    """
    from table import write_tables

    for name in rows or ROWS:
        row = ROWS[name]
        if layers:
            row, name = replace(row, overrides=row.overrides | {"num_hidden_layers": layers}), f"{name}_{layers}_layers"
        if not done(name, row):
            process = multiprocessing.get_context("spawn").Process(target=train, args=(name, row, address_space))
            process.start()
            process.join()
            if process.exitcode:
                print(f"{name}: ended with exit code {process.exitcode}", flush=True)
    write_tables()


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
