"""The command `subspan`: train and eval. An expected error is one line, `subspan: error: ...`, and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from subspan.extras import require
from subspan.training.config import SECTIONS, DataConfig, TrainConfig, load_config, make_config

EXPECTED = (argparse.ArgumentError, ValueError, OSError, ModuleNotFoundError, FloatingPointError)

# What only training needs, or what the evaluated text itself replaces.
NOT_IN_EVAL = {"valid_files", "valid_fraction", "split", "vocab_size", "num_workers"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`, by default the process's own. Exit code 2 after an error, 130 after Ctrl-C, 143 SIGTERM."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = sys.argv[0] if Path(sys.argv[0]).name == "subspan" else "python -m subspan"
    try:
        if argv[:1] == ["train"]:
            train_command(parse_train(argv), command)
            return
        parser, eval_parser = _parsers()
        arguments = parser.parse_args(argv)
        model = arguments.eval.model
        if (config := _run_config(model)) is not None:  # what the run did is the default of every option
            eval_parser.set_defaults(_eval_defaults(config))
            arguments = parser.parse_args(argv)
        eval_command(config, arguments.eval.as_dict())
    except EXPECTED as error:
        _fail(error)
    except KeyboardInterrupt:
        print("subspan: stopped", file=sys.stderr)
        raise SystemExit(130) from None


def parse_train(argv: Sequence[str]) -> TrainConfig:
    """The configuration that the words of `subspan train ...` mean, values checked; argv[0] is "train"."""
    parser, _ = _parsers()
    sections = parser.parse_args(list(argv)).train.as_dict()
    return make_config({name: sections[name] for name in (*SECTIONS, "resume")})


def train_command(config: TrainConfig, command: str) -> None:
    """`subspan train`."""
    from subspan.training.resume import Stopped
    from subspan.training.runlog import describe_summary
    from subspan.training.trainer import train

    _no_progress_bars()
    try:
        summary = train(config)
    except Stopped as stopped:
        print(f"subspan: {stopped.message(command)}", file=sys.stderr)
        raise SystemExit(128 + stopped.signal_number) from None
    print(f"\n{describe_summary(summary, command)}")


def eval_command(config: TrainConfig | None, arguments: dict[str, Any]) -> None:
    """`subspan eval`: `config` is the run's, None where `arguments["model"]` is no run folder."""
    from subspan.training.evaluation import evaluate
    from subspan.training.models import build_model
    from subspan.training.text import check_vocabulary, load_data
    from subspan.training.trainer import find_device

    _no_progress_bars()
    run = Path(arguments["model"])
    name = str(run / "model") if config else arguments["model"]
    if config and not Path(name).is_dir():
        raise ValueError(f"{run} holds no exported model: train with --run.export true")
    before = config.data if config else DataConfig()
    data = dataclasses.replace(before, **arguments["data"])
    other_text = (data.files, data.dataset) != (before.files, before.dataset)
    if other_text and data.files:
        data = dataclasses.replace(data, valid_files=data.files)  # all of it is evaluated, nothing is held out

    device = find_device(arguments["device"])
    text = load_data(data, data.tokenizer or name, training=False)
    model = build_model(name, seq_len=data.seq_len, pretrained=True, dtype=arguments["dtype"], device=device)
    check_vocabulary(model, text.tokenizer)
    result = evaluate(
        model,
        text.valid_loader(arguments["batch_size"], arguments["sequences"]),
        paper_compatible=arguments["paper_compatible"],
        autocast=arguments["autocast"],
    )
    if config and not other_text and _trained_on(run) != text.sha256:
        print(f"subspan: warning: the text is not the one that {run} was trained and evaluated on", file=sys.stderr)
    kind = "mean of batch means over N + 1, as published" if arguments["paper_compatible"] else "nats per token"
    print(f"  model            {name}")
    print(f"  text             {text.description}{'' if other_text else ', the part held out'}")
    print(f"  tokens           {result.tokens:,}")
    print(f"  validation loss  {result.loss:.4f} ({kind})")
    print(f"  perplexity       {result.perplexity:.2f}")


def one_line(error: BaseException) -> str:
    """The message of `error` on one line; jsonargparse's says what was expected in Python's words, this in people's."""
    message = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    message = message.replace('in "<unicode string>", ', "")
    message = re.sub(r'^Parser key "([\w.]+)": ', r"--\1: ", message)
    message = re.sub(r"Expected a <class '(\w+)'>\. Got value: (.*)$", r"expected \1, got \2", message)
    message = re.sub(r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)$", r"expected one of \1, got \2", message)
    if message.startswith('expected "subcommand"'):
        message = "a command is missing: subspan train or subspan eval, see subspan --help"
    if message.startswith("unrecognized arguments") and "--" not in message:
        message += " (quote a pattern of files, or the shell makes many words of it)"
    return message


def _parsers() -> tuple[Any, Any]:
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
    evaluate.add_argument(
        "--dtype", type=str, choices=["float32", "bfloat16"], default="float32", help="of the weights"
    )
    evaluate.add_argument("--autocast", type=bool, default=False, help="bfloat16 arithmetic where it is safe")
    evaluate.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    evaluate.add_argument(
        "--paper-compatible", action="store_true", help="the published metric: mean of batch means over N + 1 batches"
    )

    parser = new(
        prog="subspan",
        exit_on_error=False,
        description="Train every parameter of a large language model in a fraction of the memory.",
    )
    commands = parser.add_subcommands()
    commands.add_subcommand("train", train, help="train a model with a recipe")
    commands.add_subcommand("eval", evaluate, help="validation loss and perplexity of a run or a model")
    return parser, evaluate


def _run_config(model: str) -> TrainConfig | None:
    path = Path(model) / "config.yaml"
    return load_config(path) if path.is_file() else None


def _eval_defaults(config: TrainConfig) -> dict[str, Any]:
    data = {f"data.{key}": value for key, value in dataclasses.asdict(config.data).items() if key not in NOT_IN_EVAL}
    return {
        **data,
        "batch_size": config.run.micro_batch or config.run.batch_size,
        "sequences": config.run.eval_sequences,
        "dtype": config.model.dtype,
        "autocast": config.run.autocast,
        "device": config.run.device,
    }


def _trained_on(run: Path) -> str | None:
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8"))["corpus"]["sha256"] if path.is_file() else None


def _no_progress_bars() -> None:
    """Loading and saving take no time that is worth a bar of transformers' own."""
    require("transformers.utils.logging", "train").disable_progress_bar()


def _fail(error: BaseException) -> NoReturn:
    print(f"subspan: error: {one_line(error)}", file=sys.stderr)
    raise SystemExit(2) from None
