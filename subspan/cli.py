"""The command `subspan`: train, finetune, eval, plan, report, doctor. An error is one line, `subspan: error: ...`, code 2."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from subspan import __version__, doctor
from subspan.extras import require
from subspan.options import PLAN_AXES, eval_defaults, one_line, parse_finetune, parse_train, parsers, plan_config
from subspan.training.config import DataConfig, TrainConfig, load_config
from subspan.training.finetune_config import FinetuneConfig

if TYPE_CHECKING:
    from subspan.training.resume import Stopped

EXPECTED = (argparse.ArgumentError, ValueError, OSError, ModuleNotFoundError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`, by default the process's own. Exit code 2 after an error, 130 after Ctrl-C, 143 SIGTERM."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = sys.argv[0] if Path(sys.argv[0]).name == "subspan" else "python -m subspan"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        command = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} -m subspan"
    if argv[:1] == ["--version"]:
        print(f"subspan {__version__}")
        return
    if argv[:1] == ["doctor"]:  # before all that needs an extra: it tells which are missing
        doctor.main(argv[1:])
        return
    try:
        if argv[:1] == ["train"]:
            train_command(parse_train(argv), command)
            return
        if argv[:1] == ["finetune"]:
            finetune_command(parse_finetune(argv), command)
            return
        parser, eval_parser = parsers()
        arguments = parser.parse_args(argv)
        if arguments.subcommand == "plan":
            plan_command(arguments.plan)
            return
        if arguments.subcommand == "report":
            report_command(arguments.report.runs, arguments.report.out, arguments.report.figure)
            return
        model = arguments.eval.model
        if (config := _run_config(model)) is not None:  # what the run did is the default of every option
            eval_parser.set_defaults(eval_defaults(config))
            arguments = parser.parse_args(argv)
        eval_command(config, arguments.eval.as_dict())
    except EXPECTED as error:
        _fail(error)
    except KeyboardInterrupt:
        print("subspan: stopped", file=sys.stderr)
        raise SystemExit(130) from None


def finetune_command(config: FinetuneConfig, command: str) -> None:
    """`subspan finetune`."""
    from subspan.training.finetune import finetune, print_summary
    from subspan.training.resume import Stopped

    _no_progress_bars()
    require("transformers.utils.logging", "train").set_verbosity_error()  # that a head is new is said by the run itself
    try:
        print_summary(finetune(config))
    except Stopped as stopped:
        _stop(stopped, command)


def train_command(config: TrainConfig, command: str) -> None:
    """`subspan train`."""
    from subspan.plan import planned_and_measured
    from subspan.training.optimizers import build_optimizer
    from subspan.training.resume import Stopped
    from subspan.training.runlog import describe_summary
    from subspan.training.trainer import train

    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    embeddings = []

    def build(model: Any, config: TrainConfig) -> Any:
        embeddings.append(model.get_input_embeddings().weight.shape[0])  # the planner reads no text
        return build_optimizer(model, config)

    _no_progress_bars()
    try:
        summary = train(config, build)
    except Stopped as stopped:
        _stop(stopped, command if first else None)
    if first:
        print(f"\n{describe_summary(summary, command)}")
    if config.parallel.count == 1:
        measured = summary["peak_memory_bytes"], summary["device"]
        print(f"\nmemory  {planned_and_measured(config, embeddings[0], *measured)[1]}")


def _stop(stopped: Stopped, command: str | None) -> NoReturn:
    if command:
        print(f"subspan: {stopped.message(command)}", file=sys.stderr)
    raise SystemExit(128 + stopped.signal_number) from None


def report_command(runs: Sequence[str], out: str | None, figure: str | None) -> None:
    """`subspan report`."""
    from subspan.report.figures import draw_refreshes
    from subspan.report.page import check_page, report_page
    from subspan.report.runs import read_runs

    if figure:
        if len(runs) > 1 or out:
            raise ValueError(f"figure={figure!r} draws one run and makes no page: name one run, and no --out")
        draw_refreshes(Path(runs[0]), Path(figure))
        print(figure)
        return
    path = Path(out) if out else (Path(runs[0]) if len(runs) == 1 else Path()) / "report.html"
    found = read_runs(runs)
    check_page(path)
    path.write_text(report_page(found), encoding="utf-8")
    print(path)


def eval_command(config: TrainConfig | None, arguments: dict[str, Any]) -> None:
    """`subspan eval`: `config` is the run's, None where `arguments["model"]` is no run folder."""
    from subspan.training.evaluation import check_documents_apart, evaluate
    from subspan.training.models import build_model, model_config
    from subspan.training.text import check_vocabulary, load_data
    from subspan.training.trainer import find_device

    _no_progress_bars()
    if config is None:
        model_config(arguments["model"])  # a wrong name is not the tokenizer's
    run = Path(arguments["model"])
    name = str(run / "model") if config else arguments["model"]
    if config and not Path(name).is_dir():
        raise ValueError(f"{run} holds no exported model: it has not ended, or was trained with --run.export false")
    before = config.data if config else DataConfig()
    given = arguments["data"]
    files, dataset = (bool(given[name]) and given[name] != getattr(before, name) for name in ("files", "dataset"))
    if files != dataset:  # one takes the place of the other
        given |= {"dataset": None, "dataset_config": None} if files else {"files": None, "valid_files": None}
    data = dataclasses.replace(before, **given)
    other_text = (data.files, data.dataset) != (before.files, before.dataset)
    if other_text and data.files:
        data = dataclasses.replace(data, valid_files=data.files)  # all of it is evaluated, nothing is held out

    device = find_device(arguments["device"])
    text = load_data(data, data.tokenizer or name, training=False)
    model = build_model(name, seq_len=data.seq_len, pretrained=True, dtype=arguments["dtype"], device=device)
    check_vocabulary(model, text.tokenizer)
    if data.keep_documents_apart:
        check_documents_apart(model, arguments["batch_size"], data.seq_len, device)
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
    part = "" if other_text else f", {data.valid_files}" if data.valid_files else ", the part held out"
    print(f"  text             {text.description}{part}")
    print(f"  tokens           {result.tokens:,}")
    print(f"  validation loss  {result.loss:.4f} ({kind})")
    print(f"  perplexity       {result.perplexity:.2f}")


