"""LLaMA-7B and 13B on a GPU that may use 24 GB: peaks beside `subspan plan`, and time beside AdamW.

    python benchmarks/train_7b_gpu/run.py                      # every row that has no result yet
    python benchmarks/train_7b_gpu/run.py --rows '[a, fused]'
    python benchmarks/train_7b_gpu/run.py --table true         # README.md's table alone, for which no GPU is needed

Each row builds a model with random weights on the GPU and trains it on one batch of random tokens that repeats, so that the
loss must fall. The allocator is held to 24 GB less what the process takes beside it (the CUDA context), but for the baselines
that need more. All rows of a call share a process. Leaves results/ROW.json: peaks of the allocator and of the device, seconds
of each step (the device waited for), losses, and the planner's word.
"""

from __future__ import annotations

import gc
import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before torch: fewer holes
import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
GIB = 2**30
LIMIT = 24e9
LR, SCALE = 0.002, 0.25
GAP = 200


@dataclass(frozen=True)
class Row:
    """One run. A step is `micro_batches` sequences of `tokens`; package: a baseline in place of the preset's optimizer."""

    preset: str = "galore8bit"
    gradients: str = "update"
    micro_batches: int = 1
    tokens: int = 4096
    rank: int = 1024
    proj_type: str = "std"
    model: str = "llama-7b"
    dense_state_dtype: str | None = None
    clip: float | None = None
    package: str | None = None
    steps: int = 8


ROWS = {
    "a": Row(tokens=256),
    "b": Row(),
    "c": Row(gradients="project", micro_batches=8, tokens=512, rank=768, clip=1.0),
    "d": Row(preset="subspan", dense_state_dtype="int8"),
    "e": Row(preset="qgalore"),
    "f": Row(preset="qgalore", proj_type="reverse_std", model="llama-13b", tokens=2048),
    "bitsandbytes": Row(preset="adamw8bit", gradients="hold", package="bitsandbytes"),
    "fused": Row(preset="adamw", gradients="hold", package="torch"),
}
UNLIMITED = ("bitsandbytes", "fused")


def configure(row: Row) -> Any:
    """The run of a row, as the trainer and the planner take it."""
    from subspan.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

    return TrainConfig(
        model=ModelConfig(name=row.model, dtype="bfloat16", activation_checkpointing=True),
        data=DataConfig(seq_len=row.tokens),
        optim=OptimConfig(
            preset=row.preset,  # type: ignore[arg-type]
            gradients=row.gradients,  # type: ignore[arg-type]
            rank=row.rank,
            proj_type=row.proj_type,  # type: ignore[arg-type]
            lr=LR if not row.preset.startswith("adamw") else 1e-5,
            dense_lr=LR * SCALE if not row.preset.startswith("adamw") else None,
            scale=None if row.preset == "subspan" or row.preset.startswith("adamw") else SCALE,
            update_proj_gap=GAP,
            dense_state_dtype=row.dense_state_dtype,  # type: ignore[arg-type]
            max_grad_norm=row.clip,
        ),
        run=RunConfig(steps=10 * GAP, warmup_steps=0, batch_size=row.micro_batches, micro_batch=1),
    )


def make(model: Any, config: Any, package: str | None) -> torch.optim.Optimizer:
    if package == "bitsandbytes":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(model.parameters(), lr=config.optim.lr)  # type: ignore[no-any-return]
    if package == "torch":
        return torch.optim.AdamW(model.parameters(), lr=config.optim.lr, fused=True)
    from subspan.training.optimizers import build_optimizer

    return build_optimizer(model, config)


