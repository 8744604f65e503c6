"""The configuration of a fine-tuning: four sections, as that of a training run (`config.py`), with fields of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from subspan.checks import check_choice, check_number, check_used, check_whole
from subspan.optim.presets import GAPS, scale_of
from subspan.training.config import (
    OptimConfig,
    as_list,
    check_run,
    check_sections,
)

Metric = Literal["accuracy", "f1", "f1_macro", "matthews", "pearson", "spearman"]


@dataclass
class ClassifierConfig:
    """Which network is fine-tuned."""

    name: str = "FacebookAI/roberta-base"
    """name or folder of a Hugging Face model: an encoder or a causal LM; it gets a new head unless it has one that fits"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the weights and gradients"""
    attn_implementation: str | None = None
    """attention of transformers: sdpa, eager, flash_attention_2 and so on; null: its choice for the model"""
    baseline: Literal["lora"] | None = None
    """lora: adapters beside frozen weights, at rank optim.rank, with a full-rank preset such as adamw; the head is trained too"""
    lora_alpha: float = 16.0
    """adapters count alpha / rank times"""
    lora_dropout: float = 0.0
    """share of an adapter's input that is dropped in training"""
    train_rest: bool = False
    """with lora: train embeddings and norms too"""
    activation_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("model.baseline", self.baseline, (None, "lora"))
        check_number("model.lora_alpha", self.lora_alpha, above=0)
        check_number("model.lora_dropout", self.lora_dropout, at_least=0, below=1)
        adapters = ("model.baseline=lora", "lora_alpha", "lora_dropout", "train_rest")
        check_used("model", self, self.baseline is not None, *adapters)
        if not self.name:
            raise ValueError("model.name is empty: use FacebookAI/roberta-base or the folder of a model")


@dataclass
class TaskConfig:
    """Which labelled text: a folder of tasks, files, or a dataset."""

    task: str | None = None
    """cola, sst2, mrpc, rte, qnli, mnli, qqp, stsb, banking77, or a name of your own; null: what dataset_config says"""
    folder: str | None = None
    """folder with TASK/train.jsonl and TASK/dev.jsonl; also validation or test, .tsv or .csv"""
    train_files: str | list[str] | None = None
    """path, glob or list of them, instead of a folder: .jsonl, .parquet, or .tsv and .csv with a line of names"""
    valid_files: str | list[str] | None = None
    """the same for validation"""
    dataset: str | None = None
    """name of a Hugging Face dataset, instead of files, such as nyu-mll/glue"""
    dataset_config: str | None = None
    """configuration of that dataset, such as mrpc"""
    train_split: str = "train"
    """split of the dataset to train on"""
    valid_split: str | None = None
    """split of the dataset to validate on; null: validation, or validation_matched for mnli"""
    columns: list[str] | None = None
    """names of the one or two columns of text; null: the task's, or sentence, sentence1 and sentence2, text"""
    label_column: str = "label"
    """column of the label: a class from 0, or a number to predict"""
    metric: Metric | None = None
    """what decides which epoch is best; null: the task's, or accuracy for classes and pearson for numbers"""
    max_length: int | None = None
    """tokens at which a text is cut; null: as many as the model takes, at most 512"""
    max_train_rows: int | None = None
    """train on a fixed random part of so many rows, the same for every seed and method; null: all"""
    max_valid_rows: int | None = None
    """the same for validation"""

    def __post_init__(self) -> None:
        check_choice("data.metric", self.metric, (None, *get_args(Metric)))
        check_whole("data.max_length", self.max_length, minimum=2, optional=True)
        check_whole("data.max_train_rows", self.max_train_rows, minimum=1, optional=True)
        check_whole("data.max_valid_rows", self.max_valid_rows, minimum=1, optional=True)
        if self.columns is not None and len(self.columns) not in (1, 2):
            raise ValueError(f"data.columns={self.columns} must name one or two columns, as in [question, sentence]")
        check_used("data", self, bool(self.dataset), "data.dataset", "train_split", "valid_split")
        given = {"data.folder": self.folder, "data.train_files": self.train_files, "data.dataset": self.dataset}
        named = [name for name, value in given.items() if value]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} exclude each other: give one of them")
        if self.folder and not self.task:
            raise ValueError(f"data.folder={self.folder!r} needs data.task: name the task, the name of a folder in it")
        if bool(self.train_files) != bool(self.valid_files):
            raise ValueError(
                f"data.train_files={self.train_files!r} and data.valid_files={self.valid_files!r} need each other: give both"
            )

    @property
    def task_name(self) -> str | None:
        return self.task or self.dataset_config

    @property
    def train_file_list(self) -> list[str] | None:
        return as_list(self.train_files)

    @property
    def valid_file_list(self) -> list[str] | None:
        return as_list(self.valid_files)


