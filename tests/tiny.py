"""A model, a text and a run that take a second: what the tests of training share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from subspan.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

WORDS = (
    "the",
    "cat",
    "dog",
    "bird",
    "house",
    "tree",
    "sees",
    "finds",
    "likes",
    "old",
    "small",
    "red",
    "and",
    "then",
    "under",
    "over",
)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_text(folder: Path, documents: int = 40, seed: int = 0) -> str:
    """A file of `documents` documents of 60 words, each word mostly followed by the same next one: easy to learn."""
    draw = random.Random(seed)
    texts = []
    for _ in range(documents):
        index, words = draw.randrange(len(WORDS)), []
        for _ in range(60):
            words.append(WORDS[index])
            index = (index * 3 + 1) % len(WORDS) if draw.random() < 0.8 else draw.randrange(len(WORDS))
        texts.append(" ".join(words))
    path = folder / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return str(path)


def tiny_config(
    folder: Path, *, model: Any = None, data: Any = None, optim: Any = None, run: Any = None
) -> TrainConfig:
    """A run in `folder`/run over `folder`/text.txt; each argument is a dict of fields to change."""
    if not (folder / "text.txt").exists():
        write_text(folder)
    return TrainConfig(
        ModelConfig(**{"overrides": SIZES, **(model or {})}),
        DataConfig(
            **{
                "files": str(folder / "text.txt"),
                "vocab_size": 300,
                "seq_len": 32,
                "valid_fraction": 0.1,
                "cache_dir": str(folder / "cache"),
                **(data or {}),
            }
        ),
        OptimConfig(**{"rank": 8, "update_proj_gap": 5, "lr": 0.02, **(optim or {})}),
        RunConfig(
            **{
                "out": str(folder / "run"),
                "steps": 20,
                "warmup_steps": 2,
                "batch_size": 4,
                "eval_every": 0,
                **(run or {}),
            }
        ),
    )
