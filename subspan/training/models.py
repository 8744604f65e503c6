"""Causal language models: the paper's LLaMA sizes, or any Hugging Face model by name or folder."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from subspan.extras import require
from subspan.optim.groups import default_targets
from subspan.optim.int8 import Int8Weight, quantize_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def _llama(hidden: int, intermediate: int, heads: int, layers: int, **more: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        **more,
    }


# arXiv 2403.03507, Table 5, as the configs of jiaweizzhao/GaLore have it: the paper prints the 1B model's heads and layers
# swapped (24 heads do not divide 2048). 2M, 9M, 25M are ours, 13B and 70B those of LLaMA 2 (arXiv 2307.09288). The vocabulary is
# the tokenizer's; the paper's recipes set 32,000.
LLAMA: dict[str, dict[str, Any]] = {
    "llama-2m": _llama(128, 344, 4, 6),
    "llama-9m": _llama(256, 688, 4, 8),
    "llama-25m": _llama(384, 1032, 6, 12),
    "llama-60m": _llama(512, 1376, 8, 8),
    "llama-130m": _llama(768, 2048, 12, 12),
    "llama-350m": _llama(1024, 2736, 16, 24),
    "llama-1b": _llama(2048, 5461, 32, 24),
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-70b": _llama(8192, 28672, 64, 80, num_key_value_heads=8),
}


def build_model(
    name: str,
    *,
    vocab_size: int | None = None,
    seq_len: int = 0,
    pretrained: bool = False,
    dtype: str = "float32",
    overrides: Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    device: str | torch.device | None = None,
    int8: bool = False,
) -> PreTrainedModel:
    """A causal LM with fresh (or `pretrained`) weights of `dtype` on `device`.

    name: a key of `LLAMA`, or a Hugging Face model name or folder.
    vocab_size: embedding rows of a `LLAMA` size, 32,000 by default; a Hugging Face model keeps its own.
    seq_len: the longest sequence to come; a `LLAMA` size gets as many positions, another model must have them.
    overrides: fields of the model's configuration; they win over everything else. A Hugging Face model's file often states
        what follows from other fields as well (head_dim): override that too.
    attn_implementation: attention of transformers, such as sdpa, eager or flash_attention_2; None: its choice for the model.
    device: None is torch's default device, so that `with torch.device("meta")` builds without memory.
    int8: the linear layers in numbered blocks, what `param_groups` projects by default, are `Int8Weight`s that look like
        `dtype`. A fresh model is made in that form: beside it there is never more than a block of one weight, or an embedding
        that is about to be tied. A pretrained one is loaded in `dtype` into host memory, quantized weight by weight and moved.

    Raises ValueError for an unknown name, an unknown field, too few positions or an attention that is not to be had; with int8,
    for a model without such layers.
    """
    transformers = require("transformers", "train")
    if name in LLAMA and pretrained:
        raise ValueError(
            f"model.pretrained=true needs a Hugging Face model, and {name} has no published weights: set it false"
        )
    config = model_config(name, overrides, vocab_size=vocab_size, seq_len=seq_len)
    made_as = {"dtype": getattr(torch, dtype), **chosen_attention(attn_implementation)}
    model: PreTrainedModel
    if pretrained:
        with named_attention(attn_implementation):
            model = transformers.AutoModelForCausalLM.from_pretrained(name, **made_as)
        if int8:
            _quantize(model, name)
        model.to(device or "cpu")  # type: ignore[arg-type]
        return model
    if int8:
        with torch.device("meta"), named_attention(attn_implementation):
            model = transformers.AutoModelForCausalLM.from_config(config, **made_as)
        _quantize(model, name)
        _materialise(model, torch.empty(0, device=device).device)
        return model
    # None leaves a `with torch.device(...)` of the caller alone: older torch does not report it as the default device
    placed = torch.device(device) if device is not None else contextlib.nullcontext()
    with placed, named_attention(attn_implementation):
        model = transformers.AutoModelForCausalLM.from_config(config, **made_as)
    return model


def chosen_attention(attn_implementation: str | None) -> dict[str, str]:
    """What to tell transformers of it: a None that is passed on would overrule the model's own configuration."""
    return {} if attn_implementation is None else {"attn_implementation": attn_implementation}


class NoAttention(ValueError):
    """An attention that was asked for is not to be had."""


