"""Subspan in Lightning: accumulation, clipping, checkpoint, resume.

python examples/lightning_module.py book.txt
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader

import subspan


class Model(lightning.LightningModule):
    def __init__(self, model: Any, rank: int, gap: int, lr: float, warmup: int) -> None:
        super().__init__()
        self.model, self.rank, self.gap, self.lr, self.warmup = model, rank, gap, lr, warmup
        self.history: list[dict[str, float]] = []
        self.loss = 0.0

    def configure_optimizers(self) -> Any:
        groups = subspan.param_groups(self.model, rank=self.rank, update_proj_gap=self.gap, verbose=False)
        optimizer = subspan.GaLoreAdamW(groups, lr=self.lr, gradients="project")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / max(1, self.warmup)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, *_: Any, **__: Any) -> None:
        """Lightning's own would see the gradients of dense parameters alone: the optimizer clips, in the step that follows."""
        optimizer.max_grad_norm = gradient_clip_val or None  # Lightning: 0 is off

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.loss += loss.item() / self.trainer.accumulate_grad_batches
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.history.append({"loss": self.loss, "lr": optimizer.param_groups[0]["lr"]})
        self.loss = 0.0

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        if self.history and self.loss == 0.0:  # after a step
            self.history[-1]["grad_norm"] = self.optimizers().optimizer.grad_norm.item()
            self.log_dict(self.history[-1])


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
    """Loss, norm and learning rate of each step; goes on from `out`/last.ckpt if it is there."""
    loader = StatefulDataLoader(rows, batch_size, collate_fn=_stack)  # its place in the data is in the checkpoint
    saver = ModelCheckpoint(out, every_n_train_steps=save_every, save_last=True)
    trainer = lightning.Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=1.0,
        callbacks=[saver],
        default_root_dir=out,
        log_every_n_steps=1,
    )
    module = Model(model, rank, gap, lr, warmup)
    last = Path(out) / "last.ckpt"
    model.train()
    trainer.fit(module, loader, ckpt_path=str(last) if last.exists() else None)
    return module.history


def _stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


if __name__ == "__main__":
    from data import load

    train(*load(sys.argv[1]), out="runs/lightning")
