"""Classifiers: a pretrained model with a head for a task, its loss, and its metrics on the validation rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from subspan.extras import require
from subspan.optim.groups import quantize_weights
from subspan.training.baselines import add_baseline
from subspan.training.corpus import first_line
from subspan.training.evaluation import Batch, to_device
from subspan.training.finetune_config import FinetuneConfig
from subspan.training.models import NoAttention, chosen_attention, named_attention
from subspan.training.tasks import TaskData, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a token to pad with: its end-of-text token where it has none, as causal LMs.

    It cuts texts at the model's positions if it knows no smaller limit. Raises ValueError if there is none.
    """
    transformers = require("transformers", "train")
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(name)
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.name={name!r}: no Hugging Face model or folder with a tokenizer: {first_line(error)}"
        ) from None
    tokenizer.model_max_length = min(tokenizer.model_max_length, _longest(config) or tokenizer.model_max_length)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"model.name={name!r}: its tokenizer has neither a pad nor an end-of-text token: add one to it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _longest(config: Any) -> int | None:
    """Tokens that the positions of a model reach to; RoBERTa and its kin number them from the padding's index + 1 on."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    with torch.device("meta"):
        model = require("transformers", "train").AutoModel.from_config(config)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    return positions if positions and positions > 0 else None  # XLNet: -1, no limit


def build_classifier(
    config: FinetuneConfig, task: TaskData, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[PreTrainedModel, list[str], set[str]]:
    """The pretrained model with a head for `task`, new unless it has one of that size, and adapters if they are asked for.

    Also the names of the weights that no file had, and of those of the head. Raises ValueError if it does not load.
    """
    name, attention = config.model.name, config.model.attn_implementation
    auto = require("transformers", "train").AutoModelForSequenceClassification
    model: PreTrainedModel
    try:
        with named_attention(attention):
            model, info = auto.from_pretrained(
                name,
                num_labels=task.labels,
                dtype=getattr(torch, config.model.dtype),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **chosen_attention(attention),
            )
    except NoAttention:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"model.name={name!r} does not load as a classifier: {first_line(error)}") from None
    model.config.problem_type = "regression" if task.labels == 1 else "single_label_classification"
    model.config.use_cache = False  # of causal LMs: nothing is generated
    model.config.pad_token_id = tokenizer.pad_token_id  # causal models read the last token that is not this one
    if config.optim.preset == "qgalore":
        quantize_weights(model)
    model.to(device)  # type: ignore[arg-type]
    other_size = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
    new = sorted({*info["missing_keys"], *other_size})
    head = _head(model, new)
    add_baseline(model, config, head)
    if config.model.activation_checkpointing:
        newer = getattr(model, "activation_checkpointing_enable", None)  # the older name is deprecated
        (newer or model.gradient_checkpointing_enable)()
    return model, new, head


def _head(model: PreTrainedModel, new: Collection[str]) -> set[str]:
    """Names of the parameters outside the pretrained part, and of new ones in it."""
    inside = {id(p) for p in model.base_model.parameters()} if model.base_model is not model else set()
    return {name for name, p in model.named_parameters() if id(p) not in inside or name in new}


def batch_loss(model: nn.Module, batch: Batch, autocast: bool) -> tuple[Tensor, Tensor]:
    """Loss summed over the rows of a batch, cross-entropy or squared error, and logits in fp32 (B, labels)."""
    labels = batch.pop("labels")
    with torch.autocast(labels.device.type, torch.bfloat16, enabled=autocast):
        logits = model(**batch).logits
    logits = logits.float()
    if labels.is_floating_point():
        return nn.functional.mse_loss(logits.squeeze(-1), labels, reduction="sum"), logits
    return nn.functional.cross_entropy(logits, labels, reduction="sum"), logits


def micro_batches(batch: Batch, size: int) -> Iterable[Batch]:
    rows = len(batch["labels"])
    return [{key: X[i : i + size] for key, X in batch.items()} for i in range(0, rows, size)]


@torch.no_grad()
def evaluate(
    model: nn.Module, task: TaskData, collate: Any, batch_size: int, *, autocast: bool = False
) -> dict[str, float]:
    """Metrics of the validation rows, the one that decides first, and `valid_loss`, the mean over rows."""
    device = next(model.parameters()).device
    model.eval()
    lengths = [len(ids) for ids in task.valid["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)  # rows of one length need no padding
    # A generator of its own: evaluating must not move the one that dropout draws from.
    batches = DataLoader(task.valid, batch_size, sampler=order, generator=torch.Generator(), collate_fn=collate)
    outputs, labels, losses = [], [], []
    for batch in batches:
        labels.append(batch["labels"])
        loss, logits = batch_loss(model, to_device(batch, device), autocast)
        outputs.append(logits)
        losses.append(loss)
    logits = torch.cat(outputs)
    predicted = (logits.squeeze(-1) if task.labels == 1 else logits.argmax(-1)).cpu().numpy()
    true = torch.cat(labels).numpy()
    scores: dict[str, float] = {metric: score(metric, predicted, true) for metric in task.metrics}
    return scores | {"valid_loss": float(torch.stack(losses).sum()) / len(true)}
