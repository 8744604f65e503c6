"""Subspan in a loop with Accelerate: accumulation, clipping, checkpoint, resume.

accelerate launch examples/accelerate_loop.py book.txt
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import subspan
import subspan.hf


def train(
    model: Any,
    rows: list[dict[str, Any]],
    out: str,
    *,
    steps: int = 100,
    batch_size: int = 4,
    accumulation: int = 2,
    lr: float = 1e-3,
    warmup: int = 10,
    rank: int = 128,
    gap: int = 200,
    save_every: int = 50,
) -> list[dict[str, float]]:
    """Loss, norm and learning rate of each step; goes on from the newest folder in `out`."""
    subspan.hf.clip_in_optimizer()  # clip_grad_norm_ then knows low-rank gradients
    accelerator = Accelerator(gradient_accumulation_steps=accumulation)
    groups = subspan.param_groups(model, rank=rank, update_proj_gap=gap, verbose=False)
    gradients = "project" if accelerator.num_processes == 1 else "hold"  # DistributedDataParallel wants whole ones
    optimizer = subspan.GaLoreAdamW(groups, lr=lr, gradients=gradients)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / max(1, warmup)))
    loader = torch.utils.data.DataLoader(rows, batch_size, collate_fn=_stack)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    start = max((int(folder.name) for folder in Path(out).glob("[0-9]*")), default=0)
    if start:
        accelerator.load_state(f"{out}/{start}")
    model.train()
    step, losses, history = start, [], []
    for batch in accelerator.skip_first_batches(loader, start * accumulation):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)  # divides by the number of passes
            losses.append(loss.item())
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                row = {"loss": sum(losses) / len(losses), "grad_norm": norm.item(), "lr": schedule.get_last_lr()[0]}
                history.append(row)
                losses = []
                step += 1
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and step % save_every == 0:
            accelerator.save_state(f"{out}/{step}")
        if step == steps:
            break
    return history


def _stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


if __name__ == "__main__":
    from data import load

    for number, line in enumerate(train(*load(sys.argv[1]), out="runs/accelerate"), 1):
        print(number, line)
