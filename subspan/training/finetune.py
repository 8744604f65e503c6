"""Fine-tuning for sequence classification and regression: several seeds, an evaluation after each epoch, best and last epoch.

OUT/config.yaml, summary.json
OUT/seed_1/metrics.jsonl, tensorboard/      as of a training run
OUT/seed_1/result.json                      once the seed is done; until then checkpoints/
OUT/seed_1/model/                           the last model, with run.export
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import statistics
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from subspan.extras import require
from subspan.memory import count_memory, peak_memory
from subspan.optim.groups import describe_groups
from subspan.training.baselines import merge
from subspan.training.checkpoint import Checkpointer, load, newest
from subspan.training.classifier import batch_loss, build_classifier, evaluate, load_tokenizer, micro_batches
from subspan.training.config import as_given, save_config
from subspan.training.evaluation import to_device
from subspan.training.finetune_config import FinetuneConfig
from subspan.training.models import save_pretrained
from subspan.training.optimizers import groups_of, make_optimizer
from subspan.training.resume import CHECKPOINTS, Stopped, StopSignal
from subspan.training.runlog import RunLog, json_ready, new_run_folder, write_summary
from subspan.training.tasks import TaskData, load_task
from subspan.training.trainer import (
    MAX_SKIPPED,
    count_parameters,
    describe_device,
    find_device,
    versions,
    warm_up_and_decay,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAY_CHANGE = {"seeds", "out", "device", "threads", "log_every", "checkpoint_every", "export"}
"""Fields of `run` that may differ when a run is resumed: the numbers of a seed do not depend on them."""


@dataclass
class Progress:
    """Where a seed stands after `epoch` epochs; all of it goes into a checkpoint, as JSON. scores: of every epoch."""

    sha256: str
    step: int = 0
    epoch: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    scores: list[dict[str, float]] = dataclasses.field(default_factory=list)


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune and evaluate every seed, fill the run folder `config.run.out`, and return what its summary.json holds.

    Raises ValueError (one line) for anything in `config` that does not fit the rows, the model, the machine or the run that is
    resumed; Stopped when Ctrl-C or SIGTERM asked for it; FloatingPointError when `MAX_SKIPPED` steps in a row are not finite.
    """
    out = _run_folder(config)
    config = _with_finished_seeds(config, out)
    run = config.run
    device = find_device(run.device)
    if run.threads:
        torch.set_num_threads(run.threads)
    for module in ("sklearn.metrics", "scipy.stats"):  # a missing extra should not turn up after the first epoch
        require(module, "finetune")
    tokenizer = load_tokenizer(config.model.name)
    task = load_task(config.data, tokenizer)
    print(f"task   {task}", flush=True)

    results: list[dict[str, Any]] = []
    for seed in run.seeds:
        folder = out / f"seed_{seed}"
        finished = folder / "result.json"
        if finished.is_file():
            result = json.loads(finished.read_text(encoding="utf-8"))
            _check_rows(finished, result["sha256"], task)
            lost = ", its model was not kept" if run.export and not (folder / "model").is_dir() else ""
            print(f"resume: seed {seed} is done{lost}")
        else:
            result = _one_seed(config, task, tokenizer, seed, folder, device, describe=not results)
        results.append(result)

    summary = {
        "task": task.name,
        "metrics": list(task.metrics),
        "labels": task.labels,
        "rows": {"train": len(task.train), "valid": len(task.valid), "sha256": task.sha256},
        **{which: _over_seeds([result[which] for result in results], task) for which in ("best", "last")},
        "seeds": results,
        "seconds": sum(result["seconds"] for result in results),
        "parameters": results[0]["parameters"],
        "bytes": results[0]["bytes"],
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
        "device": describe_device(device),
        "versions": versions(),
        "config": dataclasses.asdict(config),
    }
    write_summary(out / "summary.json", summary)
    return summary


