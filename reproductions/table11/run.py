"""Table 11 of the GaLore paper (arXiv 2403.03507): memory and tokens/s of four optimizers, with and without per-layer updates.

    python reproductions/table11/run.py

LLaMA 1B in bf16, one batch of 256 random tokens, no activation checkpointing: two full-rank optimizers in 16 bits, 8-bit Adam
and 8-bit GaLore, each with gradients="hold" (the paper's "no per-layer updates") and "update" ("per-layer"). Every row is a
process of its own with its own peak of resident memory, under a limit on its address space, and leaves a file in results/
beside this file; what is there is not run again. The table of README.md is written from these files. Linux with glibc only.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import re
import resource
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

TOKENS = 256
STEPS = 3  # timed; one before them is not
# The optimizer's sweep. Memory is that of the first round: a compiler in the process takes its own.
ROUNDS = ("eager", "compiled")

# What differs, and what the paper measured: GB and tokens a second, without and with per-layer updates.
METHODS: dict[str, dict[str, Any]] = {
    "AdamW": {"preset": "adamw", "state_dtype": "bfloat16"},
    "Adafactor": {"preset": "adamw", "dense_rule": "adafactor", "state_dtype": "bfloat16"},
    "8-bit Adam": {"preset": "adamw8bit"},
    "8-bit GaLore": {"preset": "galore8bit", "rank": 512},
}
PAPER = {
    "AdamW": {"hold": (13.60, 1256.98), "update": (9.63, 1354.37)},
    "Adafactor": {"hold": (13.15, 581.02), "update": (10.32, 613.90)},
    "8-bit Adam": {"hold": (9.54, 1569.89), "update": (6.93, 1205.31)},
    "8-bit GaLore": {"hold": (7.95, 1109.38), "update": (5.63, 1019.63)},
}


def configure(method: str, gradients: str, sweep: str) -> Any:
    """A row as the trainer and the planner take it. T = 200: the timed steps have no refresh in `hold`, one each in `update`."""
    from subspan.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

    return TrainConfig(
        model=ModelConfig(name="llama-1b", dtype="bfloat16", overrides={"vocab_size": 32000}),
        data=DataConfig(seq_len=TOKENS),
        optim=OptimConfig(gradients=gradients, lr=1e-3, compile=sweep == "compiled", **METHODS[method]),  # type: ignore[arg-type]
        run=RunConfig(steps=1 + STEPS, warmup_steps=0, batch_size=1, micro_batch=1),
    )


def measure(method: str, gradients: str, sweep: str, queue: Any) -> None:
    """Build, train, and report peak resident bytes above those of the imports, seconds of each step and of its optimizer."""
    resource.setrlimit(resource.RLIMIT_AS, (22 * GIB,) * 2)
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, 2**21)  # freed blocks of that size go back to the system instead of becoming holes
    libc.mallopt(M_TRIM_THRESHOLD, 2**25)

    from subspan.memory import count_memory, peak_memory
    from subspan.plan import plan_memory
    from subspan.training.models import build_model
    from subspan.training.optimizers import build_optimizer

    torch.manual_seed(0)
    config = configure(method, gradients, sweep)
    imported = peak_memory()
    model = build_model(config.model.name, dtype="bfloat16", overrides=config.model.overrides, seq_len=TOKENS).train()
    optimizer = build_optimizer(model, config)
    batch = torch.randint(32000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    losses, seconds, stepping = [], [], []
    for _ in range(1 + STEPS):
        begin = time.perf_counter()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        middle = time.perf_counter()
        libc.malloc_trim(0)  # what activations leave is no optimizer's memory
        before_step = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        end = time.perf_counter()
        losses.append(loss.item())
        seconds.append(middle - begin + end - before_step)
        stepping.append(end - before_step)
    peak, bytes_ = peak_memory() - imported, count_memory(model, optimizer)
    queue.put(
        {
            "peak": peak,
            "imported": imported,
            "planned": plan_memory(config).peak,
            "weights": bytes_.weights,
            "optimizer": bytes_.optimizer,
            "losses": losses,
            "seconds": seconds[1:],
            "step_seconds": stepping[1:],
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
    )


def run(method: str, gradients: str, sweep: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(method, gradients, sweep, queue), daemon=True)
    process.start()
    while process.is_alive() and queue.empty():
        process.join(1)
    if queue.empty():
        raise RuntimeError(f"{method}, {gradients}, {sweep} died, see above")
    result: dict[str, Any] = queue.get()
    process.join()
    return result


def table(results: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """Ratios are to AdamW without per-layer updates, of the same round: the machine's pace drifts."""
    if ("AdamW", "hold", ROUNDS[0]) not in results:
        return ""
    lines = [
        "| method | per-layer | weights | optimizer | peak | planned | peak / AdamW's | paper "
        "| tokens/s / AdamW's, eager | compiled | paper |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, modes in PAPER.items():
        for gradients, paper in modes.items():
            first = results.get((method, gradients, ROUNDS[0]))
            if first is None:
                continue
            paces = []
            for sweep in ROUNDS:
                one, base = (
                    results.get((name, mode, sweep)) for name, mode in ((method, gradients), ("AdamW", "hold"))
                )
                paces.append(f"**{median(base['seconds']) / median(one['seconds']):.2f}**" if one and base else "")
            memory, speed = (value / of for value, of in zip(paper, PAPER["AdamW"]["hold"], strict=True))
            cells = [
                method,
                "yes" if gradients == "update" else "no",
                *(f"{first[key] / GIB:.2f}" for key in ("weights", "optimizer", "peak", "planned")),
                f"**{first['peak'] / results['AdamW', 'hold', ROUNDS[0]]['peak']:.2f}**",
                f"{memory:.2f}",
                *paces,
                f"{speed:.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the rows that have no result yet and write the table."""
    RESULTS.mkdir(exist_ok=True)
    path = HERE / "README.md"
    results: dict[tuple[str, str, str], dict[str, Any]] = {}
    for sweep in ROUNDS:
        for method, modes in PAPER.items():
            for gradients in modes:
                file = RESULTS / f"{method.replace(' ', '_')}_{gradients}_{sweep}.json"
                if not file.exists():
                    file.write_text(json.dumps(run(method, gradients, sweep), indent=1) + "\n")
                result = results[method, gradients, sweep] = json.loads(file.read_text())
                print(f"{file.stem}: {result['peak'] / GIB:.2f} GiB, {median(result['seconds']):.1f} s", flush=True)
                text = re.sub(
                    r"(<!-- rows -->\n).*?(<!-- end -->)",
                    lambda m: f"{m[1]}{table(results)}\n{m[2]}",
                    path.read_text(),
                    flags=re.S,
                )
                path.write_text(text)


if __name__ == "__main__":
    main()
