"""A model, a text and a run that take a second: what the tests of training share."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import torch

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


# ---------------------------------------------------------------------------------------------------- classification


def write_tokenizer(folder: Path, *, special: bool = True) -> Any:
    """A tokenizer of whole words, saved in `folder`; `special`: with BERT's tokens, else with an end of text alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    own = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if special else ["[EOS]", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate([*own, '"', "a", *WORDS])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "[UNK]", "eos_token": "[EOS]"}
    if special:
        tokens.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_classifier(folder: Path) -> str:
    """A BERT of 2 layers and its tokenizer in `folder`, without a head: what a fine-tuning starts from."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {
        **SIZES,
        "vocab_size": len(write_tokenizer(folder)),
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    BertModel(BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """A .jsonl, .tsv or .csv file of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        if path.suffix == ".csv":
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        elif path.suffix == ".tsv":
            stream.writelines("\t".join(map(str, line)) + "\n" for line in [rows[0], *(row.values() for row in rows)])
        else:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)