@contextlib.contextmanager
def named_attention(attn_implementation: str | None) -> Iterator[None]:
    """transformers says several lines, or that a package is missing, where it does not have an attention: `NoAttention`."""
    try:
        yield
    except (ValueError, ImportError) as error:
        of_attention = isinstance(error, ImportError) or re.search("attn_implementation|FlashAttention", str(error))
        if attn_implementation is None or not of_attention:
            raise
        raise NoAttention(
            f"model.attn_implementation={attn_implementation} cannot be used here: {str(error).strip().splitlines()[0]}; "
            "set null for what transformers chooses"
        ) from None


def _quantize(model: PreTrainedModel, name: str) -> None:
    targets = default_targets(model)
    if not targets:
        raise ValueError(f"model.int8=true finds no linear layer in numbered blocks of {name}: set it false")
    quantize_weights(model, targets)


def _materialise(model: PreTrainedModel, device: torch.device) -> None:
    """Bring a model from the meta device into being, with fresh weights by transformers' own initialisation.

    It fills buffers that are not saved as well: transformers loads every pretrained model over the meta device.
    """
    if device.type == "meta":
        return
    model.to_empty(device=device)
    model.initialize_weights()  # type: ignore[no-untyped-call]
    model.tie_weights()  # to_empty made two of one


def compile_blocks(model: PreTrainedModel) -> None:
    """torch.compile each of a model's repeated blocks (the modules of its outermost ModuleLists), in place.

    Block by block, because a model compiled as a whole keeps every gradient alive until its backward pass ends; equal blocks
    share one compilation. Raises ValueError for a model without blocks.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError("model.compile=true finds no ModuleList of blocks in this model: set it false")
    for block in blocks:
        block.compile()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """A model's repeated blocks: the modules of its outermost ModuleLists."""
    return list(_outermost_lists(model))


def _outermost_lists(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _outermost_lists(child)


def save_pretrained(model: PreTrainedModel, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """`model.save_pretrained`, INT8 weights as ordinary ones of the dtype they look like: what AutoModelForCausalLM loads.

    They are dequantized one by one into host memory, where transformers wants all tensors of a model at once: there it takes
    the bytes of the model in floating form. state: tensors to save instead of the model's own.
    """
    plain: dict[int, torch.Tensor] = {}  # of tied weights one
    state = model.state_dict() if state is None else state
    for key, W in state.items():
        if isinstance(W, Int8Weight):
            if id(W.codes) not in plain:
                plain[id(W.codes)] = W.to("cpu").dequantize()
            state[key] = plain[id(W.codes)]
    model.save_pretrained(folder, state_dict=state)


def model_config(
    name: str, overrides: Mapping[str, Any] | None = None, *, vocab_size: int | None = None, seq_len: int = 0
) -> PreTrainedConfig:
    """The configuration of a model by name: the arguments and errors of `build_model`."""
    transformers = require("transformers", "train")
    overrides = dict(overrides or {})
    config: PreTrainedConfig = transformers.LlamaConfig() if name in LLAMA else _published_config(name)
    for key in overrides:
        if not hasattr(config, key):
            raise ValueError(
                f"model.overrides: {key} is no field of a {config.model_type} configuration, such as hidden_size"
            )
    try:
        if name in LLAMA:  # made in one go, because head_dim must follow from overridden sizes
            fields = {**LLAMA[name], "vocab_size": vocab_size or 32000, "bos_token_id": None, "eos_token_id": None}
            fields["max_position_embeddings"] = max(fields["max_position_embeddings"], seq_len)
            config = transformers.LlamaConfig(**{**fields, **overrides})
        for key, value in overrides.items():
            setattr(config, key, value)
    except (
        Exception
    ) as error:  # transformers checks types and sizes with errors of its own, the reason in the last line
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"model.overrides={overrides} do not fit {name}: {reason}") from None
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise ValueError(f"data.seq_len={seq_len} is more than the {positions} positions of {name}: lower data.seq_len")
    return config


def _published_config(name: str) -> PreTrainedConfig:
    close = [] if "/" in name or Path(name).exists() else difflib.get_close_matches(name, LLAMA, n=1, cutoff=0.7)
    if close:  # a slip: do not go and ask the hub
        raise ValueError(f"model.name={name!r} is unknown: did you mean {close[0]}?")
    try:
        config: PreTrainedConfig = require("transformers", "train").AutoConfig.from_pretrained(name)
        return config
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.name={name!r} is none of {', '.join(LLAMA)}, and no Hugging Face model or folder by that name loads: {reason}"
        ) from None
