"""Tokens a second of whole training steps: 8-bit GaLore beside fused AdamW and other packages, refreshes included.

    python benchmarks/end_to_end/run.py
    python benchmarks/end_to_end/run.py --models '[llama-130m]' --steps 5

LLaMA in bf16 with 4,096 tokens a step, rank a quarter of the hidden size, T = 200. Every method has its own copy of the model,
and they take turns, one step each, on the same batch. Leaves results/MODEL.json beside this file, where what is there is not
run again, and writes README.md's table and end_to_end.png.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import subspan
from subspan.training.models import LLAMA, build_model

HERE = Path(__file__).parent
RESULTS = HERE / "results"

TOKENS, SEQ_LEN = 4096, 256
BASE = "torch AdamW, fused"


def galore_torch(model: nn.Module, rank: int) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    names = {name for name, _ in subspan.param_groups(model, rank=rank, verbose=False)[0]["params"]}
    projected = [p for name, p in model.named_parameters() if name in names]
    dense = [p for name, p in model.named_parameters() if name not in names]
    group = {"params": projected, "rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    optimizer: torch.optim.Optimizer = GaLoreAdamW([{"params": dense}, group], lr=1e-4, no_deprecation_warning=True)
    return optimizer


def adamw8bit(model: nn.Module, rank: int) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(model.parameters(), lr=1e-4)
    return optimizer


def ours(model: nn.Module, rank: int) -> torch.optim.Optimizer:
    groups = subspan.param_groups(model, rank=rank, update_proj_gap=200, verbose=False)
    return subspan.GaLoreAdamW8bit(groups, 1e-4, gradients="project", compile=True)


METHODS: dict[str, Callable[[nn.Module, int], torch.optim.Optimizer]] = {
    BASE: lambda model, rank: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
    "subspan, 8-bit GaLore": ours,
    "bitsandbytes AdamW8bit": adamw8bit,
    "galore-torch GaLoreAdamW": galore_torch,
}


def one_step(model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor, micro_batch: int) -> dict[str, float]:
    """Seconds of a step, and of the optimizer's step() alone."""
    begin = time.perf_counter()
    for part in batch.split(micro_batch):
        loss = model(input_ids=part, labels=part, use_cache=False).loss
        (loss * (len(part) / len(batch))).backward()
    middle = time.perf_counter()
    optimizer.step()
    optimizer.zero_grad()
    end = time.perf_counter()
    return {"seconds": end - begin, "step": end - middle, "loss": loss.item()}


def measure(name: str, methods: list[str], steps: int, micro_batch: int) -> dict[str, Any]:
    rank = LLAMA[name]["hidden_size"] // 4
    batch = torch.randint(32000, (TOKENS // SEQ_LEN, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    running, reasons = {}, {}
    for method in methods:
        torch.manual_seed(0)
        model = build_model(name, dtype="bfloat16", seq_len=SEQ_LEN).train()
        try:
            optimizer = METHODS[method](model, rank)
            one_step(model, optimizer, batch, micro_batch)  # compiles, and pays galore-torch's SVDs of step 0
        except Exception as error:
            reasons[method] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        running[method] = (model, optimizer)
    seen: dict[str, list[dict[str, float]]] = {method: [] for method in running}
    for _ in range(steps):
        for method, (model, optimizer) in running.items():
            seen[method].append(one_step(model, optimizer, batch, micro_batch))
    return {"model": name, "rank": rank, "threads": torch.get_num_threads(), "steps": seen, "reasons": reasons}


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| model | method | tokens/s over AdamW's | optimizer's step(), share of its step |", "|---|---|---|---|"]
    for result in results:
        base = median(step["seconds"] for step in result["steps"][BASE])
        for method, steps in result["steps"].items():
            whole, own = (median(step[key] for step in steps) for key in ("seconds", "step"))
            lines.append(f"| {result['model']} | {method} | **{base / whole:.3f}** | {own / whole:.1%} |")
        lines += [
            f"| {result['model']} | {method} | does not run: {why} | |" for method, why in result["reasons"].items()
        ]
    return "\n".join(lines)


def draw(results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 3.5))
    for i, method in enumerate(METHODS):
        values = [
            median(s["seconds"] for s in result["steps"][BASE]) / median(s["seconds"] for s in result["steps"][method])
            if method in result["steps"]
            else 0
            for result in results
        ]
        ax.bar([x + 0.2 * i for x in range(len(results))], values, 0.2, label=method)
    ax.set_xticks([x + 0.3 for x in range(len(results))], [result["model"] for result in results])
    ax.set_ylabel("tokens/s over fused AdamW's")
    ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(HERE / "end_to_end.png", dpi=120)


def main(
    models: list[str] | None = None, methods: list[str] | None = None, steps: int = 7, micro_batch: int = 4
) -> None:
    """Measure what has no result yet, and write table and figure.

    Args:
        models: some of llama-130m, llama-350m; none: both
        methods: some of the methods, fused AdamW among them; none: all
        steps: timed steps of each method, after one that is not
        micro_batch: sequences in a forward and backward pass
    """
    RESULTS.mkdir(exist_ok=True)
    names = ["llama-130m", "llama-350m"]
    for name in models or names:
        file = RESULTS / f"{name}.json"
        if not file.exists():
            result = measure(name, methods or list(METHODS), steps, micro_batch) | {"torch": torch.__version__}
            file.write_text(json.dumps(result, indent=1) + "\n")
            print(name, "done", flush=True)
    results = [json.loads(file.read_text()) for file in (RESULTS / f"{name}.json" for name in names) if file.exists()]
    readme = HERE / "README.md"
    new = f"\\1{table(results)}\n\\2"
    readme.write_text(re.sub(r"(<!-- table -->\n).*?(<!-- end -->)", new, readme.read_text(), flags=re.S))
    draw(results)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
