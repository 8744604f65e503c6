"""Text to batches: what is read, what is refused, what a model sees, and that a position is all there is to resume."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from subspan.training import corpus as corpus_module
from subspan.training.data import (
    ChatDataset,
    Corpus,
    PackedDataset,
    StreamDataset,
    eval_loader,
    get_tokenizer,
    load_chat,
    load_corpus,
    make_loader,
    sample_index,
    tokenize,
)

TEXT = "the quick brown fox jumps over a lazy dog while seven small wizards mix 12 jugs of red wine"
WORDS = TEXT.split(" ")
DOCUMENTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(3, 40)) + f"\nnumber {i}." for i in range(60)]
STREAMED = DOCUMENTS[:24]
EOS = 0  # of the trained tokenizer: its one special token comes first


def corpus_of(documents: list[str]) -> Corpus:
    return Corpus(documents, [], "", "", ())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return get_tokenizer(None, vocab_size=320, corpus=corpus_of(DOCUMENTS), cache_dir=tmp_path_factory.mktemp("bpe"))


def fresh(tokenizer: Any, template: str | None) -> Any:
    """A copy of the tokenizer with another chat template."""
    copy = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    copy.chat_template = template
    return copy


def write_rows(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refuse(call: Callable[[], Any], *parts: str) -> None:
    """The call raises a ValueError of one line that holds all the parts."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# ---------------------------------------------------------------- reading


def test_text_files_are_cut_at_the_separator(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("third\r\nline\n")
    (tmp_path / "a.txt").write_text("\ufefffirst\n<|endoftext|>\n  second\n\n<|endoftext|>\n \n")
    (tmp_path / "v.md").write_text("held <|endoftext|>out\n")
    corpus = load_corpus([f"{tmp_path}/*.txt", f"{tmp_path}/a.txt"], valid_files=[f"{tmp_path}/v.md"])
    assert corpus.train == ["first", "  second", "third\r\nline"]  # sorted, each file once, blank documents gone
    assert corpus.valid == ["held ", "out"]
    assert [Path(name).name for name in corpus.files] == ["a.txt", "b.txt", "v.md"]
    assert "2 files" in corpus.description
    assert "3 documents" in corpus.description
    whole = load_corpus([f"{tmp_path}/v.md"], valid_files=[f"{tmp_path}/v.md"], document_separator=None)
    assert whole.train == ["held <|endoftext|>out"]


def test_rows_of_jsonl_and_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"body": "one\u2028two", "n": 1}, {"body": "three", "n": 2}, {"body": " ", "n": 3}]
    lines = write_rows(tmp_path / "x.jsonl", rows)
    with open(lines, "a", encoding="utf-8") as file:
        file.write('\n{"body": "un\u2028escaped"}\n{"body": null}\n{"body": "half \\ud800 pair"}\n')
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    corpus = load_corpus([lines], valid_files=[str(tmp_path / "x.parquet")], text_key="body")
    assert corpus.train == ["one\u2028two", "three", "un\u2028escaped", "half ? pair"]
    assert corpus.valid == ["one\u2028two", "three"]
    for name in ("x.json", "X.JSONL"):
        other = shutil.copy(lines, tmp_path / name)
        assert load_corpus([other], valid_files=[lines], text_key="body").train == corpus.train


