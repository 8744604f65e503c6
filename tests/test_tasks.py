"""Labelled text: where rows come from, which labels and metrics fit together, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny import SIZES, write_classifier, write_rows, write_tokenizer

from subspan.training.classifier import load_tokenizer
from subspan.training.finetune_config import TaskConfig
from subspan.training.tasks import TASKS, TaskData, load_task, score

pytest.importorskip("sklearn")
np = pytest.importorskip("numpy")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_classifier(tmp_path_factory.mktemp("model")))


def test_a_table_that_excel_wrote(tokenizer: Any, tmp_path: Path) -> None:
    """It begins with a byte order mark."""
    files = []
    for name in ("train.csv", "valid.csv"):
        files.append(write_rows(tmp_path / name, ROWS))
        Path(files[-1]).write_text("\ufeff" + Path(files[-1]).read_text())
    data = load_task(TaskConfig(train_files=files[0], valid_files=files[1]), tokenizer)
    assert len(data.train) == len(ROWS)


def test_a_table_that_is_not_utf_8_is_named(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_bytes("sentence,label\ncaf\xe9,1\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"data\.train_files.*train\.csv cannot be read after line .*: save it as UTF-8"
    ):
        load_task(TaskConfig(train_files=str(file), valid_files=str(file)), tokenizer)


def test_texts_end_where_positions_do(tmp_path: Path) -> None:
    """RoBERTa numbers tokens from its pad id + 1 on, so that 64 positions hold 62 tokens."""
    transformers = pytest.importorskip("transformers")
    size = {**SIZES, "vocab_size": len(write_tokenizer(tmp_path)), "max_position_embeddings": 64, "pad_token_id": 1}
    for kind, longest in (("bert", 64), ("roberta", 62)):
        transformers.AutoConfig.for_model(kind, **size).save_pretrained(tmp_path)
        assert load_tokenizer(str(tmp_path)).model_max_length == longest


def test_positions_without_an_end(tmp_path: Path) -> None:
    """XLNet's configuration says -1."""
    transformers = pytest.importorskip("transformers")
    vocab_size = len(write_tokenizer(tmp_path))
    transformers.XLNetConfig(vocab_size=vocab_size, d_model=32, n_layer=1, n_head=2, d_inner=32).save_pretrained(
        tmp_path
    )
    assert load_tokenizer(str(tmp_path)).model_max_length > 10**6


def test_an_empty_text_has_a_token(tokenizer: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "train.csv", [*ROWS, {"sentence": "", "label": 1}])
    data = load_task(TaskConfig(train_files=file, valid_files=file), tokenizer)
    assert min(len(ids) for ids in data.train["input_ids"]) >= 1


def test_a_table_with_a_long_text(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*ROWS, {"sentence": "dog " * 50_000, "label": 0}]
    file = write_rows(tmp_path / "train.csv", rows)
    assert len(load_task(TaskConfig(train_files=file, valid_files=file), tokenizer).train) == 3


def plain(data: TaskData) -> list[Any]:
    return [part.to_dict() for part in (data.train, data.valid)]


ROWS = [{"sentence": "the red dog", "label": 1}, {"sentence": 'a " cat', "label": 0}]
PAIRS = [{"sentence1": "the dog", "sentence2": "a cat", "label": i % 3 / 2} for i in range(6)]


# ---------------------------------------------------------------------------------------------------------- metrics


