"""Tokens to batches: packed sequences over a memory-mapped file, chat data, streams, and the loaders over them.

A training sample is a pure function of (seed, position), so that one integer, the position, is all there is to resume.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from subspan.extras import require

# The one import between siblings: corpus.py is the lower half of this module (text to tokens), cut off for its length.
from subspan.training.corpus import (
    Corpus,
    Tokens,
    batch_encoder,
    check_chat_row,
    first_line,
    get_tokenizer,
    load_chat,
    load_corpus,
    read_chat,
    text_of,
    tokenize,
    whole_characters,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ChatDataset",
    "Corpus",
    "PackedDataset",
    "StreamDataset",
    "eval_loader",
    "get_tokenizer",
    "load_chat",
    "load_corpus",
    "make_loader",
    "sample_index",
    "tokenize",
]

IGNORED = -100  # the label that torch's cross entropy, and so transformers' loss, leaves out


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Sequences of `seq_len` tokens cut from one line of tokens, without overlap; a shorter rest is left out.

    Item i: `input_ids` and `labels`, int64 (seq_len,); labels equal input_ids (transformers shifts them). With
    `keep_documents_apart` also `position_ids`, which start again at 0 after each `eos_token_id`, and the first token of
    a document has the label -100, because the token before it belongs to another. transformers reads the borders from
    position_ids and lets no token see across them, but only if it gets no attention_mask and `use_cache=False`: with
    its default `use_cache=True` it makes a cache and then, silently, one plain causal mask.
    """

    def __init__(
        self,
        tokens: Tokens,
        seq_len: int,
        *,
        eos_token_id: int | None = None,
        keep_documents_apart: bool = False,
        name: str = "the text",
    ) -> None:
        if seq_len < 2:
            raise ValueError(f"data.seq_len={seq_len}: must be at least 2, a token and the next one")
        if len(tokens) < seq_len:
            raise ValueError(
                f"data.seq_len={seq_len}: {name} is shorter than one sequence ({len(tokens)} tokens): "
                "use more text or a smaller data.seq_len"
            )
        if keep_documents_apart and eos_token_id is None:
            raise ValueError("data.keep_documents_apart=True needs eos_token_id, which ends each document: pass it")
        self.tokens = tokens
        self.seq_len = seq_len
        self.eos_token_id = eos_token_id if keep_documents_apart else None

    def __len__(self) -> int:
        return len(self.tokens) // self.seq_len

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        piece = self.tokens[index * self.seq_len : (index + 1) * self.seq_len]
        return _sample(torch.from_numpy(piece.astype(np.int64)), self.eos_token_id)


def _sample(input_ids: Tensor, border: int | None) -> dict[str, Tensor]:
    """One packed sequence; `border` is the token that ends a document, or None where documents may see each other."""
    labels = input_ids.clone()
    if border is None:
        return {"input_ids": input_ids, "labels": labels}
    place = torch.arange(len(input_ids))
    first = torch.zeros_like(place, dtype=torch.bool)
    first[1:] = input_ids[:-1] == border
    start = torch.where(first, place, 0).cummax(0).values  # of the document that each token belongs to
    labels[first] = IGNORED
    return {"input_ids": input_ids, "labels": labels, "position_ids": place - start}


