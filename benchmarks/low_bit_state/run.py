"""What storing moments in few bits costs: error of the codes, and time of a step, beside bitsandbytes and torchao.

    python benchmarks/low_bit_state/run.py

Writes the tables of README.md. A package that is not installed, or has no kernel for this machine, is listed with the reason.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import subspan
from subspan.optim.books import code_book
from subspan.optim.quant import dequantize, quantize

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # every first step compiles

HERE = Path(__file__).parent
SHAPE = (1024, 4096)  # of R for a 4096 x 4096 weight at rank 1024, or of a dense weight
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------------------- error


def moments_of_training(steps: int = 50) -> tuple[Tensor, Tensor]:
    """First and second moment of Adam on gradients of a low rank with noise, whose rows differ by decades."""
    generator = torch.Generator().manual_seed(0)
    strength = torch.logspace(0, -3, SHAPE[0]).unsqueeze(1)
    m, v = torch.zeros(SHAPE), torch.zeros(SHAPE)
    for _ in range(steps):
        G = torch.randn(SHAPE[0], 16, generator=generator) @ torch.randn(16, SHAPE[1], generator=generator)
        G = strength * (G + torch.randn(SHAPE, generator=generator))
        m.lerp_(G, 0.1)
        v.mul_(0.999).addcmul_(G, G, value=0.001)
    return m, v


def errors() -> list[dict[str, Any]]:
    """Mean absolute error over mean absolute value, of 8-bit codes in blocks of 256."""
    import bitsandbytes as bnb

    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(SHAPE, generator=generator)
    heavy = normal * (2 * torch.randn(SHAPE, generator=generator)).exp()
    m, v = moments_of_training()
    inputs = {
        ("normal", True): normal,
        ("log-normal scale", True): heavy,
        ("first moment of Adam", True): m,
        ("normal, squared", False): normal.square(),
        ("log-normal scale, squared", False): heavy.square(),
        ("second moment of Adam", False): v,
    }
    rows = []
    for (name, signed), X in inputs.items():
        ours = dequantize(*quantize(X, 8, signed, 256), 8, signed, 256)
        codes, state = bnb.functional.quantize_blockwise(X, code=code_book(8, signed), blocksize=256)
        theirs = bnb.functional.dequantize_blockwise(codes, state)
        mean = X.abs().mean()
        rows.append(
            {
                "input": name,
                "signed": signed,
                "ours": float((ours - X).abs().mean() / mean),
                "bitsandbytes": float((theirs - X).abs().mean() / mean),
                "zero_ours": int(((ours == 0) & (X != 0)).sum()),
                "zero_bitsandbytes": int(((theirs == 0) & (X != 0)).sum()),
            }
        )
    return rows


# ----------------------------------------------------------------------------------------------------------------- time


def optimizers() -> dict[str, Callable[[nn.Parameter], Any]]:
    """AdamW, all parameters dense, in every way to keep its state."""

    def ours(state: torch.dtype, compiled: bool) -> Callable[[nn.Parameter], Any]:
        return lambda p: subspan.GaLoreAdamW([p], lr=1e-3, state_dtype=state, compile=compiled)

    rows: dict[str, Callable[[nn.Parameter], Any]] = {
        "torch, foreach": lambda p: torch.optim.AdamW([p], lr=1e-3, foreach=True),
        "torch, fused": lambda p: torch.optim.AdamW([p], lr=1e-3, fused=True),
    }
    for name, state in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("8 bits", torch.int8), ("4 bits", INT4)):
        for compiled in (False, True):
            rows[f"ours, {name}, {'compiled' if compiled else 'eager'}"] = ours(state, compiled)
    rows["bitsandbytes, 8 bits"] = bitsandbytes_8bit
    for bits in (8, 4):
        rows[f"torchao, {bits} bits"] = lambda p, bits=bits: torchao_adamw(p, bits)  # type: ignore[misc]
    return rows


def bitsandbytes_8bit(p: nn.Parameter) -> Any:
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit([p], lr=1e-3)


def torchao_adamw(p: nn.Parameter, bits: int) -> Any:
    from torchao import optim

    return {8: optim.AdamW8bit, 4: optim.AdamW4bit}[bits]([p], lr=1e-3)


def times(rounds: int) -> list[dict[str, Any]]:
    """Seconds of processor time of each step of a bf16 weight; rows take turns, so that a busy moment meets all."""
    grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows, running = [], []
    for name, build in optimizers().items():
        p = nn.Parameter(torch.zeros(SHAPE, dtype=torch.bfloat16))
        p.grad = grad.clone()
        row: dict[str, Any] = {"optimizer": name}
        rows.append(row)
        begin = time.perf_counter()
        try:
            optimizer = build(p)
            optimizer.step()
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        row["first_seconds"] = time.perf_counter() - begin
        row["seconds"] = []
        running.append((row, optimizer))
        print(name, f"{row['first_seconds']:.1f} s", flush=True)
    for _ in range(rounds):
        for row, optimizer in running:
            begin = time.process_time()
            optimizer.step()
            row["seconds"].append(time.process_time() - begin)
    return rows


# --------------------------------------------------------------------------------------------------------------- tables


def error_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| input | code book | ours | bitsandbytes | ours / bitsandbytes | not 0, read as 0: ours | bitsandbytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['input']} | {'signed' if row['signed'] else 'unsigned'} | {row['ours']:.6f} | {row['bitsandbytes']:.6f} "
            f"| {row['ours'] / row['bitsandbytes']:.5f} | {row['zero_ours']:,} | {row['zero_bitsandbytes']:,} |"
        )
    return "\n".join(lines)


def time_table(rows: list[dict[str, Any]]) -> str:
    base = next(median(row["seconds"]) for row in rows if row["optimizer"] == "torch, fused")
    lines = [
        "| AdamW | ns an element | over torch, fused | first step, s |",
        "|---|---|---|---|",
    ]
    elements = SHAPE[0] * SHAPE[1]
    for row in rows:
        if "seconds" in row:
            t = median(row["seconds"])
            lines.append(
                f"| {row['optimizer']} | {1e9 * t / elements:.1f} | {t / base:.2f} | {row['first_seconds']:.1f} |"
            )
        else:
            lines.append(f"| {row['optimizer']} | does not run: {row['reason']} | | |")
    return "\n".join(lines)


def main(rounds: int = 15) -> None:
    """Measure and write the tables.

    Args:
        rounds: steps of each optimizer that are timed
    """
    torch.set_num_threads(1)  # processor time, which other processes do not change, is then that of the work
    result = {"torch": torch.__version__, "errors": errors(), "times": times(rounds)}
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    path = HERE / "README.md"
    text = path.read_text()
    for marker, table in (("errors", error_table(result["errors"])), ("times", time_table(result["times"]))):
        text = re.sub(
            rf"(<!-- {marker} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
    path.write_text(text)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
