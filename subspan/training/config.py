"""The configuration of a run: one dataclass per component, values checked where they are made.

A field's docstring is its help text on the command line. A recipe is these five sections as YAML.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from subspan.checks import check_choice, check_number, check_used, check_whole
from subspan.extras import require
from subspan.optim.backward import Gradients
from subspan.optim.presets import FULL_GRADIENT, FULL_RANK, GAPS, scale_of
from subspan.optim.refresh import Moments

Baseline = Literal["lora", "relora", "factorized"]
Preset = Literal[
    "galore",
    "galore8bit",
    "qgalore",
    "paper",
    "galore_adafactor",
    "galore_lion",
    "galore_sgd",
    "fira",
    "frugal",
    "apollo",
    "apollo_mini",
    "ldadam",
    "adamw",
    "adamw8bit",
    "adafactor",
    "muon",
    "subspan",
    "sign_sgd",
    "scale_sgd",
]
RuleName = Literal["adam", "adafactor", "lion", "sgd"]
StateDtype = Literal["float32", "bfloat16", "int8", "int4"]
BasisDtype = Literal["float32", "bfloat16", "int4"]
ProjectorName = Literal["subspace_iteration", "svd", "randomized_svd", "random"]


WITHOUT_BETAS = {"galore_adafactor", "galore_sgd", "subspan", "adafactor", "muon", "sign_sgd", "scale_sgd"}
WITHOUT_EPS = {"galore_lion", "galore_sgd", "subspan", "muon", "sign_sgd", "scale_sgd"}
OF_BASES = ("projector", "basis_dtype", "moments", "moments_gate", "adaptive_refresh", "max_update_proj_gap", "align")
"""Fields of `OptimConfig` that a preset without bases has to leave as they are."""
OF_BASELINES = ("lora_alpha", "lora_dropout", "train_rest", "merge_every", "rewarm_steps")
"""Fields of `ModelConfig` that a model without a baseline has to leave as they are."""
FILLED_IN = ("scale", "update_proj_gap", "gradients")
"""Those that null leaves to the preset and the rank."""


@dataclass
class ModelConfig:
    """Which network is trained."""

    name: str = "llama-9m"
    """llama-2m, -9m, -25m, -60m, -130m, -350m, -1b, -7b, -13b, -70b, or the name or folder of any Hugging Face causal LM"""
    pretrained: bool = False
    """start from the weights of that Hugging Face model instead of random ones"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the weights and gradients"""
    int8: bool | None = None
    """keep the weights of attention and MLP in 8 bits; null: with optim.preset=qgalore. Gradients have model.dtype"""
    overrides: dict[str, Any] = field(default_factory=dict)
    """fields of the model's configuration to change, such as {hidden_size: 128}"""
    attn_implementation: str | None = None
    """attention of transformers: sdpa, eager, flash_attention_2 and so on; null: its choice for the model"""
    baseline: Baseline | None = None
    """lora: adapters beside frozen weights, relora: merged into them every so often, factorized: products of two thin weights;
    at rank optim.rank, with a preset of full rank, such as optim.preset=adamw"""
    lora_alpha: float = 32.0
    """adapters count alpha / rank times"""
    lora_dropout: float = 0.0
    """share of an adapter's input that is dropped in training"""
    train_rest: bool = True
    """with a baseline: train embeddings, norms and head too, as in pre-training"""
    merge_every: int = 1000
    """relora: steps between two merges of adapters into the weights"""
    rewarm_steps: int = 50
    """relora: steps over which the learning rate warms up again after a merge"""
    activation_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    compile: bool = False
    """torch.compile the model, block by block; the first step takes longer"""

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("model.baseline", self.baseline, (None, *get_args(Baseline)))
        check_number("model.lora_alpha", self.lora_alpha, above=0)
        check_number("model.lora_dropout", self.lora_dropout, at_least=0, below=1)
        check_whole("model.merge_every", self.merge_every, minimum=1)
        check_whole("model.rewarm_steps", self.rewarm_steps, minimum=0)
        adapters = ("model.baseline=lora or relora", "lora_alpha", "lora_dropout")
        check_used("model", self, self.baseline is not None, "model.baseline", *OF_BASELINES)
        check_used("model", self, self.baseline in ("lora", "relora"), *adapters)
        check_used("model", self, self.baseline == "relora", "model.baseline=relora", "merge_every", "rewarm_steps")
        if not self.name:
            raise ValueError("model.name is empty: use llama-9m or another name from `subspan train --help`")
        if self.pretrained and self.overrides:
            raise ValueError(
                f"model.overrides={self.overrides} would not fit pretrained weights: drop it or set model.pretrained=false"
            )


