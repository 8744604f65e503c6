"""The options of the command `subspan`, and the configurations that its words mean."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from subspan import __version__
from subspan.checks import check_whole
from subspan.extras import require
from subspan.training.config import (
    FILLED_IN,
    SECTIONS,
    DataConfig,
    ModelConfig,
    Preset,
    ProjectorName,
    RunConfig,
    TrainConfig,
    as_given,
    make_config,
)
from subspan.training.finetune_config import FINETUNE_SECTIONS, FinetuneConfig

# A parser's defaults come from a configuration that is filled in already.
NOT_FILLED_IN = {f"optim.{name}": None for name in FILLED_IN}

# What only training needs, or what the evaluated text itself replaces.
NOT_IN_EVAL = {"valid_files", "valid_fraction", "split", "vocab_size", "num_workers"}


# Option of `subspan plan` -> the field of a configuration that it is, and what a search for a budget chooses if it is not given.
PLAN_FIELDS = {
    "model": ("model", "name"),
    "dtype": ("model", "dtype"),
    "activation_checkpointing": ("model", "activation_checkpointing"),
    "seq_len": ("data", "seq_len"),
    "preset": ("optim", "preset"),
    "rank": ("optim", "rank"),
    "proj_type": ("optim", "proj_type"),
    "projector": ("optim", "projector"),
    "gradients": ("optim", "gradients"),
    "state_dtype": ("optim", "state_dtype"),
    "basis_dtype": ("optim", "basis_dtype"),
}
PLAN_AXES = {
    "preset": "presets",
    "rank": "ranks",
    "proj_type": "proj_types",
    "gradients": "gradients",
    "micro_batch": "micro_batches",
    "activation_checkpointing": "checkpointing",
}


def parse_train(argv: Sequence[str]) -> TrainConfig:
    """The configuration that the words of `subspan train ...` mean, values checked; argv[0] is "train"."""
    parser, _ = parsers()
    sections = parser.parse_args(list(argv)).train.as_dict()
    return make_config({name: sections[name] for name in (*SECTIONS, "resume")})


def parse_finetune(argv: Sequence[str]) -> FinetuneConfig:
    """The configuration that the words of `subspan finetune ...` mean, values checked; argv[0] is "finetune"."""
    parser, _ = parsers()
    sections = parser.parse_args(list(argv)).finetune.as_dict()
    made = {name: section(**sections[name]) for name, section in FINETUNE_SECTIONS.items()}
    return FinetuneConfig(**made, resume=sections["resume"])


def eval_defaults(config: TrainConfig) -> dict[str, Any]:
    data = {f"data.{key}": value for key, value in dataclasses.asdict(config.data).items() if key not in NOT_IN_EVAL}
    return {
        **data,
        "batch_size": config.run.micro_batch or config.run.batch_size,
        "sequences": config.run.eval_sequences,
        "dtype": config.model.dtype,
        "autocast": config.run.autocast,
        "device": config.run.device,
    }


def plan_config(arguments: Any) -> tuple[TrainConfig, int | None]:
    """The configuration that the words of `subspan plan ...` mean, and the vocabulary of a model that has none of its own.

    Without a recipe: bfloat16, one sequence, and a rank of a quarter of the hidden size, as most of the paper's.
    """
    from subspan.cluster import layout
    from subspan.plan import with_preset
    from subspan.training.models import LLAMA, model_config
    from subspan.training.text import vocabulary

    if arguments.config:
        config = parse_train(["train", "--config", arguments.config])
    elif arguments.model or arguments.budget:
        name = arguments.model or next(iter(LLAMA))  # that of a search for the largest
        data = DataConfig(vocab_size=32000) if name in LLAMA else DataConfig()  # as the paper's recipes
        config = TrainConfig(ModelConfig(name=name, dtype="bfloat16"), data, run=RunConfig(batch_size=1))
        if arguments.rank is None:
            config.optim.rank = max(1, model_config(name).get_text_config().hidden_size // 4)
    else:
        raise ValueError(
            "--model is missing: name a model, as in subspan plan --model llama-7b, or give a --config, or a --budget for which "
            "to find the largest model"
        )
    optim = config.optim if arguments.preset is None else with_preset(config.optim, arguments.preset)
    sections: dict[str, Any] = {name: dataclasses.asdict(getattr(config, name)) for name in SECTIONS}
    sections |= {"optim": as_given(optim), "run": sections["run"] | {"diagnostics": False}}
    for name, (section, field) in PLAN_FIELDS.items():
        if arguments[name] is not None:
            sections[section][field] = arguments[name]
    parallel = config.parallel
    nodes, gpus_per_node, shard = arguments.nodes, arguments.gpus_per_node, arguments.shard
    if (nodes, gpus_per_node, shard) != (None, None, None):
        gpus_per_node = next(number for number in (gpus_per_node, shard, 1) if number is not None)
        parallel = layout(1 if nodes is None else nodes, gpus_per_node, shard)
    micro_batch, accumulation = (
        getattr(config, name) if arguments[name] is None else arguments[name]
        for name in ("micro_batch", "accumulation")
    )
    if update := arguments.gradients == "update":  # of a recipe that clips and accumulates: it can do neither
        sections["optim"]["max_grad_norm"] = None
        accumulation = arguments.accumulation or 1
    check_whole("accumulation", accumulation, minimum=1)
    check_whole("micro_batch", micro_batch, minimum=1)
    check_whole("vocab_size", arguments.vocab_size, minimum=1, optional=True)
    sections["parallel"] = dataclasses.asdict(parallel)
    if not arguments.config or update or (arguments.micro_batch, arguments.accumulation) != (None, None):
        sections["run"] |= {"micro_batch": micro_batch, "batch_size": micro_batch * accumulation * parallel.count}
    if arguments.vocab_size is not None:
        if config.model.name not in LLAMA:
            raise ValueError(f"vocab_size={arguments.vocab_size}: {config.model.name} has its own, leave it out")
        sections["data"]["vocab_size"] = arguments.vocab_size
        sections["model"]["overrides"].pop("vocab_size", None)
    config = make_config(sections)
    return config, arguments.vocab_size or vocabulary(config)


def one_line(error: BaseException) -> str:
    """The message of `error` on one line; jsonargparse's says what was expected in Python's words, this in people's."""
    message = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    message = message.replace('in "<unicode string>", ', "")
    message = re.sub(r'^Parser key "([\w.]+)": ', r"--\1: ", message)
    message = re.sub(r"Expected a <class '(\w+)'>\. Got value: (.*)$", r"expected \1, got \2", message)
    message = re.sub(r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)$", r"expected one of \1, got \2", message)
    message = re.sub(r"^Subcommand '(\w+)' does not accept option '([\w.]+)'.*", _unknown_option, message)
    if message.startswith('expected "subcommand"'):
        message = (
            "a command is missing: subspan train or subspan eval, finetune, plan, report or doctor, see subspan --help"
        )
    if message.startswith("unrecognized arguments") and "--" not in message:
        message += " (quote a pattern of files, or the shell makes many words of it)"
    return message


