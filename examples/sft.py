"""Subspan in TRL's SFTTrainer, on conversations.

python examples/sft.py chat.jsonl        # rows with "messages": [{"role": "user", "content": ...}, ...]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

import subspan.hf


def train(
    model: Any,
    rows: Any,
    out: str,
    tokenizer: Any = None,
    *,
    steps: int = 100,
    batch_size: int = 4,
    accumulation: int = 2,
    lr: float = 1e-4,
    warmup: int = 10,
    rank: int = 128,
    gap: int = 200,
    save_every: int = 50,
    resume: bool = False,
    **more: Any,
) -> list[dict[str, float]]:
    """SFTTrainer's own log. rows: a `datasets.Dataset`; more: for SFTConfig."""
    args = SFTConfig(
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
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=subspan.hf.optimizer(args, preset="galore", rank=rank, update_proj_gap=gap),
        callbacks=[subspan.hf.SubspanCallback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return [line for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    from datasets import load_dataset

    chat = load_dataset("json", data_files=sys.argv[1], split="train")
    gpu = torch.accelerator.is_available()  # TRL trains in bf16 unless told otherwise
    train("HuggingFaceTB/SmolLM2-135M-Instruct", chat, out="runs/sft", bf16=gpu)
