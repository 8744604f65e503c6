"""Labelled text: which columns and metrics a task has, and its rows from a folder, from files or from a dataset, as tokens."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspan.extras import require
from subspan.training.corpus import expand_files, first_line, read_rows, text_of
from subspan.training.finetune_config import Metric, TaskConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """Columns of text as the published data sets call them, metrics, the one that decides first, and the split to validate on."""

    columns: tuple[str, ...]
    metrics: tuple[Metric, ...]
    valid_split: str = "validation"


# GLUE (arXiv 1804.07461, Table 1); QQP by accuracy first, as in the tables of arXiv 2403.03507. Banking77: arXiv 2003.04807.
TASKS: dict[str, Task] = {
    "cola": Task(("sentence",), ("matthews", "accuracy")),
    "sst2": Task(("sentence",), ("accuracy",)),
    "mrpc": Task(("sentence1", "sentence2"), ("f1", "accuracy")),
    "qqp": Task(("question1", "question2"), ("accuracy", "f1")),
    "stsb": Task(("sentence1", "sentence2"), ("pearson", "spearman")),
    "mnli": Task(("premise", "hypothesis"), ("accuracy",), "validation_matched"),
    "qnli": Task(("question", "sentence"), ("accuracy",)),
    "rte": Task(("sentence1", "sentence2"), ("accuracy",)),
    "banking77": Task(("text",), ("accuracy",), "test"),
}
COLUMNS = (("sentence1", "sentence2"), ("sentence",), ("text",))
"""Where text is when neither the configuration nor the task says so."""

CORRELATIONS: tuple[Metric, ...] = ("pearson", "spearman")
"""The metrics of numbers; the others are of classes."""

VALID_NAMES = ("dev", "validation", "valid", "test")
SUFFIXES = (".jsonl", ".tsv", ".csv", ".parquet")


@dataclass(frozen=True)
class TaskData:
    """A task as tokens. `train` and `valid` are `datasets` of input_ids, attention_mask, ..., label.

    labels: number of classes; 1: a number is predicted.
    metrics: the one that decides first.
    """

    name: str
    train: Any
    valid: Any
    labels: int
    metrics: tuple[Metric, ...]
    sha256: str

    def __str__(self) -> str:
        what = "a number" if self.labels == 1 else f"{self.labels} classes"
        return f"{self.name}: {len(self.train):,} rows to train on, {len(self.valid):,} to validate on, {what}"


def load_task(data: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """The rows that `data` names, as tokens.

    Raises ValueError: no such folder, file or dataset, a column that is not there, labels that are neither classes from 0
    nor numbers, or that do not fit the metric.
    """
    name = normal(data.task_name or "")
    task = TASKS.get(name)
    parts = [_read(data, task, training) for training in (True, False)]
    numbers = any(isinstance(label, float) for _, labels in parts for label in labels)
    metrics = _metrics(data, task, numbers)
    labels = 1 if metrics[0] in CORRELATIONS else _count_classes(data, parts[0][1], parts[1][1])
    if labels > 2 and "f1" in metrics:
        raise ValueError(f"f1 is a metric of two classes, and there are {labels}: use data.metric=f1_macro")
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    limits = (data.max_train_rows, data.max_valid_rows)
    train, valid = (
        _tokens(*_part(*part, limit), tokenizer, data.max_length, labels)
        for part, limit in zip(parts, limits, strict=True)
    )
    return TaskData(data.task_name or "text", train, valid, labels, metrics, digest)


def normal(name: str) -> str:
    """SST-2, sst2 and sst_2 are one task."""
    return re.sub(r"[\W_]", "", name.lower())


def score(metric: Metric, predicted: Any, labels: Any) -> float:
    """One metric of predicted classes or numbers against the true ones, both arrays (N,). nan where it is not defined."""
    sklearn: Any = require("sklearn.metrics", "finetune")
    scipy: Any = require("scipy.stats", "finetune")
    if metric in CORRELATIONS and len(labels) < 2:
        return math.nan
    functions: dict[str, Callable[[], Any]] = {
        "accuracy": lambda: sklearn.accuracy_score(labels, predicted),
        "f1": lambda: sklearn.f1_score(labels, predicted, zero_division=0),
        "f1_macro": lambda: sklearn.f1_score(labels, predicted, average="macro", zero_division=0),
        "matthews": lambda: sklearn.matthews_corrcoef(labels, predicted),
        "pearson": lambda: scipy.pearsonr(labels, predicted).statistic,
        "spearman": lambda: scipy.spearmanr(labels, predicted).statistic,
    }
    return float(functions[metric]())


# ------------------------------------------------------------------------------------------------------- reading rows


Columns = tuple[list[list[str]], list[Any]]
"""Texts, column by column, and labels."""


def _read(data: TaskConfig, task: Task | None, training: bool) -> Columns:
    argument = "data.train_files" if training else "data.valid_files"
    rows: Iterator[tuple[str, Mapping[str, Any]]]
    if data.dataset:
        argument = "data.dataset"
        rows = _dataset_rows(data, data.train_split if training else _valid_split(data, task))
    elif data.folder:
        argument = "data.folder"
        rows = _file_rows(_task_file(Path(data.folder).expanduser(), data.task or "", training), argument)
    elif data.train_file_list and data.valid_file_list:
        files = expand_files(data.train_file_list if training else data.valid_file_list, argument)
        rows = (row for path in files for row in _file_rows(path, argument))
    else:
        raise ValueError(
            "no data: give data.folder and data.task, or data.train_files and data.valid_files, or data.dataset"
        )
    columns: Sequence[str] | None = None
    texts: list[list[str]] = []
    labels: list[int | float] = []
    for where, row in rows:
        if columns is None:
            columns = _columns(data, task, row, where)
            texts = [[] for _ in columns]
        for column, values in zip(columns, texts, strict=True):
            values.append(text_of(row, column, where, argument="data.columns"))
        labels.append(_label(row, data.label_column, where))
    if not labels:
        raise ValueError(f"{argument} has no rows to {'train' if training else 'validate'} on: give others")
    return texts, labels


def _valid_split(data: TaskConfig, task: Task | None) -> str:
    return data.valid_split or (task.valid_split if task else "validation")


def _dataset_rows(data: TaskConfig, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    datasets = require("datasets", "train")
    try:
        rows = datasets.load_dataset(data.dataset, data.dataset_config, split=split)
    except Exception as error:  # of the hub, the network, the file system, the data set's own form
        full = " ".join(filter(None, (data.dataset, data.dataset_config)))
        raise ValueError(f"data.dataset={full!r}: split {split!r} does not load: {first_line(error)}") from None
    return ((f"{data.dataset} {split} row {i}", row) for i, row in enumerate(rows, start=1))


def _task_file(folder: Path, task: str, training: bool) -> Path:
    """FOLDER/TASK/train.jsonl and the like, TASK in any spelling."""
    if not folder.is_dir():
        raise ValueError(f"data.folder={str(folder)!r} is no folder: check the path")
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and normal(path.name) == normal(task)]
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ValueError(f"data.folder={str(folder)!r} has no task {task!r}, it has {there}: check data.task")
    names = ("train",) if training else VALID_NAMES
    files = [found[0] / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    for path in files:
        if path.is_file():
            return path
    raise ValueError(
        f"{found[0]} has none of {', '.join(f'{name}.jsonl' for name in names)}, nor as .tsv or .csv: add it"
    )


def _file_rows(path: Path, argument: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.suffix not in (".tsv", ".csv"):
        yield from read_rows(path, argument)
        return
    csv.field_size_limit(2**31 - 1)  # a text may be long
    with path.open(
        encoding="utf-8-sig", newline=""
    ) as stream:  # GLUE's tsv files have single quotation marks in their text
        tsv = path.suffix == ".tsv"
        reader = csv.DictReader(
            stream, delimiter="\t" if tsv else ",", quoting=csv.QUOTE_NONE if tsv else csv.QUOTE_MINIMAL
        )
        try:
            for row in reader:
                yield f"{path}:{reader.line_num}", row
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"{argument}: {path} cannot be read after line {reader.line_num} ({error}): save it as UTF-8"
            ) from None


def _columns(data: TaskConfig, task: Task | None, row: Mapping[str, Any], where: str) -> Sequence[str]:
    tried = [data.columns] if data.columns else [*([task.columns] if task else []), *COLUMNS]
    for columns in tried:
        if all(column in row for column in columns):
            return columns
    wanted = " or ".join(" and ".join(columns) for columns in tried)
    raise ValueError(f"{where} has the columns {', '.join(map(str, row))}, not {wanted}: name them with data.columns")


def _label(row: Mapping[str, Any], column: str, where: str) -> int | float:
    if column not in row:
        there = ", ".join(map(str, row))
        raise ValueError(f"{where} has no column {column!r}, it has {there}: name it with data.label_column")
    value = row[column]
    try:
        if isinstance(value, str):  # of tsv and csv
            value = int(value) if re.fullmatch(r"[+-]?\d+", value) else float(value)
        if isinstance(value, bool) or value != value:
            raise ValueError
        return int(value) if value == int(value) else float(value)  # 1.0 of a spreadsheet is a class like 1
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{where}: label {value!r} is no number: classes are 0, 1, ..., see data.label_column"
        ) from None


def _metrics(data: TaskConfig, task: Task | None, numbers: bool) -> tuple[Metric, ...]:
    of_numbers = data.metric in CORRELATIONS if data.metric else numbers
    default: tuple[Metric, ...] = task.metrics if task else CORRELATIONS if of_numbers else ("accuracy",)
    metrics = tuple(dict.fromkeys((data.metric, *default))) if data.metric else default
    kinds = {metric in CORRELATIONS for metric in metrics}
    if len(kinds) > 1:
        raise ValueError(
            f"data.metric={data.metric} does not fit {data.task_name or 'these labels'}, measured by {' and '.join(default)}: "
            "use another task name or drop data.metric"
        )
    if numbers and not kinds.pop():
        raise ValueError(
            f"labels have fractions, and {metrics[0]} counts classes: use data.metric=pearson, or make them 0, 1, ..."
        )
    return metrics


def _count_classes(data: TaskConfig, train: Sequence[int], valid: Sequence[int]) -> int:
    found = sorted({*train})
    for labels in (found, sorted({*valid})):
        if labels[0] < 0:
            raise ValueError(
                f"label {labels[0]} in {data.label_column!r}: rows without a true label, as in GLUE's test splits, cannot be "
                "used: leave them out, or give another data.valid_files or data.valid_split"
            )
    if found != list(range(len(found))) or len(found) < 2:
        shown = ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")
        raise ValueError(
            f"labels of the training rows are {shown}: classes must be 0, 1, ... without a gap, at least two; "
            "of numbers to predict, name the metric: data.metric=pearson"
        )
    if max(valid) >= len(found):
        raise ValueError(f"label {max(valid)} is in the validation rows alone: training rows have 0 to {found[-1]}")
    return len(found)


def _part(texts: list[list[str]], labels: list[Any], limit: int | None) -> Columns:
    if limit is None or limit >= len(labels):
        return texts, labels
    chosen = sorted(random.Random(0).sample(range(len(labels)), limit))
    return [[column[i] for i in chosen] for column in texts], [labels[i] for i in chosen]


def _never_empty(encoded: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """One token for an empty text where the tokenizer adds none of its own: models cannot read nothing."""
    for i, ids in enumerate(encoded["input_ids"]):
        if not ids:
            for key, value in {"input_ids": tokenizer.pad_token_id, "attention_mask": 1, "token_type_ids": 0}.items():
                if key in encoded:
                    encoded[key][i] = [value]
    return encoded


def _tokens(
    texts: list[list[str]], labels: list[Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None, classes: int
) -> Any:
    datasets = require("datasets", "train")
    longest = min(512, tokenizer.model_max_length)
    if max_length is not None and max_length > tokenizer.model_max_length:
        raise ValueError(
            f"data.max_length={max_length} is more than the {tokenizer.model_max_length} tokens that the model takes: lower it"
        )
    names = [f"text{i}" for i in range(len(texts))]
    rows = datasets.Dataset.from_dict(
        {**dict(zip(names, texts, strict=True)), "label": [float(x) for x in labels] if classes == 1 else labels}
    )
    datasets.disable_progress_bars()
    return rows.map(
        lambda batch: _never_empty(
            tokenizer(*(batch[name] for name in names), truncation=True, max_length=max_length or longest), tokenizer
        ),
        batched=True,
        remove_columns=names,
    )
