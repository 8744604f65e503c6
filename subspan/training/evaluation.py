"""Validation loss and perplexity of a causal language model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class EvalResult:
    """Mean loss in nats over `tokens` tokens, or as `paper_compatible` defines it."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Iterable[Batch], *, paper_compatible: bool = False, autocast: bool = False
) -> EvalResult:
    """Loss of a causal LM over `loader`: every token weighs the same, logits are cast to fp32 first.

    paper_compatible: the published number instead, the sum of N batch means over N + 1 (jiaweizzhao/GaLore counts batches
    from 1). It is lower than the loss by a factor N / (N + 1), so it depends on the batch size.
    autocast: bfloat16 arithmetic in the model, as in a run with run.autocast.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    sums: list[Tensor] = []
    counts: list[int] = []
    try:
        for batch in loader:
            inputs = to_device(batch, device)
            labels = inputs.pop("labels")[:, 1:]
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits = model(**inputs, use_cache=False).logits[:, :-1]
            sums.append(nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum"))
            counts.append(trained_tokens(batch["labels"]))
    finally:
        model.train(training)
    if not sum(counts):
        raise ValueError("the validation text has no token to predict: give more text with --data.valid_files")
    losses = torch.stack(sums).tolist()  # one host sync for all batches
    if paper_compatible:
        means = [loss / count for loss, count in zip(losses, counts, strict=True) if count]
        return EvalResult(sum(means) / (len(means) + 1), sum(counts))
    return EvalResult(sum(losses) / sum(counts), sum(counts))


def trained_tokens(labels: Tensor) -> int:
    """Tokens that a causal LM's loss counts in labels (B, L): not those labelled -100, nor the first, which nothing predicts."""
    return int((labels[:, 1:] != -100).sum())


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