@dataclass
class FinetuneOptimConfig(OptimConfig):
    """How the weights are stepped: as in training, with defaults for fine-tuning."""

    lr: float = 2e-5
    """peak learning rate"""
    head_lr: float | None = None
    """peak learning rate of the head; null: dense_lr. A new head of many classes wants much more than pretrained weights"""
    rank: int = 8
    """dimensions of the subspace, or of adapters, r"""
    scale: float | None = None
    """factor on projected updates, the paper's alpha; null: 16 / rank, which is the paper's 4 at rank 4 and 2 at rank 8; for
    frugal, apollo, apollo_mini and ldadam their own"""
    update_proj_gap: int | None = None
    """steps between two refreshes of the subspace, the paper's T; null: 500, 1 for ldadam"""

    def __post_init__(self) -> None:
        check_whole("optim.rank", self.rank, minimum=1)
        check_number("optim.head_lr", self.head_lr, above=0, optional=True)
        if self.scale is None:  # arXiv 2403.03507, Table 7
            self.scale = scale_of(self.preset, self.rank, 16 / self.rank)
        if self.update_proj_gap is None:
            self.update_proj_gap = GAPS.get(self.preset, 500)
        super().__post_init__()


@dataclass
class FinetuneRunConfig:
    """How long, how often and where to."""

    out: str = "runs/finetune"
    """run folder to make; it may not hold anything yet, unless the run is resumed"""
    epochs: int = 3
    """passes over the training rows, an evaluation after each"""
    seeds: list[int] = field(default_factory=lambda: [0])
    """a run for each: of the new head, the order of rows, dropout and random subspaces"""
    batch_size: int = 16
    """rows per optimizer step"""
    micro_batch: int | None = None
    """rows per forward and backward pass; null: all of batch_size at once"""
    decay: Literal["linear", "cosine"] = "linear"
    """of the learning rate, after the warm-up"""
    warmup_ratio: float = 0.0
    """share of the steps with linear warm-up"""
    min_lr_ratio: float = 0.0
    """learning rate of the last step as a share of the peak"""
    checkpoint_every: int = 1
    """epochs between two checkpoints; 0: none, what is resumed begins with the seed that was stopped"""
    log_every: int = 50
    """steps between two lines where there is no terminal for a progress bar"""
    autocast: bool = False
    """bfloat16 arithmetic where it is safe, weights stay in model.dtype"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    export: bool = False
    """write the last model of each seed as a Hugging Face folder"""
    threads: int | None = None
    """CPU threads; null: torch's choice"""

    def __post_init__(self) -> None:
        check_run(self)
        check_whole("run.epochs", self.epochs, minimum=1)
        check_choice("run.decay", self.decay, ("linear", "cosine"))
        check_number("run.warmup_ratio", self.warmup_ratio, at_least=0, at_most=1)
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"run.seeds={self.seeds} must be different whole numbers, as in [1, 2, 3]")
        for seed in self.seeds:
            check_whole("run.seeds", seed, minimum=0)


@dataclass
class FinetuneConfig:
    """A whole fine-tuning: one model, one task, some seeds."""

    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: TaskConfig = field(default_factory=TaskConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    run: FinetuneRunConfig = field(default_factory=FinetuneRunConfig)
    resume: Literal["auto"] | None = None
    """auto: go on where the run in run.out was stopped, or start"""

    def __post_init__(self) -> None:
        check_choice("resume", self.resume, (None, "auto"))
        check_sections(
            self.model, self.optim, self.run, self.run.batch_size // (self.run.micro_batch or self.run.batch_size)
        )


FINETUNE_SECTIONS: dict[str, Any] = {
    "model": ClassifierConfig,
    "data": TaskConfig,
    "optim": FinetuneOptimConfig,
    "run": FinetuneRunConfig,
}