@dataclass
class DataConfig:
    """Which text is trained on. Neither files nor dataset: the source of Python's own standard library."""

    files: str | list[str] | None = None
    """path, glob or list of them: .txt and other text, .jsonl, .parquet; quote a glob so that the shell leaves it alone"""
    valid_files: str | list[str] | None = None
    """the same for validation; without it, valid_fraction of the training documents is held out"""
    dataset: str | None = None
    """name of a Hugging Face dataset to stream, instead of files"""
    dataset_config: str | None = None
    """configuration of that dataset, such as en"""
    split: str = "train"
    """split of the dataset to train on"""
    valid_split: str = "validation"
    """split of the dataset to validate on"""
    text_key: str = "text"
    """column or key that holds the text"""
    format: Literal["text", "chat"] = "text"
    """text, or chat: jsonl rows with `messages` or `prompt` and `completion`, loss on the answers only"""
    tokenizer: str | None = None
    """Hugging Face tokenizer name or folder; null: the model's own, or for a llama-* size a byte-level BPE made from the text"""
    vocab_size: int = 4096
    """pieces of the byte-level BPE that is made when there is no tokenizer"""
    seq_len: int = 256
    """tokens per sequence"""
    keep_documents_apart: bool = False
    """packed documents do not see each other"""
    document_separator: str = "<|endoftext|>"
    """text between two documents of one file"""
    valid_fraction: float = 0.01
    """share of documents held out when there are no valid_files"""
    cache_dir: str = "~/.cache/subspan"
    """folder for tokenizers and packed tokens, found again by the hash of their content"""
    num_workers: int = 0
    """processes that read ahead"""

    def __post_init__(self) -> None:
        check_whole("data.seq_len", self.seq_len, minimum=2)
        check_whole("data.vocab_size", self.vocab_size, minimum=257)
        check_whole("data.num_workers", self.num_workers, minimum=0)
        check_choice("data.format", self.format, ("text", "chat"))
        check_number("data.valid_fraction", self.valid_fraction, above=0, below=1)
        if self.dataset and (self.files or self.valid_files):
            raise ValueError(f"data.dataset={self.dataset!r} and data.files exclude each other: give one of them")
        if self.valid_files and not self.files:
            raise ValueError(f"data.valid_files={self.valid_files!r} needs data.files: add the training files")
        if self.format == "chat" and not self.files:
            raise ValueError("data.format='chat' needs data.files: give jsonl files")
        if self.format == "chat" and self.keep_documents_apart:
            raise ValueError(
                "data.keep_documents_apart=true is for packed text, and chat data is not packed: set it false"
            )
        if self.dataset and self.num_workers:
            raise ValueError(
                f"data.num_workers={self.num_workers} does not go with the stream of data.dataset: set it to 0"
            )

    @property
    def file_list(self) -> list[str] | None:
        return as_list(self.files)

    @property
    def valid_file_list(self) -> list[str] | None:
        return as_list(self.valid_files)


