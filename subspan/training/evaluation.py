"""Validation loss and perplexity of a causal language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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
    model: nn.Module,
    loader: Iterable[Batch | tuple[Batch, bool]],
    *,
    paper_compatible: bool = False,
    autocast: bool = False,
    total: Callable[[Tensor], Tensor] = lambda X: X,
) -> EvalResult:
    """Loss of a causal LM over `loader`: every token weighs the same, logits are cast to fp32 first.

    paper_compatible: the published number instead, the sum of N batch means over N + 1 (jiaweizzhao/GaLore counts batches
    from 1). It is lower than the loss by a factor N / (N + 1), so it depends on the batch size.
    autocast: bfloat16 arithmetic in the model, as in a run with run.autocast.
    loader: batches; of several processes, (batch, whether it counts), `Processes.deal`. total: what then makes sums over all.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    sums: list[Tensor] = []
    counts: list[int] = []
    try:
        for item in loader:
            batch, counts_too = item if isinstance(item, tuple) else (item, True)
            inputs = to_device(batch, device)
            labels = inputs.pop("labels")[:, 1:]
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits = model(**inputs, use_cache=False).logits[:, :-1]
            if counts_too:
                sums.append(
                    nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
                )
                counts.append(trained_tokens(batch["labels"]))
    finally:
        model.train(training)
    losses = torch.stack(sums).tolist() if sums else []  # one host sync for all batches
    loss, tokens = total(torch.tensor([sum(losses), sum(counts)], dtype=torch.float64)).tolist()
    if not tokens:
        raise ValueError("the validation text has no token to predict: give more text with --data.valid_files")
    if paper_compatible:
        means = [loss / count for loss, count in zip(losses, counts, strict=True) if count]
        return EvalResult(sum(means) / (len(means) + 1), sum(counts))
    return EvalResult(loss / tokens, int(tokens))


def trained_tokens(labels: Tensor) -> int:
    """Tokens that a causal LM's loss counts in labels (B, L): not those labelled -100, nor the first, which nothing predicts."""
    return int((labels[:, 1:] != -100).sum())


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


@torch.no_grad()
def check_documents_apart(model: nn.Module, batch_size: int, seq_len: int, device: torch.device) -> None:
    """ValueError unless `model` keeps documents of a sequence apart by their position_ids alone, as LLaMA does and OPT does not:
    what it says of the second half of one must not hang on the first. Two passes, of the shape of those of training."""
    vocab_size, half = model.get_input_embeddings().num_embeddings, seq_len // 2  # type: ignore[operator]
    place = torch.arange(seq_len, device=device)
    positions = torch.where(place < half, place, place - half).expand(batch_size, -1)
    training = model.training
    model.eval()
    try:
        logits = []
        for shift in (0, 1):
            ids = ((place + shift * (place < half)) % vocab_size).expand(batch_size, -1)
            logits.append(model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, half:].float())
    finally:
        model.train(training)
    if (logits[0] - logits[1]).abs().max() > 1e-4 * logits[0].abs().max():
        raise ValueError(
            "data.keep_documents_apart=true: this model lets the documents of a sequence see each other whatever their "
            "position_ids say: set it to false"
        )
