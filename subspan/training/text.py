"""What a run reads: the text, tokenizer and sequences that a configuration asks for, from files, chat data or a stream."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils.data import Dataset

from subspan.training.config import DataConfig, TrainConfig
from subspan.training.corpus import digest, fingerprint
from subspan.training.data import (
    ChatDataset,
    PackedDataset,
    StreamDataset,
    eval_loader,
    get_tokenizer,
    load_chat,
    load_corpus,
    tokenize,
)
from subspan.training.models import LLAMA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Text:
    """What a run reads: sequences to train on (None where only `valid` was asked for) and to validate on."""

    train: Dataset[Batch] | None
    valid: Dataset[Batch]
    tokenizer: PreTrainedTokenizerBase
    description: str
    sha256: str | None

    @property
    def tokens(self) -> str | None:
        """What tells the tokens of the training text from those of another tokenizer, or chat template."""
        if isinstance(self.train, StreamDataset):
            return f"of {digest([fingerprint(self.tokenizer)])[:8]}"
        if isinstance(self.train, ChatDataset):
            ids = digest([str(ids.tolist()) for ids, _ in self.train.samples[:256]])[:8]
            return f"{len(self.train.samples):,} conversations, beginning with {ids}"
        assert isinstance(self.train, PackedDataset)
        tokens = self.train.tokens
        begin = hashlib.sha256(tokens[:65_536].astype("int64").tobytes()).hexdigest()[:8]
        return f"{len(tokens):,}, beginning with {begin}"

    def valid_loader(self, batch_size: int, max_sequences: int | None) -> Iterable[Batch]:
        return eval_loader(self.valid, batch_size=batch_size, max_sequences=max_sequences)


def load_data(
    data: DataConfig, tokenizer_name: str | None, *, training: bool = True, rank: int = 0, world_size: int = 1
) -> Text:
    """Text, tokenizer and sequences as `data` says. ValueError for text that cannot be read or is too short.

    rank, world_size: of this process, for a stream to train on; files are shared out by `make_loader`.
    """
    cache = Path(data.cache_dir).expanduser()
    if data.dataset:
        return _load_stream(data, tokenizer_name, cache, training, rank, world_size)
    return (_load_chat if data.format == "chat" else _load_files)(data, tokenizer_name, cache, training)


def _load_files(data: DataConfig, tokenizer_name: str | None, cache: Path, training: bool) -> Text:
    corpus = load_corpus(
        data.file_list,
        valid_files=data.valid_file_list,
        text_key=data.text_key,
        document_separator=data.document_separator,
        valid_fraction=data.valid_fraction,
    )
    tokenizer = get_tokenizer(tokenizer_name, vocab_size=data.vocab_size, corpus=corpus, cache_dir=cache)

    def pack(documents: list[str], key: str) -> Dataset[Batch]:
        tokens = tokenize(documents, tokenizer, cache_dir=cache, key=key)
        apart = data.keep_documents_apart
        end, name = tokenizer.eos_token_id, "the text" if key == "train" else "the validation text"
        return PackedDataset(tokens, data.seq_len, eos_token_id=end, keep_documents_apart=apart, name=name)

    valid = pack(corpus.valid, "valid")
    return Text(pack(corpus.train, "train") if training else None, valid, tokenizer, corpus.description, corpus.sha256)


def _load_chat(data: DataConfig, tokenizer_name: str | None, cache: Path, training: bool) -> Text:
    assert data.file_list is not None
    rows = load_chat(data.file_list, valid_files=data.valid_file_list, valid_fraction=data.valid_fraction)
    if tokenizer_name is None:
        raise ValueError("data.format='chat' needs the tokenizer of a chat model: name one with --data.tokenizer")
    tokenizer = get_tokenizer(tokenizer_name, vocab_size=data.vocab_size, corpus=None, cache_dir=cache)
    train = ChatDataset(rows[0], tokenizer, data.seq_len) if training else None
    valid = ChatDataset(rows[1], tokenizer, data.seq_len)
    sha256 = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
    return Text(train, valid, tokenizer, f"{len(rows[0]):,} conversations, {len(rows[1]):,} to validate on", sha256)


def _load_stream(
    data: DataConfig, tokenizer_name: str | None, cache: Path, training: bool, rank: int, world_size: int
) -> Text:
    name = data.dataset or ""
    tokenizer = get_tokenizer(tokenizer_name, vocab_size=data.vocab_size, corpus=None, cache_dir=cache)

    def stream(split: str, repeat: bool, **share: int) -> Dataset[Batch]:
        return StreamDataset(
            name,
            tokenizer,
            data.seq_len,
            config=data.dataset_config,
            split=split,
            text_key=data.text_key,
            keep_documents_apart=data.keep_documents_apart,
            repeat=repeat,
            **share,
        )

    train = stream(data.split, True, rank=rank, world_size=world_size) if training else None
    description = f"{' '.join(filter(None, (name, data.dataset_config)))}, streamed"
    return Text(train, stream(data.valid_split, False), tokenizer, description, None)


def tokenizer_name(config: TrainConfig) -> str | None:
    """The tokenizer of a run: the one named, else a Hugging Face model's own, else None: made from the text."""
    return config.data.tokenizer or (None if config.model.name in LLAMA else config.model.name)


def vocabulary(config: TrainConfig) -> int | None:
    """Rows of the embedding of a `llama-*` size; None where the configuration of the model says it. No text is read: a tokenizer
    that the run will make of it is taken to have all of `data.vocab_size` pieces."""
    if config.model.name not in LLAMA or "vocab_size" in config.model.overrides:
        return None
    if config.data.tokenizer is None:
        return config.data.vocab_size
    return len(get_tokenizer(config.data.tokenizer, vocab_size=0, corpus=None, cache_dir=Path()))


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError unless every piece that text can hold has an embedding: special tokens such as T5's sentinels need none."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unused = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} - used
    pieces = 1 + max(index for index in tokenizer.get_vocab().values() if index not in unused)
    if pieces > rows:
        raise ValueError(
            f"the tokenizer has {pieces} pieces and the model {rows} embeddings: use the model's own tokenizer or set "
            f"--model.overrides.vocab_size {pieces}"
        )