@dataclass
class OptimConfig:
    """How the weights are stepped."""

    preset: Preset = "galore"
    """galore: Adam in the subspace, galore8bit: its moments in 8 bits, qgalore: weights in 8 and basis in 4 bits too, paper:
    exactly the reference, galore_adafactor, galore_lion, galore_sgd; fira, frugal, apollo, apollo_mini, ldadam: the rest of the
    gradient takes part too; adamw, adamw8bit, adafactor, muon, subspan (muon in 8 bits), sign_sgd, scale_sgd: full rank"""
    lr: float = 0.01
    """peak learning rate"""
    dense_lr: float | None = None
    """peak learning rate of the parameters that are not projected; null: lr"""
    rank: int = 128
    """dimensions of the subspace, r; apollo_mini is meant for 1"""
    scale: float | None = None
    """factor on projected updates, the paper's alpha; null: the preset's, 0.25 for GaLore"""
    update_proj_gap: int | None = None
    """steps between two refreshes of the subspace, the paper's T; null: 200, 1 for ldadam"""
    adaptive_refresh: float | None = None
    """double a matrix's T when its new and old subspace overlap by more than this, 0 to 1; null: T stays"""
    max_update_proj_gap: int | None = None
    """the longest T that doubling reaches; null: 8 times update_proj_gap"""
    proj_type: Literal["std", "reverse_std", "left", "right"] = "std"
    """side of the matrix that is projected: std is the short one"""
    projector: ProjectorName | None = None
    """how the subspace is found; null: what the preset uses"""
    moments: Moments | None = None
    """of moments at a refresh: keep them, reset them, or transport them into the new subspace; null: what the preset does"""
    moments_gate: float | None = None
    """reset or transport moments only where old and new subspace overlap by more than this, 0 to 1; null: always"""
    align: bool = False
    """keep the signs of basis vectors across a refresh"""
    gradients: Gradients | None = None
    """hold: full gradients until the step, project: only their projections, update: none, the backward pass updates weights;
    null: project, or hold where the preset needs the full gradient"""
    targets: list[str] | None = None
    """patterns of parameter names to project; null: the linear layers of attention and MLP"""
    betas: list[float] | None = None
    """decay rates of Adam's or Lion's moments; null: what the preset uses"""
    eps: float | None = None
    """epsilon of Adam or Adafactor; null: what the preset uses"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    max_grad_norm: float | None = None
    """clip the gradient norm to this; null or 0: no clipping"""
    state_dtype: StateDtype | None = None
    """dtype of the moments; null: what the preset uses"""
    basis_dtype: BasisDtype | None = None
    """dtype of the bases; null: what the preset uses"""
    dense_rule: RuleName | None = None
    """rule of embeddings, head and norms; null: the preset's own"""
    dense_state_dtype: StateDtype | None = None
    """dtype of their moments; null: that of the others"""
    stochastic_rounding: bool | None = None
    """round bfloat16 weights at random, so that small updates add up; null: what the preset uses"""
    compile: bool | None = None
    """step with one compiled pass over the moments; the first step takes longer; null: for moments in 8 or 4 bits on a GPU"""

    def __post_init__(self) -> None:
        check_choice("optim.preset", self.preset, get_args(Preset))
        check_number("optim.lr", self.lr, above=0)
        check_number("optim.dense_lr", self.dense_lr, above=0, optional=True)
        check_whole("optim.rank", self.rank, minimum=1)
        self.scale = scale_of(self.preset, self.rank, 0.25) if self.scale is None else self.scale
        check_number("optim.scale", self.scale)
        if self.update_proj_gap is None:
            self.update_proj_gap = GAPS.get(self.preset, 200)
        check_whole("optim.update_proj_gap", self.update_proj_gap, minimum=1)
        check_number("optim.adaptive_refresh", self.adaptive_refresh, at_least=0, below=1, optional=True)
        check_whole("optim.max_update_proj_gap", self.max_update_proj_gap, minimum=1, optional=True)
        if self.max_update_proj_gap is not None and self.adaptive_refresh is None:
            raise ValueError(
                f"optim.max_update_proj_gap={self.max_update_proj_gap} bounds a gap that grows: set optim.adaptive_refresh, "
                "0.6 say, or drop it"
            )
        if self.max_update_proj_gap is not None and self.max_update_proj_gap < 2 * self.update_proj_gap:
            raise ValueError(
                f"optim.max_update_proj_gap={self.max_update_proj_gap} leaves no room to double "
                f"optim.update_proj_gap={self.update_proj_gap}: raise it, or drop optim.adaptive_refresh"
            )
        check_choice("optim.proj_type", self.proj_type, ("std", "reverse_std", "left", "right"))
        check_choice("optim.projector", self.projector, (None, *get_args(ProjectorName)))
        check_choice("optim.moments", self.moments, (None, *get_args(Moments)))
        check_number("optim.moments_gate", self.moments_gate, at_least=0, below=1, optional=True)
        if self.moments_gate is not None and self.moments in (None, "keep"):
            raise ValueError(
                f"optim.moments_gate={self.moments_gate} says when moments are not kept: set optim.moments=transport, or drop it"
            )
        if self.gradients is None:
            self.gradients = "hold" if self.preset in FULL_GRADIENT else "project"
        check_choice("optim.gradients", self.gradients, get_args(Gradients))
        if self.gradients == "project" and self.preset in FULL_GRADIENT:
            raise ValueError(
                f"optim.gradients=project keeps projections, and optim.preset={self.preset} needs full gradients: "
                "use optim.gradients=hold, or update"
            )
        check_number("optim.weight_decay", self.weight_decay, at_least=0)
        check_number("optim.eps", self.eps, at_least=0, optional=True)
        check_number("optim.max_grad_norm", self.max_grad_norm, at_least=0, optional=True)
        check_choice("optim.state_dtype", self.state_dtype, (None, *get_args(StateDtype)))
        check_choice("optim.basis_dtype", self.basis_dtype, (None, *get_args(BasisDtype)))
        check_choice("optim.dense_rule", self.dense_rule, (None, *get_args(RuleName)))
        check_choice("optim.dense_state_dtype", self.dense_state_dtype, (None, *get_args(StateDtype)))
        if self.gradients == "update" and self.max_grad_norm:
            raise ValueError(
                f"optim.max_grad_norm={self.max_grad_norm} needs all gradients, which optim.gradients=update never sees "
                "together: use optim.gradients=project or drop optim.max_grad_norm"
            )
        if self.betas is not None and not (len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError(f"optim.betas={self.betas} must be two numbers in [0, 1), such as [0.9, 0.999]")
        for name, value, presets in (
            ("betas", self.betas, {*get_args(Preset)} - WITHOUT_BETAS),
            ("eps", self.eps, {*get_args(Preset)} - WITHOUT_EPS),
            *((name, getattr(self, name), {*get_args(Preset)} - {*FULL_RANK}) for name in OF_BASES),
        ):
            if value not in (None, False) and self.preset not in presets:
                raise ValueError(
                    f"optim.{name}={value} has no meaning with optim.preset={self.preset}: set optim.{name} to "
                    f"{'false' if value is True else 'null'}"
                )
        if self.compile and self.dense_rule is None and self.preset in ("adafactor", "galore_adafactor"):
            raise ValueError(
                f"optim.compile=true has no effect with optim.preset={self.preset}, which sees whole matrices: drop it"
            )


@dataclass
class RunConfig:
    """How long, on what and where to."""

    out: str = "runs/subspan"
    """run folder to make; it may not hold anything yet, unless the run is resumed"""
    steps: int = 1000
    """optimizer steps"""
    warmup_steps: int = 100
    """steps of linear warm-up; cosine decay follows"""
    min_lr_ratio: float = 0.1
    """learning rate of the last step as a share of the peak"""
    batch_size: int = 16
    """sequences per optimizer step"""
    micro_batch: int | None = None
    """sequences per forward and backward pass; null: all of batch_size at once"""
    eval_every: int = 500
    """steps between evaluations; 0: at the end only"""
    eval_sequences: int | None = None
    """validation sequences to use; null: all"""
    checkpoint_every: int = 500
    """steps between two checkpoints, and one at the end; 0: only when the run is stopped by Ctrl-C or SIGTERM"""
    keep_checkpoints: int = 2
    """checkpoints to keep, the newest ones"""
    log_every: int = 10
    """steps between two lines where there is no terminal for a progress bar"""
    seed: int = 0
    """of the weights, the data order and random subspaces"""
    autocast: bool = False
    """bfloat16 arithmetic where it is safe, weights stay in model.dtype"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    export: bool = True
    """write the trained model as a Hugging Face folder"""
    threads: int | None = None
    """CPU threads; null: torch's choice"""
    profile: int = 0
    """steps to profile, after the first three: where time goes, as a table, profile.json and trace.json in the run folder"""
    diagnostics: bool = False
    """write what every refresh finds to metrics.jsonl: captured energy, angles, stable ranks, error of low-bit state;
    `subspan report` draws it"""

    def __post_init__(self) -> None:
        check_run(self)
        check_whole("run.steps", self.steps, minimum=1)
        check_whole("run.warmup_steps", self.warmup_steps, minimum=0)
        check_whole("run.eval_every", self.eval_every, minimum=0)
        check_whole("run.eval_sequences", self.eval_sequences, minimum=1, optional=True)
        check_whole("run.keep_checkpoints", self.keep_checkpoints, minimum=1)
        check_whole("run.seed", self.seed, minimum=0)
        check_whole("run.profile", self.profile, minimum=0)
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"run.warmup_steps={self.warmup_steps} is more than run.steps={self.steps}: lower run.warmup_steps"
            )