class ChatDataset(Dataset[dict[str, Tensor]]):
    """Conversations through the tokenizer's chat template, one per sequence, with loss on the answers only.

    `rows` are dicts with `messages` or `prompt` and `completion` (see `load_chat`), or names of jsonl or parquet files.
    Item i: `input_ids` and `labels`, int64 (seq_len,); padded on the right, labels -100 on everything but the answers.
    No attention mask is needed: padding comes after all that is trained on.

    Answers are the tokens that the template marks with {% generation %}. In a template without it: the text from where
    an answer starts (the conversation so far, rendered with `add_generation_prompt=True`) to where the conversation
    with that answer ends, its end-of-turn mark included; a template that renders a turn differently once others follow
    is refused. Without a template, prompt and completion are plain text: prompt + completion + end of text.

    Conversations longer than `seq_len` lose their end, those without a trained token are dropped: the attributes
    `truncated` and `dropped` count them, and one warning says so.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]] | Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int
    ) -> None:
        if seq_len < 2:
            raise ValueError(f"data.seq_len={seq_len}: must be at least 2, a token and the next one")
        if not tokenizer.is_fast:
            raise ValueError(
                f"data.tokenizer={tokenizer.name_or_path!r} is a slow one: chat data needs a fast tokenizer"
            )
        names = [row for row in rows if isinstance(row, str)]
        parsed = read_chat(names, "data.files") if names else [row for row in rows if not isinstance(row, str)]
        self.seq_len = seq_len
        self.pad_token_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        self.truncated = self.dropped = 0
        self.samples: list[tuple[Tensor, Tensor]] = []  # unpadded, int32 ids and bool "is trained on"
        for number, row in enumerate(parsed, start=1):
            where = f"chat row {number}, {row!s:.60}"
            check_chat_row(row, where)
            try:
                ids, answer = _chat_tokens(_whole(row), tokenizer)
            except Exception as error:  # a template is a program of its own: it may raise anything
                raise ValueError(f"{where}: {first_line(error)}") from error
            self.truncated += len(ids) > seq_len
            if any(answer[1:seq_len]):  # the first token is predicted from nothing
                self.samples.append((torch.tensor(ids[:seq_len], dtype=torch.int32), torch.tensor(answer[:seq_len])))
            else:
                self.dropped += 1
        if not self.samples:
            raise ValueError(
                f"data.seq_len={seq_len}: none of the {len(parsed)} chat rows holds a trained token within it: "
                "use a larger data.seq_len or rows with answers"
            )
        if self.truncated or self.dropped:
            warnings.warn(
                f"chat data: {self.truncated} of {len(parsed)} rows are longer than data.seq_len={seq_len} and lose "
                f"their end, {self.dropped} have no trained token in it and are dropped",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, answer = self.samples[index]
        input_ids = torch.full((self.seq_len,), self.pad_token_id, dtype=torch.int64)
        labels = torch.full((self.seq_len,), IGNORED, dtype=torch.int64)
        input_ids[: len(ids)] = ids
        labels[: len(ids)][answer] = ids[answer].long()
        return {"input_ids": input_ids, "labels": labels}


def _whole(value: Any) -> Any:
    """`value` with whole characters in each of its texts."""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, Mapping):
        return {key: _whole(item) for key, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list) else value


def _chat_tokens(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """(ids, is answer) of one conversation."""
    if not tokenizer.chat_template:
        if row.get("messages"):
            raise ValueError(
                f"data.tokenizer={tokenizer.name_or_path!r} has no chat template, which messages need: name the "
                "tokenizer of a chat model, or use prompt and completion"
            )
        text = row["prompt"] + row["completion"] + (tokenizer.eos_token or "")
        spans = [(len(row["prompt"]), len(text))]
    else:
        pair = ("user", row.get("prompt")), ("assistant", row.get("completion"))
        messages = row.get("messages") or [{"role": role, "content": content} for role, content in pair]
        if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
            marked: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return marked["input_ids"], [mask == 1 for mask in marked["assistant_masks"]]
        text, spans = _answer_spans(messages, tokenizer)
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # A token over the border of an answer counts: the model has to produce it.
    inside = [any(a < end and b > start for start, end in spans) for a, b in encoded["offset_mapping"]]
    return encoded["input_ids"], inside


def _answer_spans(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the (start, end) characters of its answers, by rendering its beginnings."""
    render: Callable[..., str] = functools.partial(tokenizer.apply_chat_template, tokenize=False)  # type: ignore
    text, spans = render(messages), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise ValueError("the conversation starts with an answer: put a user or system message before it")
        before, after = render(messages[:i], add_generation_prompt=True), render(messages[: i + 1])
        if not after.startswith(before) or not text.startswith(after):
            raise ValueError(
                "the chat template renders a turn differently when others follow, so answers cannot be found: mark "
                "them in the template with {% generation %}"
            )
        spans.append((len(before), len(after)))
    return text, spans


