"""What a run leaves behind and shows: the run folder, its metrics, the progress bar and the closing table."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from subspan.diagnostics import FIELDS
from subspan.extras import require
from subspan.optim.presets import FULL_RANK
from subspan.training.config import OF_BASELINES, OF_BASES, ModelConfig, OptimConfig


class RunLog:
    """Makes the run folder; progress bar or plain lines, metrics.jsonl and TensorBoard events while the run lasts."""

    def __init__(self, out: Path, *, steps: int, log_every: int, start: int = 0, evaluated: int = 0) -> None:
        """`start`: the step of the checkpoint that the run goes on from, `evaluated`: of the last evaluation it knows; what
        was logged behind them is forgotten, because it comes again."""
        self.out, self.steps, self.log_every = out, steps, log_every
        self.start, self.evaluated = start, evaluated
        self.progress = require("rich.progress", "train")
        self.console = require("rich.console", "train").Console()
        self.events: Any = None
        self.bar: Any = None

    def __enter__(self) -> RunLog:
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "metrics.jsonl"
        kept = lines_until(path, self.start, self.evaluated) if self.start and path.is_file() else []
        new = path.with_suffix(".new")  # a run that is killed here loses nothing
        new.write_text("".join(kept), encoding="utf-8")
        new.replace(path)
        self.metrics = path.open("a", encoding="utf-8", buffering=1)
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(self.out / "tensorboard", purge_step=self.start + 1)
        if self.console.is_terminal:
            columns = (
                self.progress.TaskProgressColumn(),
                self.progress.TextColumn("{task.description}"),
                self.progress.BarColumn(None),
            )
            self.bar = self.progress.Progress(*columns, console=self.console, expand=True)
            self.task = self.bar.add_task("first step", total=self.steps, completed=self.start)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
        if self.events:
            self.events.close()
        self.metrics.close()

    def step(self, step: int, **values: float) -> None:
        """One optimizer step: tokens, loss, lr, grad_norm, tokens_per_second, peak_memory_bytes, seconds, skipped.

        The line shows loss, learning rate, gradient norm, speed, peak memory and time left, within 80 columns.
        """
        self._write(step, values)
        left = round(values["seconds"] / step * (self.steps - step))
        line = (
            f"loss {values['loss']:.4f} lr {values['lr']:.1e} grad {values['grad_norm']:.2g} "
            f"{values['tokens_per_second']:,.0f} tokens/s peak {values['peak_memory_bytes'] / 2**30:.2f} GiB "
            f"{left // 60}:{left % 60:02} left"
        )
        if self.bar:
            self.bar.update(self.task, completed=step, description=line)
        elif step % self.log_every == 0 or step in (1, self.steps):
            print(f"step {step}/{self.steps} {line}", flush=True)

    def evaluation(self, step: int, *, tokens: int, valid_loss: float, perplexity: float) -> None:
        self._write(step, {"tokens": tokens, "valid_loss": valid_loss, "perplexity": perplexity})
        self.say(f"step {step}: validation loss {valid_loss:.4f}, perplexity {perplexity:.2f}")

    def scores(self, step: int, epoch: int, **values: float) -> None:
        """Metrics of the validation rows after an epoch, `valid_loss` among them."""
        self._write(step, {"epoch": epoch, **values})
        self.say(f"epoch {epoch}: {', '.join(f'{name} {value:.4f}' for name, value in values.items())}")

    def refreshes(self, step: int, rows: list[dict[str, Any]]) -> None:
        """What diagnostics saw of the bases that changed in this step: one line for all, means in TensorBoard."""
        self.metrics.write(json.dumps(json_ready({"step": step, "refreshes": rows})) + "\n")
        if self.events:
            for field in FIELDS:
                values = [row[field] for row in rows if field in row]
                if values:
                    self.events.add_scalar(f"refresh/{field}", sum(values) / len(values), step)

    def sync(self) -> None:
        """Wait until all that was logged is on the disk: a checkpoint counts on it."""
        os.fsync(self.metrics.fileno())

    def say(self, line: str) -> None:
        (self.bar.console.print if self.bar else print)(line)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.metrics.write(json.dumps(json_ready({"step": step, **values})) + "\n")
        if self.events:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)


class Silence(RunLog):
    """The log of a process that is not the first: none."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def refreshes(self, step: int, rows: list[dict[str, Any]]) -> None:
        pass

    def step(self, step: int, **values: float) -> None:
        pass

    def sync(self) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def _write(self, step: int, values: dict[str, float]) -> None:
        pass