@dataclass
class ParallelConfig:
    """The processes of a run, N = shard x replicate: `torchrun --nproc-per-node N -m subspan train ...` starts them."""

    shard: int = 1
    """processes that hold a part each of weights, gradients and moments (FSDP2)"""
    replicate: int = 1
    """copies of the model, or of its parts: each trains on its own share of a batch, and gradients are averaged, low-rank ones
    where shard is 1 and the preset has them"""
    check_every: int = 0
    """steps between two comparisons of all copies by checksums, for whoever looks for a fault; 0: none"""

    def __post_init__(self) -> None:
        check_whole("parallel.shard", self.shard, minimum=1)
        check_whole("parallel.replicate", self.replicate, minimum=1)
        check_whole("parallel.check_every", self.check_every, minimum=0)
        if self.check_every and self.replicate == 1:
            raise ValueError(
                f"parallel.check_every={self.check_every} compares copies, and parallel.replicate=1 makes none: drop it"
            )

    @property
    def count(self) -> int:
        """Processes in all."""
        return self.shard * self.replicate


@dataclass
class TrainConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    resume: str | None = None
    """auto: go on from the newest good checkpoint in run.out, or start; or the folder of a checkpoint or of a run"""

    def __post_init__(self) -> None:
        self._check_parallel()
        check_sections(self.model, self.optim, self.run, passes=self.accumulation)
        if self.int8_weights and self.optim.stochastic_rounding is False:
            raise ValueError(
                "optim.stochastic_rounding=false has no effect on weights in 8 bits, always rounded so: drop it"
            )
        if self.model.baseline and self.model.int8:
            raise ValueError(f"model.int8=true and model.baseline={self.model.baseline} exclude each other: drop one")
        if self.run.diagnostics and (self.optim.gradients == "update" or self.optim.preset in FULL_RANK):
            raise ValueError(
                f"run.diagnostics=true reads gradients at refreshes, which optim.preset={self.optim.preset} with "
                f"optim.gradients={self.optim.gradients} does not have: use optim.gradients=project or hold, or drop it"
            )
        if self.data.dataset and self.run.eval_sequences is None:
            raise ValueError(
                f"run.eval_sequences is needed with the stream of data.dataset={self.data.dataset!r}: 1000, say"
            )

    def _check_parallel(self) -> None:
        count = self.parallel.count
        if count == 1:
            return
        if self.run.batch_size % (count * (self.run.micro_batch or 1)):
            raise ValueError(
                f"run.batch_size={self.run.batch_size} is no multiple of {count} processes times "
                f"run.micro_batch={self.run.micro_batch or 1} sequences: change one of them"
            )
        for name, given in (
            ("model.baseline", self.model.baseline),
            ("run.diagnostics", self.run.diagnostics),
            ("model.int8", self.int8_weights),
        ):
            if given:
                raise ValueError(
                    f"{name}={given} works on one process alone: drop it, or --parallel.shard and .replicate"
                )
        if self.parallel.shard > 1 and self.optim.preset == "ldadam":
            raise ValueError(
                f"parallel.shard={self.parallel.shard} does not go with optim.preset=ldadam, whose feedback is not sharded: use "
                "--parallel.replicate, or another preset"
            )
        if self.parallel.shard == 1 and not self.averages_low_rank and self.optim.gradients == "update":
            raise ValueError(
                "optim.gradients=update changes weights before gradients are averaged, and "
                f"optim.preset={self.optim.preset} has no low-rank ones: use optim.gradients=hold, or --parallel.shard"
            )

    @property
    def micro_batch(self) -> int:
        """Sequences of a pass on one process."""
        return self.run.micro_batch or self.run.batch_size // self.parallel.count

    @property
    def accumulation(self) -> int:
        """Passes of a step on one process."""
        return self.run.batch_size // (self.micro_batch * self.parallel.count)

    @property
    def averages_low_rank(self) -> bool:
        """Whether copies of the model average low-rank gradients instead of whole ones."""
        parallel = self.parallel
        return parallel.shard == 1 < parallel.replicate and self.optim.preset not in {*FULL_RANK, *FULL_GRADIENT}

    @property
    def int8_weights(self) -> bool:
        """Whether the weights of attention and MLP are kept in 8 bits."""
        return self.optim.preset == "qgalore" if self.model.int8 is None else self.model.int8


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "run": RunConfig,
    "parallel": ParallelConfig,
}