def test_recursive_globs(tmp_path: Path) -> None:
    for name in ("a.txt", "x/b.txt", "x/y/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = load_corpus([f"{tmp_path}/**/*.txt"], valid_files=[f"{tmp_path}/a.txt"])
    assert corpus.train == ["x/b.txt", "x/y/c.txt"]


def test_held_out_documents_depend_on_their_text_alone(tmp_path: Path) -> None:
    forward = write_rows(tmp_path / "f.jsonl", [{"text": text} for text in DOCUMENTS])
    backward = write_rows(tmp_path / "b.jsonl", [{"text": text} for text in DOCUMENTS[::-1]])
    one, other = load_corpus([forward], valid_fraction=0.25), load_corpus([backward], valid_fraction=0.25)
    wanted = {d for d in DOCUMENTS if hashlib.sha256(d.encode()).digest()[0] < 64}  # the lowest quarter of the range
    assert set(one.valid) == set(other.valid) == wanted
    assert sorted(one.train + one.valid) == sorted(DOCUMENTS)
    assert one.sha256 != other.sha256  # the order of documents is data too


@pytest.mark.parametrize(("fraction", "held"), [(1e-9, 1), (1 - 1e-9, 3)])
def test_never_nothing_and_never_all_held_out(tmp_path: Path, fraction: float, held: int) -> None:
    rows = write_rows(tmp_path / "f.jsonl", [{"text": text} for text in ("a", "b", "c", "d")])
    corpus = load_corpus([rows], valid_fraction=fraction)
    assert (len(corpus.train), len(corpus.valid)) == (4 - held, held)


def test_copies_of_a_document_stay_on_one_side(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "f.jsonl", [{"text": text} for text in DOCUMENTS * 2])
    corpus = load_corpus([rows], valid_fraction=0.3)
    assert not set(corpus.train) & set(corpus.valid)
    same = write_rows(tmp_path / "s.jsonl", [{"text": "same"}] * 3)
    refuse(lambda: load_corpus([same]), "data.valid_fraction=0.01", "the same", "data.valid_files")


def test_a_document_alone_is_cut_at_a_line(tmp_path: Path) -> None:
    text = "\n".join(f"line {i}" for i in range(100, 200)) + "\n"
    (tmp_path / "a.txt").write_text(text)
    corpus = load_corpus([f"{tmp_path}/a.txt"], valid_fraction=0.1)
    assert corpus.train[0] + corpus.valid[0] == text.rstrip("\n")
    assert corpus.valid[0].startswith("line 1")
    assert len(corpus.valid[0]) == len("line 190\n") * 10 - 1
    (tmp_path / "b.txt").write_text("head\n" + "x" * 1000)  # no line end close by: cut where told
    assert len(load_corpus([f"{tmp_path}/b.txt"], valid_fraction=0.1).valid[0]) == 100
    (tmp_path / "c.txt").write_text("x")
    refuse(lambda: load_corpus([f"{tmp_path}/c.txt"]), "data.files", "1 characters", "data.valid_files")


def test_what_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_text("text")
    cases: dict[str, bytes] = {
        "empty.txt": b"",
        "blank.txt": b" \n",
        "separators.txt": b"<|endoftext|>\n<|endoftext|>",
        "latin.txt": b"caf\xe9",
        "zero.txt": b"a\0b",
        "key.jsonl": b'{"text": "a"}\n\n{"txt": "a"}',
        "kind.jsonl": b'{"text": 3}',
        "broken.jsonl": b'{"text": "a"}\n{"text": ',
        "list.jsonl": b'["a"]',
        "fake.parquet": b"text, not parquet",
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    wanted = {
        "empty.txt": ["empty.txt is empty"],
        "blank.txt": ["blank.txt is empty"],
        "separators.txt": ["holds no text", "remove it"],
        "latin.txt": ["latin.txt is not UTF-8 text (byte 3)", "convert it"],
        "zero.txt": ["zero.txt is a binary file", "remove it"],
        "key.jsonl": ["data.text_key='text'", "key.jsonl:3 has no such key", "['txt']"],
        "kind.jsonl": ["data.text_key='text'", "kind.jsonl:1 holds no text", "3"],
        "broken.jsonl": ["broken.jsonl:2 is not JSON", "one JSON object per line"],
        "list.jsonl": ["list.jsonl:1 is a list", "one JSON object per line"],
        "fake.parquet": ["fake.parquet is not a parquet file"],
    }
    for name, parts in wanted.items():
        argument = [] if "text_key" in parts[0] else ["data.files"]
        refuse(lambda name=name: load_corpus([str(good), str(tmp_path / name)]), *argument, *parts)
    refuse(
        lambda: load_corpus([str(good)], valid_files=[str(tmp_path / "zero.txt")]),
        "data.valid_files",
        "is a binary file",
    )
    refuse(lambda: load_corpus([f"{tmp_path}/*.csv"]), "data.files=", "*.csv", "matches no file", "check the path")
    refuse(lambda: load_corpus([str(tmp_path / "gone.txt")]), "data.files=", "gone.txt", "matches no file")
    refuse(lambda: load_corpus([str(tmp_path)]), "data.files=", "is a folder", f"{tmp_path}/*.txt")
    refuse(lambda: load_corpus([]), "data.files=[]", "name at least one file")
    refuse(lambda: load_corpus("a.txt"), "data.files='a.txt'", "['a.txt']")
    refuse(lambda: load_corpus(None, valid_files=["v.txt"]), "data.valid_files=['v.txt']", "data.files")
    refuse(lambda: load_corpus([str(good)], valid_fraction=1.0), "data.valid_fraction=1.0", "between 0 and 1")
    refuse(lambda: load_corpus(None, valid_fraction=0.0), "data.valid_fraction=0.0", "0.01")


# ---------------------------------------------------------------- the embedded default


def test_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        *(f"m{i}.py" for i in range(40)),
        "json/decoder.py",
        "json/tests/test_x.py",
        "test/test_y.py",
        "idlelib/idle_test/z.py",
        "site-packages/torch/nn.py",
        "dist-packages/a.py",
        "json/__pycache__/b.py",
        "json/notes.txt",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"# {name}\r\n".encode())
    (tmp_path / "odd.py").write_bytes(b"# \xe9\n")
    (tmp_path / "blank.py").write_bytes(b"\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    refuse(lambda: load_corpus(None), "0.0 MB", str(tmp_path), "--data.files")
    monkeypatch.setattr(corpus_module, "STDLIB_MIN_BYTES", 1)
    corpus = load_corpus(None, valid_fraction=0.25)
    assert list(corpus.files) == sorted(["json/decoder.py", "odd.py", *(f"m{i}.py" for i in range(40))])
    held = {f"# {n}\n" for n in corpus.files if hashlib.sha256(n.encode()).digest()[0] < 64}
    assert set(corpus.valid) == held
    assert "# \ufffd\n" in corpus.train + corpus.valid


def test_this_machines_standard_library_is_enough_text() -> None:
    try:
        corpus = load_corpus(None)
    except ValueError as error:
        pytest.skip(str(error))  # a minimal Python, as the message says
    assert re.fullmatch(r"Python 3\.\d+\.\S+ standard library, \d+\.\d MB", corpus.description)
    assert 0 < sum(map(len, corpus.valid)) < 0.2 * sum(map(len, corpus.train))


# ---------------------------------------------------------------- tokens


def test_trained_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    assert len(tokenizer) == 320
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id == EOS
    strange = "  tab\t\r\n caf\u00e9 \u4e16\U0001f600 \x00 x"
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange  # byte level: nothing is unknown
    again = get_tokenizer(None, vocab_size=320, corpus=corpus_of(DOCUMENTS), cache_dir=tmp_path)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()  # trained anew, the same
    tokenizer.save_pretrained(tmp_path / "out")
    named = get_tokenizer(str(tmp_path / "out"), vocab_size=1, corpus=None, cache_dir=tmp_path)
    assert named(DOCUMENTS[0])["input_ids"] == tokenizer(DOCUMENTS[0])["input_ids"]
    assert named.eos_token_id == EOS
    (folder,) = tmp_path.glob("bpe-*")  # one, and nothing unfinished beside it
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    get_tokenizer(None, vocab_size=320, corpus=corpus_of(DOCUMENTS), cache_dir=tmp_path)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    get_tokenizer(None, vocab_size=320, corpus=corpus_of(DOCUMENTS[1:]), cache_dir=tmp_path)
    assert len(list(tmp_path.glob("bpe-*"))) == 2  # another text, another tokenizer


def test_tokenizers_that_are_refused(tmp_path: Path) -> None:
    def get(name: str | None, size: int = 320, documents: list[str] | None = DOCUMENTS) -> Any:
        corpus = None if documents is None else corpus_of(documents)
        return get_tokenizer(name, vocab_size=size, corpus=corpus, cache_dir=tmp_path / "cache")

    (tmp_path / "nothing").mkdir()
    refuse(lambda: get(str(tmp_path / "nothing")), "data.tokenizer=", "nothing", "cannot be loaded", "name a folder")
    refuse(lambda: get(None, size=256), "data.vocab_size=256", "at least 257")
    refuse(lambda: get(None, documents=None), "data.tokenizer=null", "name a tokenizer")
    assert not (tmp_path / "cache").exists()


def test_tokens_are_written_once(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "BATCH_CHARACTERS", 500)  # several batches
    tokens = tokenize(DOCUMENTS, tokenizer, cache_dir=tmp_path, key="train")
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    assert not tokens.flags.writeable
    wanted = [i for document in DOCUMENTS for i in [*tokenizer(document)["input_ids"], EOS]]
    assert tokens.tolist() == wanted
    (path,) = tmp_path.iterdir()
    before = path.stat().st_mtime_ns
    assert tokenize(DOCUMENTS, tokenizer, cache_dir=tmp_path, key="train").tolist() == wanted
    assert path.stat().st_mtime_ns == before
    shorter = tokenize(DOCUMENTS[1:], tokenizer, cache_dir=tmp_path, key="train")  # the same key, another text
    assert len(shorter) < len(tokens)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_tokenization_leaves_nothing(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Iterator[list[int]]:
        yield [1, 2, 3]
        assert len(list(tmp_path.iterdir())) == 1  # the unfinished file
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus_module, "_encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(DOCUMENTS, tokenizer, cache_dir=tmp_path, key="train")
    assert list(tmp_path.iterdir()) == []


def test_saved_truncation_and_large_vocabularies(tokenizer: Any, tmp_path: Path) -> None:
    short = fresh(tokenizer, None)
    short.backend_tokenizer.enable_truncation(4)
    wanted = sum(len(tokenizer(document)["input_ids"]) + 1 for document in DOCUMENTS)
    assert len(tokenize(DOCUMENTS, short, cache_dir=tmp_path, key="a")) == wanted
    large = get_tokenizer(None, vocab_size=320, corpus=corpus_of(DOCUMENTS), cache_dir=tmp_path / "bpe")
    large.add_tokens([f"<{i}>" for i in range(2**16)])
    tokens = tokenize(["<65535>"], large, cache_dir=tmp_path, key="b")
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [320 + 65535, EOS]


def test_tokenize_refuses(tokenizer: Any, tmp_path: Path) -> None:
    endless = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    refuse(lambda: tokenize(DOCUMENTS, endless, cache_dir=tmp_path, key="x"), "data.tokenizer=", "set its eos_token")
    refuse(lambda: tokenize([], tokenizer, cache_dir=tmp_path, key="valid"), "documents=[]", "'valid'")


# ---------------------------------------------------------------- packed sequences


def test_packed_sequences() -> None:
    dataset = PackedDataset(np.arange(1, 12, dtype=np.uint16), 4)
    assert len(dataset) == 2
    assert dataset[1]["input_ids"].tolist() == dataset[1]["labels"].tolist() == [5, 6, 7, 8]
    assert set(dataset[1]) == {"input_ids", "labels"}
    assert dataset[1]["input_ids"].dtype == torch.int64
    with pytest.raises(IndexError):
        dataset[2]


def test_documents_apart() -> None:
    tokens = np.array([5, 6, 0, 7, 0, 0, 8, 9, 9, 0, 4, 4, 4, 4, 4, 4], dtype=np.uint16)
    first, second = PackedDataset(tokens, 8, eos_token_id=0, keep_documents_apart=True)
    assert first["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert first["labels"].tolist() == [5, 6, 0, -100, 0, -100, -100, 9]
    assert second["position_ids"].tolist() == [0, 1, 0, 1, 2, 3, 4, 5]  # it starts within a document
    assert second["labels"].tolist() == [9, 0, -100, 4, 4, 4, 4, 4]


def test_packed_refuses() -> None:
    tokens = np.arange(10, dtype=np.uint16)
    refuse(lambda: PackedDataset(tokens, 11), "data.seq_len=11", "shorter than one sequence (10 tokens)", "smaller")
    refuse(lambda: PackedDataset(tokens, 1), "data.seq_len=1", "at least 2")
    refuse(
        lambda: PackedDataset(tokens, 4, keep_documents_apart=True), "data.keep_documents_apart=True", "eos_token_id"
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_does_not_see_the_document_before(attention: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()

    def logits(first: list[int], apart: bool, **options: Any) -> torch.Tensor:
        tokens = np.array([*first, 0, 7, 8, 9, 10, 0, 3], dtype=np.uint16)
        sample = PackedDataset(tokens, len(tokens), eos_token_id=0, keep_documents_apart=apart)[0]
        batch = {name: torch.stack([value, value]) for name, value in sample.items()}
        return model(**batch, use_cache=False).logits[0, 4:9]  # of the second document, five tokens with its end

    with torch.no_grad():
        alone = model(torch.tensor([[7, 8, 9, 10, 0]]), use_cache=False).logits[0]
        assert torch.allclose(logits([1, 2, 3], True), alone, atol=1e-5)
        assert torch.allclose(logits([4, 5, 6], True), alone, atol=1e-5)
        assert not torch.allclose(logits([1, 2, 3], False), logits([4, 5, 6], False), atol=1e-3)


# ---------------------------------------------------------------- loaders


def take(loader: Any, batches: int) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in itertools.islice(loader, batches)]


def numbers(count: int) -> PackedDataset:
    """Sequences that start with 0, 1, ..., count - 1."""
    return PackedDataset(np.repeat(np.arange(count, dtype=np.uint16), 2), 2)


def test_order_is_a_function_of_seed_and_position() -> None:
    order = [sample_index(3, position, 10) for position in range(40)]
    epochs = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sample_index(3, 27, 10) == order[27]
    assert [sample_index(4, position, 10) for position in range(40)] != order
    assert take(make_loader(numbers(10), batch_size=3, seed=3), 12) == [order[i : i + 3] for i in range(0, 36, 3)]


def test_loader_starts_anywhere_and_in_order() -> None:
    whole = take(make_loader(numbers(10), batch_size=4, seed=1), 10)
    loader = make_loader(numbers(10), batch_size=4, seed=1, start=12)
    assert take(loader, 5) == whole[3:8]
    assert take(loader, 5) == whole[3:8]  # iterating again starts again
    assert take(make_loader(numbers(10), batch_size=4, seed=1, start=12, num_workers=2), 5) == whole[3:8]
    assert take(make_loader(numbers(3), batch_size=4, seed=1, shuffle=False), 2) == [[0, 1, 2, 0], [1, 2, 0, 1]]


def test_ranks_read_together_what_one_would() -> None:
    whole = take(make_loader(numbers(10), batch_size=6, seed=1, start=6), 5)
    parts = [take(make_loader(numbers(10), batch_size=2, seed=1, start=6, rank=r, world_size=3), 5) for r in range(3)]
    assert [sorted(a + b + c) for a, b, c in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]


def test_evaluation_reads_once_and_in_order() -> None:
    assert take(eval_loader(numbers(5), batch_size=2), 99) == [[0, 1], [2, 3], [4]]
    assert take(eval_loader(numbers(10), batch_size=2, max_sequences=4), 99) == [[0, 2], [5, 7]]
    assert take(eval_loader(numbers(3), batch_size=2, max_sequences=8), 99) == [[0, 1], [2]]


def test_loaders_leave_the_shared_generator_alone() -> None:
    before = torch.random.get_rng_state()
    take(make_loader(numbers(5), batch_size=2, seed=0), 5)
    take(eval_loader(numbers(5), batch_size=2), 5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_loaders_refuse() -> None:
    refuse(lambda: make_loader(numbers(5), batch_size=0, seed=0), "batch_size=0", "at least 1")
    refuse(lambda: make_loader(numbers(5), batch_size=1, seed=0, start=-1), "start=-1", "start >= 0")
    refuse(lambda: make_loader(numbers(5), batch_size=1, seed=0, rank=2, world_size=2), "rank=2", "rank < world_size")
    refuse(lambda: eval_loader(numbers(5), batch_size=0), "batch_size=0", "at least 1")
    refuse(lambda: eval_loader(numbers(5), batch_size=1, max_sequences=0), "max_sequences=0", "None for all")


# ---------------------------------------------------------------- chat

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{%- if m['role'] == 'assistant' -%}{%- generation -%}"
    "{{ m['content'] }}<end>{%- endgeneration -%}{% else %}{{ m['content'] }}<end>{% endif %}{% endfor %}"
)
# Says how many turns there are: the beginning of a conversation depends on its end.
UNSTABLE = "{{ messages | length }}" + PLAIN
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the quick fox?"},
    {"role": "assistant", "content": "lazy caf\u00e9 dog"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "seven wizards"},
]


def trained_text(sample: dict[str, torch.Tensor], tokenizer: Any) -> str:
    return tokenizer.decode(sample["labels"][sample["labels"] != -100])


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_loss_on_the_answers_only(tokenizer: Any, template: str) -> None:
    chat = fresh(tokenizer, template)
    data = ChatDataset([{"messages": TALK}, {"prompt": "a dog?", "completion": " red wine"}], chat, 128)
    talk, pair = data[0], data[1]
    assert trained_text(talk, chat) == "lazy caf\u00e9 dog<end>seven wizards<end>"
    assert trained_text(pair, chat) == " red wine<end>"
    rendered = "[user]a dog?<end>[assistant] red wine<end>"
    ids = pair["input_ids"]
    assert chat.decode(ids) == rendered + "<|endoftext|>" * (128 - len(chat(rendered)["input_ids"]))
    assert ids.shape == pair["labels"].shape == (128,)
    assert ids.dtype == pair["labels"].dtype == torch.int64
    trained = pair["labels"] != -100
    assert torch.equal(pair["labels"][trained], ids[trained])


def test_prompt_and_completion_without_a_template(tokenizer: Any) -> None:
    plain = fresh(tokenizer, None)
    (sample,) = ChatDataset([{"prompt": "the lazy", "completion": " dog"}], plain, 32)
    assert trained_text(sample, plain) == " dog<|endoftext|>"
    refuse(lambda: ChatDataset([{"messages": TALK}], plain, 32), "chat row 1", "data.tokenizer=", "no chat template")


def test_long_conversations_are_cut_and_counted(tokenizer: Any) -> None:
    chat = fresh(tokenizer, PLAIN)
    rows = [
        {"prompt": "hi", "completion": "dog " * 40},
        {"prompt": "dog " * 40, "completion": "hi"},
        {"messages": TALK[:2]},
        {"prompt": "hi", "completion": "dog"},
    ]
    with pytest.warns(UserWarning, match=r"3 of 4 rows are longer than data.seq_len=32 .* 2 have no trained token"):
        data = ChatDataset(rows, chat, 32)
    assert (len(data), data.truncated, data.dropped) == (2, 3, 2)
    assert (data[0]["labels"] != -100).sum() > 5
    assert data[0]["labels"][-1] != -100
    refuse(lambda: ChatDataset(rows[1:3], chat, 32), "data.seq_len=32", "none of the 2 chat rows", "larger")


def test_chat_files(tokenizer: Any, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [*TALK[:2], {"role": "assistant", "content": str(i)}]} for i in range(20)]
    lines = write_rows(tmp_path / "chat.jsonl", rows)
    train, valid = load_chat([lines], valid_fraction=0.2)
    assert len(valid) >= 1
    assert sorted(map(str, train + valid)) == sorted(map(str, rows))
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "chat.parquet")
    assert load_chat([lines], valid_files=[str(tmp_path / "chat.parquet")]) == (rows, rows)
    chat = fresh(tokenizer, PLAIN)
    assert [trained_text(sample, chat) for sample in ChatDataset([lines], chat, 64)] == [f"{i}<end>" for i in range(20)]


def test_half_a_character_in_a_conversation_is_replaced(tokenizer: Any) -> None:
    chat = fresh(tokenizer, PLAIN)
    rows = [{"messages": [*TALK[:2], {"role": "assistant", "content": "half \ud83d pair"}]}]
    assert [trained_text(sample, chat) for sample in ChatDataset(rows, chat, 64)] == ["half ? pair<end>"]


def test_chat_refuses(tokenizer: Any, tmp_path: Path) -> None:
    chat = fresh(tokenizer, PLAIN)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"text": "x"}, "keys are ['text']"),
        ({"prompt": "x"}, "prompt and completion"),
        ({"messages": []}, "list of messages"),
        ({"messages": [{"role": "user"}]}, "needs a role and a content"),
    ]
    for row, part in bad:
        path = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}, row])
        refuse(lambda path=path: load_chat([path]), "data.files", "bad.jsonl:2", part)
        refuse(lambda row=row: ChatDataset([row], chat, 32), "chat row 1", part)
    refuse(lambda: load_chat([str(tmp_path / "gone.jsonl")]), "data.files=", "matches no file")
    refuse(lambda: ChatDataset([{"messages": TALK[2:]}], chat, 64), "chat row 1", "starts with an answer")
    unstable = fresh(tokenizer, UNSTABLE)
    refuse(lambda: ChatDataset([{"messages": TALK}], unstable, 64), "chat row 1", "{% generation %}")
    failing = fresh(tokenizer, "{{ raise_exception('no\nsystem') }}")
    refuse(lambda: ChatDataset([{"messages": TALK}], failing, 64), "chat row 1", "no")
    refuse(lambda: ChatDataset([{"messages": TALK}], chat, 1), "data.seq_len=1", "at least 2")