class StreamDataset(IterableDataset[dict[str, Tensor]]):
    """Packed sequences from a `datasets` name (or folder), read as a stream: nothing is downloaded as a whole.

    Items are those of `PackedDataset`. The order is the source's own: a shuffle buffer would lose its rows when a run
    is continued, so there is none. At the end the stream begins again, unless `repeat` is False. All of `world_size`
    processes read it, and each takes every `world_size`-th sequence: what they take together, and where they stand, does not
    depend on their number.

    `state_dict()` is plain JSON: the position in the source, from `datasets`, and the tokens read but not yet used.
    After `load_state_dict()` the next iteration goes on with the very next sequence.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        *,
        config: str | None = None,
        split: str = "train",
        text_key: str = "text",
        rank: int = 0,
        world_size: int = 1,
        keep_documents_apart: bool = False,
        repeat: bool = True,
    ) -> None:
        datasets = require("datasets", "train")
        if seq_len < 2:
            raise ValueError(f"data.seq_len={seq_len}: must be at least 2, a token and the next one")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"data.tokenizer={tokenizer.name_or_path!r} has no end-of-text token: set its eos_token")
        try:
            source = datasets.load_dataset(name, config, split=split, streaming=True)
        except Exception as error:  # whatever datasets, the hub or the network raise, the user wants one line
            raise ValueError(
                f"data.dataset={name!r} (config {config!r}, split {split!r}) cannot be opened: {first_line(error)}"
            ) from error
        self.source = source
        self.where = f"data.dataset={name!r}"
        self.rank, self.world_size = rank, world_size
        self.encode = batch_encoder(tokenizer)
        self.seq_len, self.text_key, self.repeat = seq_len, text_key, repeat
        self.eos_token_id: int = tokenizer.eos_token_id
        self.border = tokenizer.eos_token_id if keep_documents_apart else None
        self.load_state_dict({"epoch": 0, "source": self.source.state_dict(), "tokens": []})

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands, to go on behind the sequence yielded last."""
        return {"epoch": self.epoch, "source": self.position, "tokens": list(self.tokens)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration start where `state` was taken."""
        self.start = state
        self.epoch: int = state["epoch"]
        self.position: dict[str, Any] = state["source"]
        self.tokens: list[int] = list(state["tokens"])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.load_state_dict(self.start)
        self.source.set_epoch(self.epoch)
        self.source.load_state_dict(self.position)
        yield from self._full_sequences()  # those that a loaded state left over
        silent_epochs = 0  # one may be: a loaded state can stand at the very end
        while True:
            silent_epochs += 1
            for row in self.source:
                self.position = self.source.state_dict()  # a copy; right after a load the source has none to give
                text = row.get(self.text_key, "missing")
                if text is None or (isinstance(text, str) and not text.strip()):
                    continue  # as files leave it out
                silent_epochs = 0
                ids = self.encode([text_of(row, self.text_key, self.where)])[0]
                self.tokens += [*ids, self.eos_token_id]
                yield from self._full_sequences()
            if not self.repeat:
                return
            if silent_epochs == 2:
                raise ValueError(f"{self.where} has no rows: use another split")
            self.epoch += 1
            self.source.set_epoch(self.epoch)  # the loaded position holds for its own epoch only: this starts over

    def _full_sequences(self) -> Iterator[dict[str, Tensor]]:
        first, all_of_them = self.rank * self.seq_len, self.world_size * self.seq_len
        while len(self.tokens) >= all_of_them:
            # Removed before they are yielded: whoever asks for the state then gets the one behind these sequences.
            piece = self.tokens[first : first + self.seq_len]
            del self.tokens[:all_of_them]
            yield _sample(torch.tensor(piece, dtype=torch.int64), self.border)


def sample_index(seed: int, position: int, size: int) -> int:
    """Which of `size` samples stands at `position`: every epoch is its own permutation, drawn from (seed, epoch)."""
    return int(_permutation(seed, position // size, size)[position % size])


@functools.lru_cache(maxsize=4)  # a permutation is drawn once per epoch, not once per sample
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8]  # seeds 0, 1, 2 are too much alike for a generator
    return torch.randperm(size, generator=torch.Generator().manual_seed(int.from_bytes(mixed, "big") >> 1))


class _Positions(Sampler[int]):
    """Endless indices: those at positions start, start + stride, ..., in the shuffled order or in the dataset's own."""

    def __init__(self, size: int, seed: int, start: int, stride: int, shuffle: bool) -> None:
        self.size, self.seed, self.start, self.stride, self.shuffle = size, seed, start, stride, shuffle

    def __iter__(self) -> Iterator[int]:
        for position in itertools.count(self.start, self.stride):
            yield sample_index(self.seed, position, self.size) if self.shuffle else position % self.size


def make_loader(
    dataset: Dataset[dict[str, Tensor]],
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[dict[str, Tensor]]:
    """Endless batches of `batch_size` samples for training.

    The sample at position p is a pure function of (seed, p). `start` counts samples, those of all ranks together: rank
    r reads positions start + r, start + r + world_size, ..., so that N processes read together what one would.

    A stream has an order, a position and a rank of its own: `seed` and `shuffle` do not apply, `start` and
    `num_workers` must be 0 (its state would be in the workers, out of reach).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    if start < 0 or not 0 <= rank < world_size:
        raise ValueError(
            f"start={start}, rank={rank}, world_size={world_size}: need start >= 0 and 0 <= rank < world_size"
        )
    generator = torch.Generator()  # its own, or DataLoader would draw from the one that everybody shares
    if not isinstance(dataset, StreamDataset):
        positions = _Positions(len(dataset), seed, start + rank, world_size, shuffle)  # type: ignore[arg-type]
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=positions,
            num_workers=num_workers,
            generator=generator,
            pin_memory=pin_memory,
            worker_init_fn=_leave_signals_to_the_main_process,
        )
    if start or num_workers:
        raise ValueError(
            f"start={start}, data.num_workers={num_workers}: both must be 0 for data.dataset; a stream is continued "
            "with its load_state_dict"
        )
    if (rank, world_size) != (dataset.rank, dataset.world_size):
        raise ValueError(f"rank={rank}, world_size={world_size}: the stream was opened with others: pass them there")
    return DataLoader(dataset, batch_size=batch_size, generator=generator, pin_memory=pin_memory)


def _leave_signals_to_the_main_process(_: int) -> None:
    """A terminal's Ctrl-C goes to all of them, and the step that is being finished still wants its batches."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def eval_loader(
    dataset: Dataset[dict[str, Tensor]], *, batch_size: int, max_sequences: int | None = None
) -> DataLoader[dict[str, Tensor]]:
    """Every sample once, in order; with `max_sequences`, that many, spread evenly over the dataset.

    Of a stream the first `max_sequences` are read once and kept.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    if max_sequences is not None and max_sequences < 1:
        raise ValueError(f"max_sequences={max_sequences}: must be at least 1, or None for all")
    generator = torch.Generator()  # evaluating must not move the generator that training shares
    if isinstance(dataset, StreamDataset):
        if max_sequences is None:
            raise ValueError("max_sequences=None: a stream needs a number of sequences to evaluate on")
        kept: Any = list(itertools.islice(dataset, max_sequences))
        if not kept:
            raise ValueError(
                f"data.valid_split: {dataset.where} holds fewer than data.seq_len={dataset.seq_len} tokens: name another split"
            )
        return DataLoader(kept, batch_size=batch_size, generator=generator)
    size = len(dataset)  # type: ignore[arg-type]
    count = min(size, max_sequences or size)
    chosen = [i * size // count for i in range(count)]
    return DataLoader(dataset, batch_size=batch_size, sampler=chosen, generator=generator)