def save_config(config: Any, path: Path) -> None:
    """Write `config`, of a whole run, as YAML that `--config` and `load_config` read."""
    optim = as_given(config.optim)
    values = {**dataclasses.asdict(config), "optim": optim, "resume": None}  # each start decides whether to resume
    new = path.with_suffix(".new")  # a run that is killed here has the old one or the new one
    new.write_text(require("yaml", "train").safe_dump(values, sort_keys=False), encoding="utf-8")
    new.replace(path)


def as_given(optim: OptimConfig) -> dict[str, Any]:
    """The fields of `optim`; null where a value is the one that preset and rank fill in: with others it is theirs again."""
    usual = type(optim)(preset=optim.preset, rank=optim.rank)
    values = dataclasses.asdict(optim)
    return values | {name: None for name in FILLED_IN if values[name] == getattr(usual, name)}


def load_config(path: Path) -> TrainConfig:
    """Read a configuration that `save_config` wrote; ValueError if it is not one."""
    try:
        return make_config(require("yaml", "train").safe_load(path.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a configuration of subspan train: {error}") from None


def make_config(sections: dict[str, Any]) -> TrainConfig:
    """The configuration of plain values, section by section."""
    made = {name: SECTIONS[name](**values) if name in SECTIONS else values for name, values in sections.items()}
    return TrainConfig(**made)


def without_baseline(model: ModelConfig) -> ModelConfig:
    """`model` as an ordinary one."""
    return dataclasses.replace(model, baseline=None, **{name: getattr(ModelConfig, name) for name in OF_BASELINES})


def as_list(value: str | list[str] | None) -> list[str] | None:
    return [value] if isinstance(value, str) else value


def check_run(run: Any) -> None:
    """What runs of training and of fine-tuning have in common."""
    check_number("run.min_lr_ratio", run.min_lr_ratio, at_least=0, at_most=1)
    check_whole("run.batch_size", run.batch_size, minimum=1)
    check_whole("run.micro_batch", run.micro_batch, minimum=1, optional=True)
    check_whole("run.checkpoint_every", run.checkpoint_every, minimum=0)
    check_whole("run.log_every", run.log_every, minimum=1)
    check_whole("run.threads", run.threads, minimum=1, optional=True)
    if not run.out:
        raise ValueError("run.out is empty: name the run folder")
    if run.micro_batch and run.batch_size % run.micro_batch:
        raise ValueError(
            f"run.micro_batch={run.micro_batch} does not divide run.batch_size={run.batch_size}: "
            "the last micro-batch would be smaller, change one of them"
        )


def check_sections(model: Any, optim: OptimConfig, run: Any, passes: int) -> None:
    """What their sections mean to each other; passes: backward passes of a step."""
    if optim.gradients == "update" and passes != 1:
        raise ValueError(
            f"run.micro_batch={run.micro_batch} makes several backward passes of a step, and "
            "optim.gradients=update takes one: use optim.gradients=project"
        )
    if model.baseline and optim.preset not in FULL_RANK:
        raise ValueError(
            f"model.baseline={model.baseline} has thin weights of its own, which optim.preset={optim.preset} would "
            f"project: use optim.preset=adamw, or another of full rank ({', '.join(FULL_RANK[1:])})"
        )
    if model.baseline and optim.targets:
        raise ValueError(
            f"optim.targets={optim.targets} says what is projected, and model.baseline={model.baseline} is on all linear layers "
            "of attention and MLP: drop one of them"
        )
    if (
        optim.stochastic_rounding
        and model.dtype != "bfloat16"
        and not getattr(model, "int8", None)
        and optim.preset != "qgalore"
    ):
        raise ValueError(
            f"optim.stochastic_rounding=true is for weights in bfloat16, and model.dtype={model.dtype}: set it to "
            "bfloat16, or drop the rounding"
        )
    if run.autocast and model.dtype == "bfloat16":
        raise ValueError("run.autocast=true does nothing for weights of model.dtype=bfloat16: drop one of them")