# ---------------------------------------------------------------- streams


@pytest.fixture
def stream_folder(tmp_path: Path) -> str:
    for shard in range(4):
        rows = [{"text": text, "n": 1} for text in STREAMED[shard * 6 : shard * 6 + 6]]
        write_rows(tmp_path / "stream" / f"part-{shard}.jsonl", rows)
    return str(tmp_path / "stream")


def stream_tokens(dataset: StreamDataset) -> list[int]:
    return [i for sample in dataset for i in sample["input_ids"].tolist()]


def test_stream_is_the_packed_text(tokenizer: Any, stream_folder: str, tmp_path: Path) -> None:
    packed = tokenize(STREAMED, tokenizer, cache_dir=tmp_path / "cache", key="x")
    dataset = StreamDataset(stream_folder, tokenizer, 16, repeat=False)
    assert stream_tokens(dataset) == packed.tolist()[: len(packed) // 16 * 16]
    assert stream_tokens(dataset) == packed.tolist()[: len(packed) // 16 * 16]  # iterating again starts again
    apart = StreamDataset(stream_folder, tokenizer, 64, keep_documents_apart=True)
    wanted = PackedDataset(packed, 64, eos_token_id=EOS, keep_documents_apart=True)
    for sample, other in zip(itertools.islice(apart, 20), wanted, strict=False):
        assert all(torch.equal(sample[name], other[name]) for name in ("input_ids", "labels", "position_ids"))


@pytest.mark.parametrize("world_size", [1, 2, 3])  # 3 does not divide the 4 shards: examples are dealt out instead
@pytest.mark.parametrize("seq_len", [16, 100])  # tokens are left over at most places; several rows make one sequence
def test_a_stream_continues_exactly(tokenizer: Any, stream_folder: str, world_size: int, seq_len: int) -> None:
    def opened(rank: int, state: str | None = None) -> tuple[StreamDataset, Iterator[dict[str, torch.Tensor]]]:
        dataset = StreamDataset(stream_folder, tokenizer, seq_len, rank=rank, world_size=world_size)
        if state is not None:
            dataset.load_state_dict(json.loads(state))
            assert json.dumps(dataset.state_dict()) == state
        return dataset, iter(make_loader(dataset, batch_size=2, seed=0, rank=rank, world_size=world_size))

    for rank in range(world_size):
        dataset, batches = opened(rank)
        whole, states = [], []
        while dataset.epoch < 2:
            whole.append(next(batches)["input_ids"].tolist())
            states.append(json.dumps(dataset.state_dict()))
        for place in range(0, len(whole) - 3, 3):
            _, batches = opened(rank, states[place])
            assert [next(batches)["input_ids"].tolist() for _ in range(3)] == whole[place + 1 : place + 4]
        for hop in (2, 7):  # continued again and again
            place, state = 0, states[0]
            while place + hop < len(whole):
                dataset, batches = opened(rank, state)
                wanted = whole[place + 1 : place + 1 + hop]
                assert [next(batches)["input_ids"].tolist() for _ in range(hop)] == wanted
                place, state = place + hop, json.dumps(dataset.state_dict())


def test_any_number_of_processes_reads_one_stream(tokenizer: Any, stream_folder: str) -> None:
    """Fourteen sequences, by 1, then by 3, then by 2 processes, are those that one process reads."""

    def read(world_size: int, count: int, state: dict[str, Any] | None) -> tuple[list[list[int]], dict[str, Any]]:
        parts, states = [], []
        for rank in range(world_size):
            dataset = StreamDataset(stream_folder, tokenizer, 16, rank=rank, world_size=world_size)
            if state is not None:
                dataset.load_state_dict(state)
            parts.append([item["input_ids"].tolist() for item in itertools.islice(dataset, count // world_size)])
            states.append(dataset.state_dict())
        assert all(other == states[0] for other in states)
        return [sequence for together in zip(*parts, strict=True) for sequence in together], states[0]

    whole, end = read(1, 14, None)
    found, state = [], None
    for world_size, count in ((1, 4), (3, 6), (2, 4)):
        sequences, state = read(world_size, count, state)
        found += sequences
    assert found == whole
    assert state == end


def test_stream_evaluation(tokenizer: Any, stream_folder: str) -> None:
    loader = eval_loader(StreamDataset(stream_folder, tokenizer, 16), batch_size=2, max_sequences=3)
    first = [batch["input_ids"].tolist() for batch in loader]
    assert [len(batch) for batch in first] == [2, 1]
    assert [batch["input_ids"].tolist() for batch in loader] == first


def test_blank_rows_of_a_stream_are_left_out(tokenizer: Any, tmp_path: Path) -> None:
    """As those of files: no row ends a run in its middle, or becomes an end of text of nothing."""
    folders = []
    for name, texts in (("dense", ["one two", "three"]), ("gaps", ["", "one two", None, " \n", "three", None])):
        (tmp_path / name).mkdir()
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / name / "train.jsonl").write_text(rows)
        folders.append(str(tmp_path / name))
    first = [next(iter(StreamDataset(folder, tokenizer, 8)))["input_ids"].tolist() for folder in folders]
    assert first[0] == first[1]


def test_a_short_validation_split_is_found_before_training(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "validation.jsonl").write_text(json.dumps({"text": "few"}) + "\n")
    dataset = StreamDataset(str(tmp_path / "d"), tokenizer, 64, split="validation", repeat=False)
    refuse(
        lambda: eval_loader(dataset, batch_size=1, max_sequences=2), "data.valid_split", "fewer than data.seq_len=64"
    )


def test_validation_files_are_not_trained_on(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "valid.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    corpus = load_corpus([f"{tmp_path}/*.txt"], valid_files=[f"{tmp_path}/valid.txt"])
    assert (corpus.train, corpus.valid) == (["text of a.txt", "text of b.txt"], ["text of valid.txt"])


def test_streams_refuse(tokenizer: Any, stream_folder: str, tmp_path: Path) -> None:
    def opened(name: str = stream_folder, seq_len: int = 16, **options: Any) -> StreamDataset:
        return StreamDataset(name, tokenizer, seq_len, **options)

    (tmp_path / "nothing").mkdir()
    refuse(lambda: opened(str(tmp_path / "nothing")), "data.dataset=", "nothing", "cannot be opened")
    refuse(lambda: opened(split="gone"), "data.dataset=", "split 'gone'", "cannot be opened")
    refuse(lambda: next(iter(opened(text_key="body"))), "data.text_key='body'", "data.dataset=", "['n', 'text']")
    refuse(lambda: opened(seq_len=1), "data.seq_len=1", "at least 2")
    refuse(lambda: make_loader(opened(), batch_size=1, seed=0, start=3), "start=3", "load_state_dict")
    refuse(lambda: make_loader(opened(), batch_size=1, seed=0, num_workers=1), "data.num_workers=1", "must be 0")
    refuse(lambda: make_loader(opened(), batch_size=1, seed=0, rank=1, world_size=2), "rank=1", "pass them there")
    refuse(lambda: eval_loader(opened(), batch_size=1), "max_sequences=None", "a number of sequences")


def test_workers_leave_ctrl_c_to_the_main_process() -> None:
    """A terminal sends it to all of them."""
    loader = make_loader(numbers(50), batch_size=1, seed=1, num_workers=2)
    batches = iter(loader)
    begun = [next(batches) for _ in range(2)]
    for worker in batches._workers:  # type: ignore[attr-defined]
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
    begun += [next(batches) for _ in range(20)]
    assert len(begun) == 22
