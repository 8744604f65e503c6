"""What the examples share: a text file as rows of token ids, and a model to continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL = "HuggingFaceTB/SmolLM2-135M"


def load(text: str, model: str = MODEL, seq_len: int = 256) -> tuple[Any, list[dict[str, list[int]]]]:
    """The causal language model `model`, and the file `text` cut into sequences of `seq_len` tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(Path(text).read_text(encoding="utf-8"))["input_ids"]
    pieces = [ids[i : i + seq_len] for i in range(0, len(ids) - seq_len + 1, seq_len)]
    rows = [{"input_ids": piece, "labels": piece} for piece in pieces]
    return AutoModelForCausalLM.from_pretrained(model), rows
