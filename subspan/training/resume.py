"""Stopping and going on: signals, which checkpoint a run starts from, and what it remembers besides tensors."""

from __future__ import annotations

import dataclasses
import json
import shlex
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from subspan.training.checkpoint import newest
from subspan.training.config import TrainConfig, load_config
from subspan.training.runlog import new_run_folder

T = TypeVar("T")

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints, in its run folder."""


class Stopped(Exception):
    """A run ended before its end because a signal asked for it; `saved` says what is."""

    def __init__(
        self,
        out: Path,
        step: int,
        steps: int,
        signal_number: int,
        subcommand: str = "train",
        saved: str = "all is saved",
    ) -> None:
        self.out, self.step, self.steps, self.signal_number = out, step, steps, signal_number
        self.subcommand, self.saved = subcommand, saved
        super().__init__(self.message())

    def message(self, command: str = "subspan") -> str:
        """What happened and how to go on; `command` is what to type for subspan."""
        config = shlex.quote(str(self.out / "config.yaml"))
        return (
            f"stopped by {signal.Signals(self.signal_number).name} after step {self.step} of {self.steps}, {self.saved}; "
            f"go on with: {command} {self.subcommand} --config {config} --resume auto"
        )


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a request while it is entered, so that a step is finished and saved first.

    A second Ctrl-C is an ordinary one. Outside the main thread, where Python has no signals, it never asks for anything.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        agree: Callable[[int], int] = lambda number: number,
        doing: str = "finishing this step and saving",
    ) -> None:
        """agree: the largest of a number of every process, where there are several. doing: until the run ends."""
        self.say, self.agree, self.doing = say, agree, doing
        self.number: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        with suppress(RuntimeError):  # Python does not print inside a print: the request counts, heard or not
            self.say(f"{signal.Signals(number).name}: {self.doing}; Ctrl-C again stops at once")

    def until_asked(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, up to the request: then `Interrupted`."""
        for item in items:
            if self.asked() is not None:
                raise Interrupted
            yield item

    def asked(self) -> int | None:
        """The signal that any process got, None if none did."""
        return self.agree(self.number or 0) or None


class Interrupted(Exception):
    """An evaluation was cut short by a request to stop."""


@dataclass
class Progress:
    """Where a run stands after `step` steps; all of it goes into a checkpoint, as JSON.

    evaluated: the step of the last evaluation; the checkpoint of a step may be older than the evaluation that is due there.
    samples: of the training text, used so far: the position in it, unless it is a stream, whose own state is `stream`.
    text: what the order of samples depends on, `text_identity`. peak: bytes at most, of every process that went on with it.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    first_loss: float | None = None
    evaluated: int = 0
    seconds: float = 0.0
    refresh_seconds: float | None = None
    peak: int = 0
    samples: int = 0
    stream: dict[str, Any] | None = None
    text: dict[str, Any] = dataclasses.field(default_factory=dict)


def text_identity(config: TrainConfig, sha256: str | None, tokens: str | None) -> dict[str, Any]:
    """What must be equal for a position in the text to mean the same; `tokens`: `Text.tokens`."""
    data = config.data
    stream = [data.dataset, data.dataset_config, data.split] if data.dataset else None
    seed, seq_len = config.run.seed, data.seq_len
    return {"sha256": sha256, "tokens": tokens, "data.dataset": stream, "data.seq_len": seq_len, "run.seed": seed}


def check_text(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """ValueError unless the run goes on with the text and order of the checkpoint."""
    for key, value in there.items():
        if here.get(key) != value and value is not None:
            what = (
                "its text, of training or of validation, is another one"
                if key == "sha256"
                else f"{key} was {value} and is {here.get(key)}"
            )
            raise ValueError(f"checkpoint {path} cannot be continued: {what}, so its position would mean other samples")


def keep_old_config(config: TrainConfig, out: Path, step: int) -> list[str]:
    """Before config.yaml is written anew: if it says other things than `config`, it is kept as config_to_step_N.yaml. Returns
    what they are, a line each."""
    path = out / "config.yaml"
    if not path.is_file():
        return []
    there, here = dataclasses.asdict(load_config(path)), dataclasses.asdict(config)
    changed = [
        f"resume: {section}.{name} was {there[section][name]} and is {value} from step {step + 1} on"
        for section, values in here.items()
        for name, value in (values.items() if isinstance(values, dict) else ())
        if there[section][name] != value
    ]
    kept = out / f"config_to_step_{step}.yaml"
    if changed and not kept.exists():  # else the steps after it, which config.yaml is of, were lost
        path.replace(kept)
    return changed


def _ended_at(out: Path) -> int:
    """Steps that the run in `out` had made when it ended; 0 if it did not end."""
    with suppress(OSError, ValueError, KeyError):
        return int(json.loads((out / "summary.json").read_text(encoding="utf-8"))["steps"])
    return 0


def find_start(config: TrainConfig, say: Callable[[str], None] = print) -> tuple[Path, Path | None]:
    """(run folder, checkpoint to start from or None), as `config.resume` says; nothing is made yet. ValueError if wrong."""
    out = Path(config.run.out).expanduser()
    if config.resume is None:
        return new_run_folder(config.run.out), None
    if config.resume == "auto":
        if not (out / "config.yaml").is_file():
            return new_run_folder(config.run.out), None
        start = newest(out / CHECKPOINTS, say)
        if start is None and any((out / CHECKPOINTS).glob("step_*")):
            raise ValueError(f"resume=auto: no checkpoint in {out / CHECKPOINTS} is good: remove them to start again")
        ended = _ended_at(out)
        if ended and (start is None or int(start.name.removeprefix("step_")) < config.run.steps <= ended):
            raise ValueError(
                f"resume=auto: {out} is finished and has no checkpoint of its end: name another folder with --run.out"
            )
        say(f"resume: {start}" if start else f"resume: {out} has no checkpoint yet, starting from the beginning")
        return out, start
    path = Path(config.resume).expanduser()
    if (path / CHECKPOINTS).is_dir():
        if (found := newest(path / CHECKPOINTS, say)) is None:
            raise ValueError(f"resume={config.resume!r} has no good checkpoint: name another run or drop --resume")
        path = found
    elif not (path / "manifest.json").is_file():
        raise ValueError(
            f"resume={config.resume!r} is neither a checkpoint nor a run with checkpoints: use auto or a folder"
        )
    say(f"resume: {path}")
    own = path.resolve().is_relative_to(out.resolve())  # a checkpoint of another run starts a new folder
    if own and any(other.name > path.name for other in path.parent.glob("step_*")):
        raise ValueError(
            f"resume={config.resume!r} is not the newest checkpoint of {out}: name another run folder with --run.out, "
            "or remove the newer ones"
        )
    return (out if own else new_run_folder(config.run.out)), path