def _one_seed(
    config: FinetuneConfig,
    task: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    folder: Path,
    device: torch.device,
    describe: bool,
) -> dict[str, Any]:
    """Train and evaluate one seed, from its newest checkpoint if there is one, and return what its result.json holds."""
    run = config.run
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(seed)
    model, new, head = build_classifier(config, task, tokenizer, device)
    steps = run.epochs * math.ceil(len(task.train) / run.batch_size)
    warmup_steps = round(run.warmup_ratio * steps)
    # A fine-tuning may be shorter than T: random bases must not last. In every mode alike; `paper` has none.
    stagger = None if config.optim.preset == "paper" else max(1, steps // 50)
    groups = with_own_rate(groups_of(model, config.optim), head, config.optim.head_lr)
    optimizer = make_optimizer(model, config.optim, seed, stagger, groups, torch.bfloat16 if run.autocast else None)
    peak_lrs = [group["lr"] for group in optimizer.param_groups]

    progress = Progress(task.sha256)
    checkpoint = newest(folder / CHECKPOINTS) if (folder / CHECKPOINTS).is_dir() else None
    if checkpoint:
        progress = Progress(**load(checkpoint, model, optimizer))
        _check_rows(checkpoint, progress.sha256, task)
        print(f"resume: {checkpoint}")
    if describe:
        print(f"model  {config.model.name}, {count_parameters(model):,} parameters, {config.model.dtype}, {device}")
        print(f"new    {', '.join(new) or 'nothing, the head is the pretrained one'}\n")
        print(f"{describe_groups(optimizer.param_groups)}\n")
        print(f"memory, without activations\n{count_memory(model, optimizer)}\n", flush=True)
    out = folder.parent
    out.mkdir(parents=True, exist_ok=True)
    save_config(config, out / "config.yaml")

    log = RunLog(folder, steps=steps, log_every=run.log_every, start=progress.step, evaluated=progress.step)
    checkpointer = Checkpointer(folder / CHECKPOINTS, keep=1, say=log.say)
    collate = require("transformers", "train").DataCollatorWithPadding(tokenizer)
    with log, StopSignal(log.say, doing="finishing this step") as stop:
        log.say(f"seed {seed}: {steps} steps, {run.epochs} epochs")
        while progress.epoch < run.epochs:
            progress.epoch += 1
            model.train()
            generator = torch.Generator().manual_seed(1_000_003 * seed + progress.epoch)
            batches = DataLoader(task.train, run.batch_size, shuffle=True, generator=generator, collate_fn=collate)
            for batch in batches:
                begin = time.perf_counter()
                progress.step += 1
                factor = warm_up_and_decay(
                    progress.step, steps, warmup_steps, run.min_lr_ratio, linear=run.decay == "linear"
                )
                for group, peak in zip(optimizer.param_groups, peak_lrs, strict=True):
                    group["lr"] = peak * factor
                rows, loss = len(batch["labels"]), torch.zeros((), device=device)
                for part in micro_batches(batch, run.micro_batch or run.batch_size):
                    part_loss = batch_loss(model, to_device(part, device), run.autocast)[0] / rows
                    loss += part_loss.detach()
                    if optimizer.gradients == "update" and not loss.isfinite():
                        break  # the backward pass would change weights
                    part_loss.backward()  # type: ignore[no-untyped-call]
                norm = optimizer.prepare(loss)
                loss_value, norm_value = torch.stack([loss, norm.to(device)]).tolist()  # the only host sync of a step
                finite = math.isfinite(loss_value) and math.isfinite(norm_value)
                if finite:
                    optimizer.step()
                optimizer.zero_grad()

                duration, tokens = time.perf_counter() - begin, int(batch["attention_mask"].sum())
                progress.seconds += duration  # of training: evaluation is not counted
                progress.tokens += tokens if finite else 0
                progress.skipped += not finite
                progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
                log.step(
                    progress.step,
                    tokens=progress.tokens,
                    loss=loss_value,
                    lr=optimizer.param_groups[0]["lr"],
                    grad_norm=norm_value,
                    tokens_per_second=tokens / duration,
                    peak_memory_bytes=peak_memory(device),
                    seconds=progress.seconds,
                    skipped=progress.skipped,
                )
                if progress.skipped_in_a_row == MAX_SKIPPED:
                    raise FloatingPointError(
                        f"loss or gradient was not finite for {MAX_SKIPPED} steps in a row, up to step {progress.step}: "
                        "lower --optim.lr, set --optim.max_grad_norm 1.0, or use --model.dtype float32"
                    )
                if (asked := stop.asked()) is not None:
                    with suppress(OSError):  # said before
                        checkpointer.wait()
                    saved = "epochs that ended are saved" if run.checkpoint_every else "seeds that ended are saved"
                    raise Stopped(out, progress.step, steps, asked, "finetune", saved)
            scores = evaluate(model, task, collate, run.batch_size, autocast=run.autocast)
            progress.scores.append(scores)
            log.scores(progress.step, progress.epoch, **scores)
            if run.checkpoint_every and progress.epoch % run.checkpoint_every == 0 and progress.epoch < run.epochs:
                log.sync()
                checkpointer.save(progress.step, model, optimizer, json_ready(dataclasses.asdict(progress)))
        try:
            checkpointer.wait()
        except OSError as error:
            log.say(str(error))  # the result is still to be written, so this is no reason to end

    best = max(range(run.epochs), key=lambda i: _decides(progress.scores[i], task))
    result: dict[str, Any] = {
        "seed": seed,
        "best": {"epoch": best + 1, **progress.scores[best]},
        "last": {"epoch": run.epochs, **progress.scores[-1]},
        "epochs": progress.scores,
        "steps": progress.step,
        "skipped_steps": progress.skipped,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "tokens_per_second": progress.tokens / progress.seconds,
        "parameters": count_parameters(model),
        "bytes": dataclasses.asdict(count_memory(model, optimizer)),
        "peak_memory_bytes": peak_memory(device),
        "sha256": task.sha256,
    }
    write_summary(folder / "result.json", result)  # a run that is killed here has the checkpoint or the result
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    if run.export:
        try:
            merge(model)
            save_pretrained(model, folder / "model")
            tokenizer.save_pretrained(folder / "model")
        except (OSError, require("safetensors", "train").SafetensorError) as error:  # a full disk, most of the time
            shutil.rmtree(folder / "model", ignore_errors=True)  # a part of a model would pass for one
            raise OSError(
                f"the trained model could not be written to {folder / 'model'} ({error}): make room, and for another try "
                f"remove {folder}, its result of {task.metrics[0]} {result['last'][task.metrics[0]]:.4f} with it"
            ) from error
    if stop.number is not None and seed != run.seeds[-1]:  # asked for in the last evaluation
        raise Stopped(out, progress.step, steps, stop.number, "finetune", "seeds that ended are saved")
    return result


# ------------------------------------------------------------------------------------------------------ runs and seeds


def with_own_rate(groups: list[dict[str, Any]], names: Collection[str], lr: float | None) -> list[dict[str, Any]]:
    """`groups` with the parameters of these names in groups of their own, at `lr`; as they are if it is None."""
    if lr is None:
        return groups
    made = []
    for group in groups:
        own = [(name, p) for name, p in group["params"] if name in names]
        rest = [(name, p) for name, p in group["params"] if name not in names]
        made += [{**group, "params": rest}] if rest else []
        made += [{**group, "params": own, "lr": lr}] if own else []
    return made


def _run_folder(config: FinetuneConfig) -> Path:
    """The folder of a new run, or of the one to go on with. ValueError if that is a run of other settings."""
    out = Path(config.run.out).expanduser()
    if config.resume is None or not (out / "config.yaml").is_file():
        return new_run_folder(config.run.out)
    saved = require("yaml", "train").safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    for section, values in dataclasses.asdict(config).items():
        if not isinstance(values, dict):
            continue  # `resume` itself
        before = saved.get(section) if isinstance(saved, dict) else None
        new = _defaults(getattr(config, section))  # fields that there were none of when that run was made
        given = as_given(config.optim) if section == "optim" else values
        for key, value in values.items():
            was = before.get(key, new.get(key)) if isinstance(before, dict) else "missing"
            if was not in (value, given[key]) and not (section == "run" and key in MAY_CHANGE):
                raise ValueError(
                    f"resume=auto: {section}.{key} was {was} in {out} and is {value}: set it back, or name another --run.out"
                )
    return out


def _defaults(section: Any) -> dict[str, Any]:
    return {
        field.name: field.default for field in dataclasses.fields(section) if field.default is not dataclasses.MISSING
    }


def _with_finished_seeds(config: FinetuneConfig, out: Path) -> FinetuneConfig:
    """`config` with the seeds that `out` has results of before its own, so that a summary is of all."""
    found = (re.fullmatch(r"seed_(\d+)", path.parent.name) for path in out.glob("seed_*/result.json"))
    finished = sorted(int(match[1]) for match in found if match)
    seeds = list(dict.fromkeys([*finished, *config.run.seeds]))
    return dataclasses.replace(config, run=dataclasses.replace(config.run, seeds=seeds))


def _check_rows(path: Path, sha256: str, task: TaskData) -> None:
    if sha256 != task.sha256:
        raise ValueError(f"{path} is of other rows: give the same data, or name another folder with --run.out")


def _decides(scores: dict[str, float], task: TaskData) -> float:
    value = scores[task.metrics[0]]
    return -math.inf if value is None or math.isnan(value) else value


def _over_seeds(results: list[dict[str, Any]], task: TaskData) -> dict[str, dict[str, float | None]]:
    """Metric -> mean and standard deviation (None for one seed) over the seeds; nan where a seed has nan."""
    table: dict[str, dict[str, float | None]] = {}
    for metric in task.metrics:
        values = [math.nan if result[metric] is None else result[metric] for result in results]
        spread = None if len(values) < 2 else math.nan if any(map(math.isnan, values)) else statistics.stdev(values)
        table[metric] = {"mean": statistics.fmean(values), "std": spread}
    return table


def print_summary(summary: dict[str, Any]) -> None:
    """The result of a fine-tuning for people."""
    rich = require("rich.table", "train")
    metrics, sizes, out = summary["metrics"], summary["bytes"], summary["config"]["run"]["out"]
    factor = 100  # of metrics, as tables print them
    table = rich.Table(
        box=require("rich.box", "train").SIMPLE, title=f"{summary['task']}: best and last epoch, x {factor}"
    )
    for name in ("seed", "best", *metrics, "last", *metrics, "seconds"):
        table.add_column(name, justify="right")

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{factor * value:.2f}"

    for result in summary["seeds"]:
        cells = [str(result["seed"])]
        for which in ("best", "last"):
            cells += [str(result[which]["epoch"]), *(shown(result[which][metric]) for metric in metrics)]
        table.add_row(*cells, f"{result['seconds']:.0f}")
    if len(summary["seeds"]) > 1:
        table.add_section()
        for key in ("mean", "std"):
            cells = [key]
            for which in ("best", "last"):
                cells += ["", *(shown(summary[which][metric][key]) for metric in metrics)]
            table.add_row(*cells, "")
    require("rich.console", "train").Console().print(table)
    state = (sizes["basis"] + sizes["moments"]) / 2**20
    rows = [
        (
            "optimizer state",
            f"{state:.1f} MiB; Adam in fp32 on the same parameters takes {sizes['adam_full_rank'] / 2**20:.1f} MiB",
        ),
        ("weights", f"{sizes['weights'] / 2**20:.1f} MiB, gradients at most {sizes['gradients'] / 2**20:.1f} MiB"),
        ("peak memory", f"{summary['peak_memory_bytes'] / 2**20:.0f} MiB, measured"),
        ("run folder", f"{out}: {', '.join(sorted(path.name for path in Path(out).expanduser().iterdir()))}"),
    ]
    print("\n".join(f"  {name:<16} {value}" for name, value in rows))