def describe_summary(summary: dict[str, Any], command: str = "subspan") -> str:
    """The result of a run for people. `command` is what to type for subspan."""
    config, sizes = summary["config"], summary["bytes"]
    out, state = config["run"]["out"], sizes["basis"] + sizes["moments"]
    folder = shlex.quote(out)
    preset, name, lr = (
        ("galore", "GaLore", 0.01) if config["optim"]["preset"] in FULL_RANK else ("adamw", "full-rank AdamW", 0.001)
    )
    change = f"--optim.preset {preset} --optim.lr {lr} --run.out {shlex.quote(f'{out}_{preset}')}"
    if preset == "adamw":
        change += _back_to_default(config, "optim", OptimConfig, OF_BASES)
        change += " --run.diagnostics false" if config["run"]["diagnostics"] else ""
    elif config["model"]["baseline"]:
        change += " --model.baseline null" + _back_to_default(config, "model", ModelConfig, OF_BASELINES)
    start = "" if summary["first_loss"] is None else f"; the first step's loss was {summary['first_loss']:.4f}"
    rows = [
        ("validation loss", f"{summary['valid_loss']:.4f} nats per token{start}"),
        ("perplexity", f"{summary['perplexity']:.2f}, as unsure as among that many equally likely pieces"),
        ("trained on", f"{summary['tokens']:,} tokens in {summary['seconds']:.0f} s"),
        (
            "optimizer state",
            f"{_mib(state)}; Adam in fp32 on the same parameters takes {_mib(sizes['adam_full_rank'])}",
        ),
        ("run folder", f"{out}: {', '.join(sorted(path.name for path in Path(out).expanduser().iterdir()))}"),
        ("try next", f"{name}, to compare: {command} train --config {folder}/config.yaml {change}"),
    ]
    if config["run"]["export"]:
        rows.insert(-1, ("evaluate", f"{command} eval {folder}"))
    return "\n".join(f"  {name:<16} {value}" for name, value in rows)


def _back_to_default(config: dict[str, Any], section: str, made_by: type, names: Sequence[str]) -> str:
    """The options that set these fields back."""
    usual = {name: getattr(made_by, name) for name in names}
    changed = [name for name in names if config[section][name] != usual[name]]
    return "".join(f" --{section}.{name} {json.dumps(usual[name])}" for name in changed)


def new_run_folder(name: str) -> Path:
    """The path of a run folder that can be made or is empty; ValueError otherwise. Nothing is made yet."""
    out = Path(name).expanduser()
    if out.is_dir() and any(path.name != "config.new" for path in out.iterdir()):  # of a run killed as it began
        raise ValueError(
            f"run folder {out} exists and is not empty: name another with --run.out, or go on with --resume auto"
        )
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise ValueError(f"run folder {out} cannot be made, {parent} is a file: name another with --run.out")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"run folder {out} cannot be made, {parent} is not writable: name another with --run.out")
    return out


def lines_until(path: Path, step: int, evaluated: int) -> list[str]:
    """The lines of a metrics.jsonl up to `step`, evaluations up to `evaluated`; one that a killed run left half-written, or
    filled with zeros by a power cut, is behind them."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith("\n") or row["step"] > (evaluated if "valid_loss" in row else step):
            break
        kept.append(line)
    return kept


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(json_ready(summary), indent=2) + "\n", encoding="utf-8")
    new.replace(path)


def json_ready(value: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