def plan_command(arguments: Any) -> None:
    """`subspan plan`: `arguments` are its words, parsed."""
    from subspan.budget import parse_size
    from subspan.cluster import pretended
    from subspan.plan import Planner
    from subspan.report.figures import check_figure
    from subspan.report.page import check_page

    if arguments.figure:
        check_figure(Path(arguments.figure))
    if arguments.html:
        check_page(Path(arguments.html), "html")
    budget = parse_size(arguments.budget) if arguments.budget else None
    config, vocab_size = plan_config(arguments)
    for name in ("figure", "html"):
        if arguments[name] and config.parallel.count > 1:
            raise ValueError(
                f"{name}={arguments[name]!r} compares methods on one process: plan without it, or for one process"
            )
    with pretended(config.parallel):
        _plan(arguments, config, budget, Planner(vocab_size))


def _plan(arguments: Any, config: TrainConfig, budget: int | None, planner: Any) -> None:
    from subspan.advice import advise
    from subspan.budget import Space, describe_fits, largest_model, search
    from subspan.cluster import as_dict, describe_layout, describe_traffic, plan_traffic
    from subspan.plan import describe_run
    from subspan.report.figures import compare_methods, draw_plans
    from subspan.report.page import plan_page
    from subspan.training.models import LLAMA

    if budget is None:
        plan = planner.plan(config)
        texts, found = [plan.describe(config), str(plan)], {**describe_run(config), **plan.as_dict()}
    else:
        given = {axis: (arguments[name],) for name, axis in PLAN_AXES.items() if arguments[name] is not None}
        known = arguments.model or arguments.config
        fits = (search if known else largest_model)(config, budget, Space(**given), planner)
        rows = [{**describe_run(fit.config), **fit.plan.as_dict()} for fit in fits]
        config, plan = fits[0].config, fits[0].plan
        texts, found = [describe_fits(fits, budget)], {"budget": budget, "fits": rows}
    if config.parallel.count > 1:
        gpus_per_node = arguments.gpus_per_node or config.parallel.count // (arguments.nodes or 1)
        traffic = plan_traffic(planner, config, gpus_per_node)
        texts = [
            f"{describe_layout(config.parallel, gpus_per_node)}; of each process:",
            *texts,
            describe_traffic(traffic),
        ]
        found |= {"parallel": as_dict(config.parallel, gpus_per_node, traffic)}
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n\n".join(texts))
        published = config.model.name not in LLAMA and not arguments.config  # of a recipe it says so
        preset, baseline = config.optim.preset, config.model.baseline
        method = preset if baseline is None else baseline if preset.startswith("adamw") else f"{baseline} with {preset}"
        advice = advise(method, plan.parameters, config.model.pretrained or published)
        print(f"  start with            {advice}")
    if arguments.figure:
        draw_plans(compare_methods(config, planner), Path(arguments.figure), config)
    if arguments.html:
        plans = {"this run": plan, **compare_methods(config, planner)}
        Path(arguments.html).write_text(plan_page(plans, config), encoding="utf-8")


def _run_config(model: str) -> TrainConfig | None:
    path = Path(model) / "config.yaml"
    return load_config(path) if path.is_file() else None


def _trained_on(run: Path) -> str | None:
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8"))["corpus"]["sha256"] if path.is_file() else None


def _no_progress_bars() -> None:
    """Loading and saving take no time that is worth a bar of transformers' own."""
    require("transformers.utils.logging", "train").disable_progress_bar()


def _fail(error: BaseException) -> NoReturn:
    print(f"subspan: error: {one_line(error)}", file=sys.stderr)
    raise SystemExit(2) from None
