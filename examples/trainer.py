"""Subspan in transformers.Trainer.

python examples/trainer.py book.txt
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import Trainer, TrainingArguments, default_data_collator

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
    resume: bool = False,
    **more: Any,
) -> list[dict[str, float]]:
    """Trainer's own log: loss, gradient norm and learning rate of each step. more: for TrainingArguments."""
    args = TrainingArguments(
        output_dir=out,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=lr,
        warmup_steps=warmup,
        lr_scheduler_type="constant_with_warmup",
        max_grad_norm=1.0,
        save_steps=save_every,
        logging_steps=1,
        report_to="none",
        **more,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=default_data_collator,
        optimizer_cls_and_kwargs=subspan.hf.optimizer(args, preset="galore", rank=rank, update_proj_gap=gap),
        callbacks=[subspan.hf.SubspanCallback(diagnostics=True)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return [line for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    from data import load

    train(*load(sys.argv[1]), out="runs/trainer")
