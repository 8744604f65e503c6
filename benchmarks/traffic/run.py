"""Bytes that cross processes in a step, counted: low-rank averages beside plain DistributedDataParallel, and FSDP2.

    python benchmarks/traffic/run.py

A LLaMA layer with its norms (no embedding, no head), two processes, gloo. Counted is what each collective gets: the sum that an
all-reduce makes, the input of a reduce-scatter, the output of an all-gather. What a ring sends of it, 2 (N - 1) / N of the first
and (N - 1) / N of the others a process, is the same factor for the rows that are compared.
"""

from __future__ import annotations

import json
import platform
import re
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import subspan
from subspan.distributed import ignore_projected, shard_along
from subspan.traffic import Traffic

HERE = Path(__file__).parent
HIDDEN, INTERMEDIATE, TOKENS = 512, 1376, 256
GAP = 3  # steps 0 and 3 refresh; what T = 200 makes of it is computed
RANK = HIDDEN // 4
ROWS = {
    "ddp": "DDP, whole gradients (AdamW)",
    "low_rank": "copies, low-rank averages (GaLore, r = d/4)",
    "fsdp": "FSDP2 along k (GaLore, r = d/4)",
}


def layer() -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaModel

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=8,
    )
    torch.manual_seed(0)
    model = LlamaModel(config)
    model.embed_tokens.weight.requires_grad_(False)
    return model


def setup(row: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = layer()
    groups = subspan.param_groups(model, rank=None if row == "ddp" else RANK, update_proj_gap=GAP, verbose=False)
    if row == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        along = shard_along(groups, dist.get_world_size())
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, shard_placement_fn=along)
        groups = subspan.param_groups(model, rank=RANK, update_proj_gap=GAP, verbose=False)
        return model, subspan.GaLoreAdamW(
            groups, lr=1e-3, gradients="project", refresh=subspan.Refresh(first="gradient")
        )
    if row == "ddp":
        return DistributedDataParallel(model), subspan.GaLoreAdamW(groups, lr=1e-3)
    ignore_projected(model, groups)
    optimizer = subspan.GaLoreAdamW(
        groups,
        lr=1e-3,
        gradients="project",
        refresh=subspan.Refresh(first="gradient"),
        average_over=dist.group.WORLD,
    )
    return DistributedDataParallel(model), optimizer


def parameters() -> dict[str, int]:
    """Bytes of all trained gradients, of R, and of what a refresh with one product sends: (k, r) and (d, r) a matrix."""
    model = layer()
    found = Counter(gradients=0, R=0, dense=0, k_r=0, d_r=0)
    for p in model.parameters():
        if p.requires_grad:
            found["gradients"] += 4 * p.numel()
            if p.ndim < 2:
                found["dense"] += 4 * p.numel()
                continue
            d, k = min(p.shape), max(p.shape)
            found.update(R=4 * RANK * k, k_r=4 * k * RANK, d_r=4 * d * RANK)
    return dict(found)


def worker(rank: int, port: int, count: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=count)
    found: dict[str, list[dict[str, int]]] = {}
    for row in ROWS:
        model, optimizer = setup(row)
        found[row] = []
        for step in range(GAP + 1):
            hidden = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(count * step + rank))
            with Traffic() as traffic:
                model(inputs_embeds=hidden).last_hidden_state.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            found[row].append({kind: size for (kind, _), size in traffic.payload.items()})
    if rank == 0:
        Path(file).write_text(json.dumps(found))
    dist.destroy_process_group()


def table(results: dict[str, Any]) -> str:
    lines = [
        "| | between refreshes, KiB | of DDP's | at a refresh, KiB | a step at T = 200, KiB | of DDP's |",
        "|---|---|---|---|---|---|",
    ]
    steps = results["steps"]
    whole = sum(steps["ddp"][1].values())
    for row, title in ROWS.items():
        between, refresh = (sum(steps[row][step].values()) for step in (GAP - 1, GAP))
        refresh = between if row == "ddp" else refresh
        mean = (199 * between + refresh) / 200
        lines.append(
            f"| {title} | {between / 1024:.1f} | {between / whole:.4f} | {refresh / 1024:.1f} | {mean / 1024:.1f} | "
            f"{mean / whole:.4f} |"
        )
    return "\n".join(lines)


def formula(results: dict[str, Any]) -> str:
    """What was counted beside what the sizes say."""
    steps, sizes = results["steps"], results["sizes"]
    counted = [sum(steps[row][step].values()) for row, step in (("ddp", 1), ("low_rank", 1), ("low_rank", GAP))]
    said = [sizes["gradients"], sizes["R"] + sizes["dense"], sizes["R"] + sizes["dense"] + sizes["k_r"] + sizes["d_r"]]
    names = (
        "DDP: whole gradients",
        "copies: R, and dense gradients",
        "copies at a refresh: and (k, r) and (d, r), for one product",
        "FSDP2 at a refresh, its sums: (d, r), for one product",
    )
    counted.append(steps["fsdp"][GAP]["sum"])  # beside FSDP's own gathers and scatters
    said.append(sizes["d_r"])
    lines = ["| | formula, bytes | counted, bytes | counted / formula |", "|---|---|---|---|"]
    for name, a, b in zip(names, said, counted, strict=True):
        lines.append(f"| {name} | {a:,} | {b:,} | {b / a:.4f} |")
    return "\n".join(lines)


def main(count: int = 2) -> None:
    """Count, and write the tables.

    Args:
        count: processes
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    file = HERE / "results.json"
    torch.multiprocessing.spawn(worker, (port, count, str(file)), nprocs=count)
    about = {"processes": count, "torch": torch.__version__, "machine": platform.machine()}
    results = {"about": about, "sizes": parameters(), "steps": json.loads(file.read_text())}
    file.write_text(json.dumps(results, indent=1) + "\n")
    readme = HERE / "README.md"
    text = readme.read_text()
    for name, content in (("table", table(results)), ("formula", formula(results))):
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{content}\n\g<2>", text, flags=re.DOTALL)
    readme.write_text(text)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