def test_metrics_are_their_formulas() -> None:
    predicted, labels = (
        np.array([1, 1, 1, 0, 0, 1]),
        np.array([1, 1, 0, 0, 1, 0]),
    )  # 2 hits, 2 false alarms, 1 miss, 1 right no
    assert score("accuracy", predicted, labels) == pytest.approx(3 / 6)
    assert score("f1", predicted, labels) == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))
    assert score("f1_macro", predicted, labels) == pytest.approx((4 / 7 + 2 / 5) / 2)
    assert score("matthews", predicted, labels) == pytest.approx((2 * 1 - 2 * 1) / math.sqrt(4 * 3 * 3 * 2))
    x, y = np.array([1.0, 2.0, 3.0, 9.0]), np.array([1.0, 3.0, 2.0, 4.0])
    assert score("pearson", x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert score("spearman", x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_the_tasks_of_the_paper_have_its_metrics() -> None:
    decides = {name: task.metrics[0] for name, task in TASKS.items()}
    assert decides.pop("cola") == "matthews"
    assert decides.pop("stsb") == "pearson"
    assert decides.pop("mrpc") == "f1"
    assert set(decides) == {"sst2", "qqp", "mnli", "qnli", "rte", "banking77"}
    assert set(decides.values()) == {"accuracy"}


# ------------------------------------------------------------------------------------------------------------- rows


def test_every_form_gives_the_same_rows(tmp_path: Path, tokenizer: Any) -> None:
    """A folder in any spelling of the task, jsonl, tsv with a quotation mark, csv, columns of other names, a dataset."""
    seen = []
    for suffix in ("jsonl", "tsv", "csv"):
        folder = tmp_path / suffix / "SST-2"
        write_rows(folder / f"train.{suffix}", ROWS)
        write_rows(folder / f"dev.{suffix}", ROWS)
        seen.append(load_task(TaskConfig(task="sst2", folder=str(folder.parent)), tokenizer))
    renamed = [{"words": row["sentence"], "class": row["label"]} for row in ROWS]
    file = write_rows(tmp_path / "renamed.jsonl", renamed)
    seen.append(
        load_task(TaskConfig(train_files=file, valid_files=file, columns=["words"], label_column="class"), tokenizer)
    )
    for split in ("train", "validation"):
        write_rows(tmp_path / "dataset" / f"{split}.jsonl", ROWS)
    seen.append(load_task(TaskConfig(task="sst2", dataset=str(tmp_path / "dataset")), tokenizer))
    for data in seen:
        assert plain(data) == plain(seen[0])
        assert (data.labels, data.metrics) == (2, ("accuracy",))
    assert len({data.sha256 for data in seen}) == 1
    assert tokenizer.decode(seen[0].train[1]["input_ids"]) == '[CLS] a " cat [SEP]'


def test_pairs_numbers_and_metrics(tmp_path: Path, tokenizer: Any) -> None:
    file = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    data = load_task(TaskConfig(train_files=file, valid_files=file), tokenizer)
    assert (data.labels, data.metrics) == (1, ("pearson", "spearman"))
    assert data.train["label"][:3] == [0.0, 0.5, 1.0]
    assert tokenizer.decode(data.train[0]["input_ids"]) == "[CLS] the dog [SEP] a cat [SEP]"
    whole = write_rows(tmp_path / "whole.jsonl", [{**row, "label": i} for i, row in enumerate(PAIRS)])
    classes = load_task(TaskConfig(train_files=whole, valid_files=whole), tokenizer)
    assert (classes.labels, classes.metrics) == (6, ("accuracy",))
    points = write_rows(tmp_path / "points.jsonl", [{**row, "label": float(i)} for i, row in enumerate(PAIRS)])
    assert load_task(TaskConfig(train_files=points, valid_files=points), tokenizer).labels == 6
    ratings = load_task(TaskConfig(train_files=whole, valid_files=whole, metric="spearman"), tokenizer)
    assert (ratings.labels, ratings.metrics) == (1, ("spearman", "pearson"))
    assert (
        load_task(TaskConfig(train_files=whole, valid_files=whole, metric="f1_macro"), tokenizer).metrics[0]
        == "f1_macro"
    )


def test_limits_take_a_fixed_part_and_keep_all_classes(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"sentence": f"dog {'red ' * (i % 7)}", "label": i % 5} for i in range(50)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    config = {"train_files": file, "valid_files": file, "max_length": 5}
    whole, part, again = (
        load_task(TaskConfig(**config, max_train_rows=limit, max_valid_rows=3), tokenizer) for limit in (None, 4, 4)
    )
    assert [len(data.train) for data in (whole, part, again)] == [50, 4, 4]
    assert part.labels == whole.labels == 5
    assert plain(part) == plain(again)
    assert max(map(len, whole.train["input_ids"])) == 5


@pytest.mark.parametrize(
    ("config", "rows", "named"),
    [
        (
            {},
            [{"text1": "a", "label": 0}],
            "has the columns text1, label, not sentence1 and sentence2 or sentence or text",
        ),
        ({"columns": ["words"]}, ROWS, "not words: name them with data.columns"),
        ({"label_column": "gold"}, ROWS, "no column 'gold', it has sentence, label"),
        ({}, [{"sentence": None, "label": 0}], "rows.jsonl:1 holds no text"),
        ({}, [{"sentence": "a", "label": "yes"}], "label 'yes' is no number"),
        ({}, [{"sentence": "a", "label": "inf"}], "label inf is no number"),
        ({}, [{"sentence": "a", "label": i} for i in (0, 1, -1)], "label -1 in 'label': rows without a true label"),
        (
            {},
            [{"sentence": "a", "label": i} for i in (1, 2)],
            "labels of the training rows are 1, 2: classes must be 0, 1",
        ),
        ({}, [{"sentence": "a", "label": 0}], "at least two"),
        ({"metric": "accuracy"}, PAIRS, "labels have fractions, and accuracy counts classes"),
        ({"task": "cola"}, PAIRS, "labels have fractions, and matthews counts classes"),
        ({"task": "cola", "metric": "pearson"}, ROWS, "data.metric=pearson does not fit cola, measured by matthews"),
        ({"metric": "f1"}, [{"sentence": "a", "label": i} for i in range(3)], "f1 is a metric of two classes"),
        ({"max_length": 1000}, ROWS, "data.max_length=1000 is more than the 64 tokens"),
        ({}, [], "rows.jsonl is empty"),
    ],
)
def test_what_rows_are_refused(tmp_path: Path, tokenizer: Any, config: dict, rows: list[dict], named: str) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError) as refused:
        load_task(TaskConfig(train_files=file, valid_files=file, **config), tokenizer)
    assert named in str(refused.value)


def test_what_places_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    def refuse(named: str, **config: Any) -> None:
        with pytest.raises(ValueError) as refused:
            load_task(TaskConfig(**config), tokenizer)
        assert named in str(refused.value)

    write_rows(tmp_path / "tasks" / "CoLA" / "dev.jsonl", ROWS)
    folder = str(tmp_path / "tasks")
    refuse("no data: give data.folder and data.task")
    refuse("is no folder", folder=f"{folder}/none", task="cola")
    refuse("has no task 'rte', it has CoLA", folder=folder, task="rte")
    refuse("none of train.jsonl", folder=folder, task="cola")
    refuse("data.folder and data.dataset exclude each other", folder=folder, dataset="glue", task="cola")
    refuse("needs data.task", folder=folder)
    refuse("need each other", train_files="a.jsonl")
    refuse("data.train_files='nothing.jsonl' matches no file", train_files="nothing.jsonl", valid_files="nothing.jsonl")
    refuse("does not load", dataset=f"{folder}/nothing", task="cola")
    file = write_rows(tmp_path / "train.jsonl", ROWS)
    other = write_rows(tmp_path / "valid.jsonl", [{"sentence": "a", "label": 2}])
    refuse("label 2 is in the validation rows alone", train_files=file, valid_files=other)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(ROWS[0]) + "\n{")
    refuse("broken.jsonl:2 is not JSON", train_files=str(broken), valid_files=file)