def _unknown_option(found: re.Match[str]) -> str:
    command, name = found[1], found[2]
    known = {
        kind: [
            f"{section}.{field.name}" for section, made_by in sections.items() for field in dataclasses.fields(made_by)
        ]
        for kind, sections in (("train", SECTIONS), ("finetune", FINETUNE_SECTIONS))
    }
    near = difflib.get_close_matches(name, known.get(command, []), 1)
    other = [kind for kind, names in known.items() if name in names]
    hint = f", subspan {other[0]} has it" if other else f", {near[0]} is near" if near else ""
    return f"{name} is no option of subspan {command}{hint}: see subspan {command} --help"


def parsers() -> tuple[Any, Any]:
    """The parser of the command, and that of its eval."""
    jsonargparse = require("jsonargparse", "train")
    for module in ("yaml", "docstring_parser"):  # without them recipes are taken for JSON and options have no help
        require(module, "train")
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    new = jsonargparse.ArgumentParser

    train = new(
        exit_on_error=False,
        usage="subspan train [--config RECIPE.yaml] [--resume auto|FOLDER] [--SECTION.NAME VALUE ...]",
        description="Train a causal language model. Options on the command line win over the recipe. "
        "For example: subspan train --config recipes/cpu_9m.yaml --optim.rank 64 --run.out runs/rank64",
    )
    train.add_argument("--config", action="config", help="recipe to start from")
    train.add_class_arguments(TrainConfig)
    train.set_defaults(NOT_FILLED_IN)

    finetune = new(
        exit_on_error=False,
        usage="subspan finetune [--config RECIPE.yaml] [--resume auto] [--SECTION.NAME VALUE ...]",
        description="Fine-tune a pretrained model for sequence classification or regression, with several seeds. For example: "
        "subspan finetune --model.name FacebookAI/roberta-base --data.folder glue --data.task mrpc --run.seeds '[1, 2, 3]'",
    )
    finetune.add_argument("--config", action="config", help="recipe to start from")
    finetune.add_class_arguments(FinetuneConfig)
    finetune.set_defaults(NOT_FILLED_IN)

    evaluate = new(
        exit_on_error=False,
        usage="subspan eval RUN_OR_MODEL [--data.files FILES] [--paper-compatible] [options]",
        description="Validation loss and perplexity of a run folder, on the run's own validation text unless --data says "
        "otherwise, or of any Hugging Face causal LM. Every token weighs the same. A run folder's settings are the defaults.",
    )
    evaluate.add_argument("model", type=str, help="run folder, or name or folder of a Hugging Face model")
    evaluate.add_class_arguments(DataConfig, "data", skip=NOT_IN_EVAL)
    evaluate.add_argument("--batch_size", type=int, default=8, help="sequences at a time")
    evaluate.add_argument("--sequences", type=int | None, default=None, help="sequences to use; null: all")
    evaluate.add_argument("--dtype", type=Literal["float32", "bfloat16"], default="float32", help="of the weights")
    evaluate.add_argument("--autocast", type=bool, default=False, help="bfloat16 arithmetic where it is safe")
    evaluate.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    evaluate.add_argument(
        "--paper-compatible", action="store_true", help="the published metric: mean of batch means over N + 1 batches"
    )

    plan = new(
        exit_on_error=False,
        usage="subspan plan --model NAME [--preset PRESET] [--rank R] [--micro-batch N] [--seq-len N] [--budget 24GiB] [options]",
        description="Memory of a training run before any weight exists: weights, gradients, optimizer, activations, temporaries "
        "and peak. With --budget: which settings fit, best first; what is not given here is searched for. "
        "With --nodes and --gpus-per-node: of one of several processes, and what it sends to the others in a step. "
        "For example: subspan plan --model llama-7b --preset galore8bit --rank 1024 --micro-batch 1 --seq-len 256",
    )
    plan.add_argument(
        "--model", type=str | None, help="llama-7b and the like, or name or folder of a Hugging Face model"
    )
    plan.add_argument("--config", type=str | None, help="recipe to start from; options here win over it")
    option = functools.partial(_plan_option, plan)
    option("preset", str | None, f"{', '.join(get_args(Preset))}; galore without a recipe")
    option("rank", int | None, "dimensions of the subspace; a quarter of the hidden size without a recipe")
    option("proj_type", str | None, "side of the basis: std (the short one), reverse_std, left, right")
    option(
        "projector",
        str | None,
        f"how the subspace is found: {', '.join(get_args(ProjectorName))}; null: as the preset does",
    )
    option("gradients", str | None, "hold, project (where the preset can) or update")
    option("state_dtype", str | None, "of the moments: float32, bfloat16, int8, int4")
    option("basis_dtype", str | None, "of the bases: float32, bfloat16, int4")
    option("dtype", str | None, "of weights and gradients: bfloat16 (without a recipe) or float32")
    option("micro_batch", int | None, "sequences per forward and backward pass; 1 without a recipe")
    option("accumulation", int | None, "forward and backward passes per step")
    option("seq_len", int | None, "tokens per sequence; 256 without a recipe")
    option("vocab_size", int | None, "rows of the embedding of a llama-* size; 32,000 without a recipe")
    option("activation_checkpointing", bool | None, "true: recompute activations in the backward pass")
    option("nodes", int | None, "machines; the plan is of one process on one GPU")
    option("gpus_per_node", int | None, "processes on each of them")
    option("shard", int | None, "parts of the model (FSDP2); without it all GPUs get one, 1: each has a whole copy")
    option("budget", str | None, "search for what fits into this, as 24GiB or 24GB; without a model: for the largest")
    option(
        "figure", str | None, "draw this run with AdamW, 8-bit Adam, LoRA and the GaLores: a .png, .svg or .pdf file"
    )
    option("html", str | None, "the same as a page: an .html file, which works offline")
    plan.add_argument("--json", action="store_true", help="print JSON, in bytes")

    report = new(
        exit_on_error=False,
        usage="subspan report RUN [RUN ...] [--out PAGE.html] [--figure FILE]",
        description="One HTML page of one or more run folders, which works offline: loss and perplexity, learning rate, gradient "
        "norm, memory, what refreshes found (of runs with --run.diagnostics true), settings and how to repeat them. "
        "For example: subspan report runs/galore runs/adamw --out compared.html",
    )
    report.add_argument("runs", type=str, nargs="+", help="run folders, of subspan train or finetune")
    report.add_argument("--out", type=str | None, help="the page; RUN/report.html for one run, else report.html")
    report.add_argument(
        "--figure", type=str | None, help="draw what the refreshes of one run found instead: a .png, .svg or .pdf file"
    )

    parser = new(
        prog="subspan",
        exit_on_error=False,
        version=__version__,
        description="Train every parameter of a large language model in a fraction of the memory.",
    )
    commands = parser.add_subcommands()
    commands.add_subcommand("train", train, help="train a model with a recipe")
    commands.add_subcommand("finetune", finetune, help="fine-tune a classifier, with several seeds")
    commands.add_subcommand("eval", evaluate, help="validation loss and perplexity of a run or a model")
    commands.add_subcommand("plan", plan, help="memory of a run, before it is started")
    commands.add_subcommand("report", report, help="a page of one or more runs")
    commands.add_subcommand("doctor", new(), help="what this machine has, and what will be slow on it and why")
    return parser, evaluate


def _plan_option(parser: Any, name: str, kind: Any, text: str) -> None:
    """An option with dashes, and with underscores as everywhere else."""
    dashed = f"--{name.replace('_', '-')}"
    parser.add_argument(*dict.fromkeys((dashed, f"--{name}")), type=kind, help=text)
