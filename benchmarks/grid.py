"""What grids of runs share: a run in a process of its own with its result in a file, and the search for a learning rate."""

from __future__ import annotations

import fcntl
import glob
import json
import math
import multiprocessing
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Place = TypeVar("Place")


def once(
    file: Path, out: str | Path, run: Callable[..., dict[str, Any]], *args: Any, shown: str = "valid_loss"
) -> dict[str, Any]:
    """The result of `run(*args)`, a dict for JSON: from `file`, or by running it, with `out` for its run folder. Prints the
    number that it has under `shown`, and whether it was kept from before.

    What has a file is not run again, so an interrupted grid goes on where it was; who wants to repeat a run moves its file away.
    A run that diverges leaves FILE.diverged and is nan. A process of its own, because peaks of memory would add up in one, and
    seeds and threads would leak from run to run; it ends when the one that waits for it ends. Several processes may go through
    one grid: of two that come to the same run one waits for the other.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    diverged, kept = file.with_suffix(".diverged"), file.exists()
    with _alone(Path(f"{out}.lock")):
        if not file.exists() and not diverged.exists():
            _run(file, diverged, out, run, args)
    if not file.exists():
        print(f"== {file.stem}: diverged: {diverged.read_text().strip()}", flush=True)
        return {shown: math.nan}
    result = json.loads(file.read_text())
    print(f"== {file.stem}: {shown} {result[shown]:.4f}{' (kept in results)' if kept else ''}", flush=True)
    return dict(result)


def _run(
    file: Path, diverged: Path, out: str | Path, run: Callable[..., dict[str, Any]], args: tuple[Any, ...]
) -> None:
    shutil.rmtree(out, ignore_errors=True)  # left by an interrupted run
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_in_process, args=(queue, run, args))
    process.start()
    while process.is_alive() and queue.empty():
        process.join(1)
    if queue.empty():
        raise RuntimeError(f"run {file.stem!r} died, see above")
    result = queue.get()
    process.join()
    if isinstance(result, str):
        diverged.write_text(f"{result}\n")
        return
    new = file.with_suffix(".new")
    rows = re.sub(r"[\[{][^\[\]{}]+[\]}]", lambda row: " ".join(row[0].split()), json.dumps(result, indent=1))
    new.write_text(f"{rows}\n")
    new.replace(file)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Waits until no other process is in here with this lock; one that dies lets go of it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _in_process(queue: Any, run: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        queue.put(run(*args))
    except FloatingPointError as error:  # loss or gradients not finite, again and again
        queue.put(str(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def walk(start: Place, neighbours: Callable[[Place], Iterable[Place]], loss: Callable[[Place], float]) -> Place:
    """From `start` to the best of its neighbours, and on, until none is better. nan is worse than any number."""
    best, found = None, start
    while found != best:
        best = found
        found = min([best, *neighbours(best)], key=lambda place: finite(loss(place)))
    return best


def finite(loss: float) -> float:
    """nan as inf, since `min` never leaves a nan."""
    return math.inf if math.isnan(loss) else loss


def beside(rate: float) -> tuple[float, float]:
    """What comes before and after `rate` in 0.001, 0.003, 0.01, 0.03, ..."""
    digit, exponent = f"{rate:.0e}".split("e")
    return (
        float(f"3e{int(exponent) - 1}" if digit == "1" else f"1e{exponent}"),
        float(f"3e{exponent}" if digit == "1" else f"1e{int(exponent) + 1}"),
    )


def training_files(pattern: str) -> list[str]:
    """Files of the glob `pattern`, the last one to hold out from a search."""
    files = sorted(glob.glob(pattern))
    if len(files) < 2:
        raise SystemExit(f"train={pattern!r} matches {len(files)} files: at least two are needed, one is held out")
    return files
