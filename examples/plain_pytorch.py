"""Subspan in a plain PyTorch loop: accumulation, clipping, warm-up, checkpoint, resume.

python examples/plain_pytorch.py book.txt
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import subspan


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
    """Loss, norm and learning rate of each step; goes on from `out`/last.pt if it is there."""
    loader = torch.utils.data.DataLoader(rows, batch_size, collate_fn=_stack)
    groups = subspan.param_groups(model, rank=rank, update_proj_gap=gap, verbose=False)
    optimizer = subspan.GaLoreAdamW(groups, lr=lr, gradients="project", max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / max(1, warmup)))

    start, path = 0, Path(out) / "last.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        start = saved["step"]
        for name, part in (("model", model), ("optimizer", optimizer), ("schedule", schedule)):
            part.load_state_dict(saved[name])

    model.train()
    history = []
    for index, batch in enumerate(loader):
        step = index // accumulation
        if step < start:
            continue
        if step == steps:
            break
        loss = model(**batch).loss / accumulation
        loss.backward()  # of projected weights only low-rank gradients stay
        if index % accumulation == 0:
            history.append({"loss": 0.0})
        history[-1]["loss"] += loss.item()
        if (index + 1) % accumulation:
            continue
        optimizer.step()  # clips by max_grad_norm
        history[-1] |= {"grad_norm": optimizer.grad_norm.item(), "lr": schedule.get_last_lr()[0]}
        schedule.step()
        optimizer.zero_grad()  # not the model's: it cannot reach low-rank gradients
        if (step + 1) % save_every == 0:
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}}, path)
    return history


def _stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


if __name__ == "__main__":
    from data import load

    for number, line in enumerate(train(*load(sys.argv[1]), out="runs/plain"), 1):
        print(number, line)
