"""Does a step ever stall? Operations and time of optimizer steps, from the first one over two refresh intervals.

    python benchmarks/stalls/run.py

The matrices of LLaMA 60M with random gradients, rank 128, T = 100. Operations are those of products, by torch's counter, and
of QR and SVD by the usual formulas. The methods take turns in the timed steps. Writes results.json, README.md's table and
stalls.png.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import subspan

HERE = Path(__file__).parent

SHAPES = ([(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]) * 8
RANK, GAP = 128, 100
BASE = "torch AdamW, fused"


def galore_torch(group: dict[str, Any]) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    optimizer: torch.optim.Optimizer = GaLoreAdamW([group], lr=1e-4, no_deprecation_warning=True)
    return optimizer


METHODS: dict[str, Callable[[dict[str, Any]], torch.optim.Optimizer]] = {
    BASE: lambda group: torch.optim.AdamW(group["params"], lr=1e-4, fused=True),
    "subspan": lambda group: subspan.GaLoreAdamW([group], 1e-4, refresh=subspan.Refresh(first="random")),
    "subspan, all at once as in the paper": lambda group: subspan.GaLoreAdamW([group], 1e-4),
    "galore-torch": galore_torch,
}


def make(name: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    group = {"params": params, "rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    return params, METHODS[name](group)


def draw_gradients(params: list[nn.Parameter], generator: torch.Generator) -> None:
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def _qr(shape: torch.Size, *_: Any, **__: Any) -> int:
    """R and Q, 2 d r^2 each to leading order (Golub and Van Loan, Matrix Computations, 5.2)."""
    return 4 * shape[-2] * shape[-1] ** 2


def _svd(shape: torch.Size, *_: Any, **__: Any) -> int:
    """Thin U, S and V (Golub and Van Loan, 8.6)."""
    long, short = max(shape[-2:]), min(shape[-2:])
    return 14 * long * short**2 + 8 * short**3


def operations(name: str, steps: int) -> list[int]:
    params, optimizer = make(name)
    generator, counts = torch.Generator().manual_seed(0), []
    formulas = {torch.ops.aten.linalg_qr: _qr, torch.ops.aten._linalg_svd: _svd}
    for _ in range(steps):
        draw_gradients(params, generator)
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            optimizer.step()
        counts.append(counter.get_total_flops())
    return counts


def times(steps: int) -> dict[str, list[float]]:
    running = {name: make(name) for name in METHODS}
    seen: dict[str, list[float]] = {name: [] for name in METHODS}
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for name, (params, optimizer) in running.items():
            draw_gradients(params, generator)
            begin = time.perf_counter()
            optimizer.step()
            seen[name].append(time.perf_counter() - begin)
    return seen


def spread(values: list[float]) -> float:
    """The 99.5th percentile over the median."""
    return quantiles(values, n=200, method="inclusive")[-1] / median(values)


def table(result: dict[str, Any]) -> str:
    lines = [
        "| optimizer | operations: largest over median | time: largest over median | its 99.5th percentile over median "
        "| that over AdamW's |",
        "|---|---|---|---|---|",
    ]
    base = spread(result["seconds"][BASE])
    for name, seconds in result["seconds"].items():
        counts = result["operations"].get(name)
        work = f"**{max(counts) / median(counts):.2f}**" if counts else "-"
        largest, share = max(seconds) / median(seconds), spread(seconds)
        lines.append(f"| {name} | {work} | {largest:.1f} | {share:.2f} | **{share / base:.2f}** |")
    return "\n".join(lines)


def draw(result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 3.5))
    for name, seconds in result["seconds"].items():
        ax.semilogy([value / median(seconds) for value in seconds], label=name, linewidth=0.8)
    ax.set(xlabel="step", ylabel="time of a step / median")
    ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(HERE / "stalls.png", dpi=120)


def main(steps: int = 2 * GAP + 5) -> None:
    """Measure, and write table and figure.

    Args:
        steps: of each optimizer, counted and timed
    """
    # galore-torch does the same every T steps: T + 1 are enough to count.
    counted = {name: operations(name, min(steps, GAP + 1)) for name in METHODS if name != BASE}
    result = {
        "operations": counted,
        "seconds": times(steps),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    readme = HERE / "README.md"
    new = f"\\1{table(result)}\n\\2"
    readme.write_text(re.sub(r"(<!-- table -->\n).*?(<!-- end -->)", new, readme.read_text(), flags=re.S))
    draw(result)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
