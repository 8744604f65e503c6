"""Runs of a grid, each once: in a process of its own, with its result in a file.

What has a file is not run again, so an interrupted grid goes on where it was. A process of its own, because peaks of memory
would add up in one, and seeds and threads would leak from run to run; it ends when the one that waits for it ends.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def once(file: Path, out: str | Path, run: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The result of `run(*args)`, a dict for JSON: from `file`, or by running it, with `out` for its run folder."""
    if not file.exists():
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
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        new.write_text(json.dumps(result, indent=1) + "\n")
        new.replace(file)
    result = json.loads(file.read_text())
    print(f"== {file.stem}: validation loss {result['valid_loss']:.4f}", flush=True)
    return dict(result)


def _in_process(queue: Any, run: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    queue.put(run(*args))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