def train(name: str, row: Row) -> dict[str, Any]:
    """Build, train, and say what was seen."""
    from subspan.memory import count_memory
    from subspan.training.models import build_model

    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    limit = total if name in UNLIMITED else int(LIMIT)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (limit - context) / total))
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    config = configure(row)
    result: dict[str, Any] = {
        "row": asdict(row),
        "limited": name not in UNLIMITED,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "context": context,
        "steps": [],
    }
    begin = time.perf_counter()
    model = build_model(
        row.model, dtype=config.model.dtype, seq_len=row.tokens, int8=config.int8_weights, device=torch.device("cuda")
    )
    model.train()
    model.gradient_checkpointing_enable()
    optimizer = make(model, config, row.package)
    if row.package is None:
        result["bytes"] = asdict(count_memory(model, optimizer))
    torch.cuda.synchronize()
    result["build_seconds"] = time.perf_counter() - begin
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(model.config.vocab_size, (row.micro_batches, 1, row.tokens), generator=generator).to("cuda")
    for _ in range(row.steps):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        total_loss = torch.zeros((), device="cuda")
        for batch in batches:
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss / row.micro_batches
            total_loss += loss.detach()
            loss.backward()
        torch.cuda.synchronize()
        middle = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        end = time.perf_counter()
        result["steps"].append(
            {
                "loss": float(total_loss),
                "seconds": end - begin,
                "of it step()": end - middle,
                "allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
            }
        )
    free, total = torch.cuda.mem_get_info()
    result["device_used"] = total - free
    result["refreshes"] = int(sum(float(state.get("refreshes", 0)) for state in optimizer.state.values()))
    return result


def save(name: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def write_table() -> None:
    from subspan.plan import plan_memory

    lines = [
        "| row | model | optimizer | gradients | tokens a step | rank | planned, GiB | allocator's peak | plan over it "
        "| device, GiB | seconds a step | tokens/s | loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            continue
        result = json.loads(file.read_text())
        if "planned" not in result and row.package is None:
            result["planned"] = plan_memory(configure(Row(**result["row"]))).as_dict()["peak"]
            save(name, result)
        steps = result["steps"]
        peak = max(step["allocated"] for step in steps)
        planned = result.get("planned")
        took = median(step["seconds"] for step in steps[2:])
        tokens = row.tokens * row.micro_batches
        own = {
            None: f"`{row.preset}`",
            "torch": "torch AdamW, fused, bf16 moments",
            "bitsandbytes": "bitsandbytes AdamW8bit",
        }
        cells = [
            name,
            row.model.removeprefix("llama-").upper(),
            own[row.package],
            row.gradients,
            f"{row.micro_batches} x {row.tokens}",
            "-"
            if row.preset.startswith("adamw")
            else f"{row.rank}" + (", reverse_std" if row.proj_type != "std" else ""),
            f"{planned / GIB:.2f}" if planned else "-",
            f"{peak / GIB:.2f}",
            f"{planned / peak - 1:+.1%}" if planned else "-",
            f"**{result['device_used'] / GIB:.2f}**",
            f"{took:.2f}",
            f"{tokens / took:,.0f}",
            f"{steps[0]['loss']:.2f} to {steps[-1]['loss']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    readme = HERE / "README.md"
    text = "\n".join(lines)
    readme.write_text(re.sub(r"(<!-- rows -->\n).*?(<!-- end -->)", rf"\1{text}\n\2", readme.read_text(), flags=re.S))


def main(rows: list[str] | None = None, table: bool = False) -> None:
    """Run rows that have no result yet.

    Args:
        rows: names of some; none: all
        table: write README.md's table from results/ instead
    """
    if table:
        return write_table()
    for name in rows or ROWS:
        if (RESULTS / f"{name}.json").exists():
            continue
        try:
            result = train(name, ROWS[name])
        except torch.OutOfMemoryError as error:
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
            result = None
        gc.collect()
        torch.cuda.empty_cache()
        if result:
            save(name, result)
            steps = result["steps"]
            print(
                f"{name}: loss {steps[0]['loss']:.3f} to {steps[-1]['loss']:.3f}, "
                f"{median(s['seconds'] for s in steps[2:]):.2f} s a step, of it step() "
                f"{median(s['of it step()'] for s in steps[2:]):.2f}, allocated {steps[-1]['allocated'] / GIB:.2f}, "
                f"device {result['device_used'] / GIB:.2f} GiB, built in {result['build_seconds']:.0f} s",
                flush=True,
            )
    return None


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
