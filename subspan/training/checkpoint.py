"""Checkpoints: model, optimizer and loop on disk, so that a killed run goes on bit for bit.

    FOLDER/step_00000100/
        shard-00001-model-00001-of-00002.safetensors, ...   tensors, by torch.distributed.checkpoint; nothing is a pickle
        manifest.json     format, step, progress, versions, what optimizer it was, and name -> [dtype, shape] of every tensor
        SHA256SUMS        of every other file: `sha256sum -c SHA256SUMS` checks a copy

Tensors are named model.NAME (parameters, tied ones once, and persistent buffers; an INT8 weight is model.NAME.codes and
model.NAME.scale), optimizer.NAME.KEY with the name of the parameter, and rng.cpu, rng.cuda.0, ... (of several processes
rng.cuda, each one's own). Learning rates and other settings of the optimizer are not saved: they may change between two parts
of a run.

A checkpoint is written under a dot-name, synced and then renamed, and renamed to a dot-name before it is deleted: what is
called step_* is whole whenever the process or the machine dies. SHA256SUMS tells whether it still is. Of several processes each
writes the tensors, and parts of tensors, that it has, and another number of processes may read them.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from subspan import __version__
from subspan.extras import require
from subspan.memory import available_memory
from subspan.optim.int8 import Int8Weight

if TYPE_CHECKING:
    from subspan.training.processes import Processes

T = TypeVar("T")

FORMAT = 1
MANIFEST, SUMS = "manifest.json", "SHA256SUMS"

FILE_BYTES = 2**28
"""Tensors share files up to this size: torch's writer builds a file in memory, twice over, before it writes it."""

FIXES = {
    "model": "build the model as it was saved, with the same sizes, model.dtype and model.int8",
    "optimizer": "build the optimizer as it was saved, with the same preset, rank, proj_type and state_dtype",
    "rng": "load it with the torch version that its manifest.json names",
}


class Checkpointer:
    """Writes the checkpoints of one run into `folder` and keeps the newest `keep` that are whole.

    Making one removes what a killed run left half-written in `folder`: no other run may be writing there.
    say: gets what went wrong, a line each, always in the thread that calls `save`.
    processes: those of the run, if there are several: all of them save, together, and training waits for it.

    Raises ValueError: keep below 1, torch or safetensors too old or missing.
    """

    def __init__(
        self, folder: Path, *, keep: int, say: Callable[[str], None] = print, processes: Processes | None = None
    ) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep={keep!r} must be a whole number of at least 1")
        _engine()  # that it cannot write should not turn up at the first save
        self.folder, self.keep, self.say = folder, keep, say
        self._thread: threading.Thread | None = None
        self._failure: OSError | None = None
        self._said_failure = self._said_slow = False
        self._whole: set[Path] = set()  # written or verified by this object: not read again to count them
        self._together = processes is not None and processes.count > 1
        self._once: Callable[[Callable[[], T]], T] = _call if processes is None else processes.first_does
        self._once(self._clean)

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any]) -> None:
        """Copy everything to host memory and return; a thread writes the copy to `folder`/step_<step>.

        Waits first while the previous one is still being written. Where the copy does not fit into free host memory it
        writes before it returns, and says so once. Call it between two optimizer steps. The random number states of torch
        on the CPU and, if CUDA is in use, on every GPU (of several processes the own one's, which all advance alike) are taken
        along; a checkpoint of the same step is replaced.
        progress: the loop's own state, as JSON.

        A save that fails (a full disk) leaves earlier checkpoints as they are and is said at the next `save`; that one
        tries again. Raises ValueError, before anything is written: optimizer and model do not belong together, state that
        is no tensor, progress that is no JSON.
        """
        self._join()
        self._say_failure()
        self._failure = None
        tensors = _tensors(model, optimizer) | _random_states(self._together)
        manifest = {
            "format": FORMAT,
            "step": step,
            "progress": progress,
            "versions": {"subspan": __version__, "torch": torch.__version__},
            **_description(_trained(model, optimizer), optimizer, tensors),
        }
        try:
            text = json.dumps(manifest, indent=1) + "\n"
        except (TypeError, ValueError) as error:
            raise ValueError(f"progress is no JSON ({error}): use dicts, lists, strings and numbers") from None
        if self._together:
            self._attempt(step, {name: X.contiguous() for name, X in tensors.items()}, text)
            self._say_failure()
            return
        sizes = [X.nbytes for X in tensors.values()]
        room = available_memory()
        need = sum(sizes) + 2 * min(sum(sizes), max(FILE_BYTES, *sizes))  # the copy, and the writer's own two of a file
        if room is None or need <= room:
            copies = {name: X.to("cpu", copy=True).contiguous() for name, X in tensors.items()}
            self._thread = threading.Thread(target=self._attempt, args=(step, copies, text), name="checkpoint")
            self._thread.start()  # no daemon: the interpreter waits for it, even after an exception
            return
        if not self._said_slow:
            self._said_slow = True
            self.say(
                f"a copy of the checkpoint ({need / 2**30:.1f} GiB) does not fit into free host memory "
                f"({room / 2**30:.1f} GiB): training waits while checkpoints are written"
            )
        self._attempt(step, {name: X.contiguous() for name, X in tensors.items()}, text)
        self._say_failure()

    def wait(self) -> None:
        """Return once everything is on disk. Raises OSError, one line, if the last save failed."""
        self._join()
        if self._failure is not None:
            self._said_failure = True
            raise self._failure

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _say_failure(self) -> None:
        if self._failure is not None and not self._said_failure:
            self._said_failure = True
            self.say(str(self._failure))

    def _attempt(self, step: int, tensors: dict[str, Tensor], manifest: str) -> None:
        """Write, then delete what is too old. Whatever fails is kept for the caller's thread: training goes on."""
        try:
            self._write(step, tensors, manifest)
            self._once(lambda: self._rotate(step))
        except Exception as error:
            intact = f"{max(self._whole)} is intact" if self._whole else f"what {self.folder} had is untouched"
            self._failure = OSError(
                f"checkpoint of step {step} could not be written, {_reason(error)}: {intact}, "
                "free disk space or mend the cause, the next save tries again"
            )
            self._failure.__cause__ = error
            self._said_failure = False

    def _write(self, step: int, tensors: dict[str, Tensor], manifest: str) -> None:
        path = self.folder / f"step_{step:08d}"
        temporary = self.folder / f".{path.name}.tmp"

        def begin() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            _sync(self.folder.parent)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()

        self._once(begin)
        try:
            _write_tensors(tensors, temporary, self._together)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._once(lambda: self._finish(path, temporary, manifest))

    def _finish(self, path: Path, temporary: Path, manifest: str) -> None:
        replaced: Path | None = None
        try:
            (temporary / MANIFEST).write_text(manifest, encoding="utf-8")
            (temporary / SUMS).write_bytes(_sums(temporary))
            for written in (*temporary.iterdir(), temporary):
                _sync(written)
            replaced = _hide(path, "old") if path.exists() else None
            temporary.rename(path)
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if replaced is not None and not path.exists():
                replaced.rename(path)
            raise
        self._whole.add(path)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)

    def _clean(self) -> None:
        _recover(self.folder)
        for leftover in (path for suffix in ("tmp", "old", "gone") for path in self.folder.glob(f".step_*.{suffix}")):
            shutil.rmtree(leftover)

    def _rotate(self, step: int) -> None:
        """Delete what is older than the `keep` newest whole checkpoints up to `step`.

        Later ones belong to a run that was set back: they stay until this run gets there and replaces them.
        """
        kept = 0
        for number, path in reversed(_checkpoints(self.folder)):
            if number > step:
                continue
            if kept == self.keep:
                self._whole.discard(path)
                hidden = _hide(path, "gone")
                _sync(self.folder)
                shutil.rmtree(hidden, ignore_errors=True)  # what cannot be deleted goes when the next run starts
            elif path in self._whole or _fault(path) is None:
                self._whole.add(path)
                kept += 1


# ------------------------------------------------------------------------------------------------- reading and loading


def newest(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint in `folder` that verifies, None if there is none. `say` gets a line for each broken one."""
    _recover(folder)
    for _, path in reversed(_checkpoints(folder)):
        fault = _fault(path)
        if fault is None:
            return path
        say(f"{fault}: skipped")
    return None


def _fault(path: Path) -> str | None:
    try:
        verify(path)
    except ValueError as error:
        return str(error)
    return None


def verify(path: Path) -> dict[str, Any]:
    """Read every file of a checkpoint and return its manifest. ValueError, one line, if anything is not as it was written."""
    try:
        written, found = (path / SUMS).read_bytes(), _sums(path)
        text = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise ValueError(f"checkpoint {path} cannot be read, {_reason(error)}: use an older one") from error
    if written != found:
        names = {ascii(line[66:].decode(errors="replace")) for line in {*written.splitlines()} ^ {*found.splitlines()}}
        raise ValueError(f"checkpoint {path} is damaged, see {', '.join(sorted(names)) or SUMS}: use an older one")
    try:
        manifest: dict[str, Any] = json.loads(text)
        version = manifest["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path / MANIFEST} is no manifest of a checkpoint: use a folder that subspan wrote"
        ) from error
    if version != FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {version!r}, this subspan reads {FORMAT}: install the other version"
        )
    return manifest


def load(path: Path, model: nn.Module, optimizer: Optimizer, processes: Processes | None = None) -> dict[str, Any]:
    """Put the checkpoint's weights, buffers, optimizer state and random number states in place.

    Returns the `progress` it was saved with, and in it `step`. Settings in the optimizer's groups stay the current ones.
    States of GPUs that are not in use here are left out. processes: of the run, if there are several: all of them load, whatever
    number it was saved by.

    Raises ValueError, one line and with nothing changed: the checkpoint is damaged, or of another model or optimizer
    (names, shapes, dtypes, rule, rank, proj_type, view).
    """
    once: Callable[[Callable[[], dict[str, Any]]], dict[str, Any]] = (
        _call if processes is None else processes.first_does
    )
    manifest = once(lambda: verify(path))
    together = processes is not None and processes.count > 1
    trained, tensors, random_states = _trained(model, optimizer), _tensors(model, optimizer), _random_states(together)
    random_states = {name: X for name, X in random_states.items() if name in manifest["tensors"]}
    state_from_the_start = hasattr(optimizer, "rule")  # ours; torch's have none before their first step
    state: dict[str, dict[str, Tensor]] = {}
    if not state_from_the_start:
        state = _empty_state(manifest["tensors"], trained)
        tensors = {name: X for name, X in tensors.items() if name.startswith("model.")}
        tensors |= {f"optimizer.{name}.{key}": X for name, values in state.items() for key, X in values.items()}
    tensors |= random_states
    _check_same(path, manifest, _description(trained, optimizer, tensors))
    _read_tensors(tensors, path, together)
    if state_from_the_start:
        optimizer.load_state_dict(optimizer.state_dict())  # the tensors are loaded: this reads the counters from them
    else:
        _replace_state(optimizer, list(trained), state)
    for name, X in random_states.items():
        if name == "rng.cpu":
            torch.set_rng_state(X)
        elif name == "rng.cuda":
            torch.cuda.set_rng_state(X)
        else:
            torch.cuda.set_rng_state(X, int(name.removeprefix("rng.cuda.")))
    return {**manifest["progress"], "step": manifest["step"]}


def _check_same(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """ValueError naming the first thing in which two `_description`s differ; the GPUs may be others."""
    theirs, ours = _facts(there), _facts(here)
    for name in theirs | ours:
        was, now = theirs.get(name, "missing"), ours.get(name, "missing")
        kind = name.partition(".")[0] if name.startswith(("model.", "rng.")) else "optimizer"
        if was != now and not name.startswith("rng.cuda"):
            raise ValueError(
                f"checkpoint {path} is of another {kind}: {name} is {was} in it, {now} here: {FIXES[kind]}"
            )


def _facts(description: Mapping[str, Any]) -> dict[str, str]:
    """Name -> value of all that must be equal, what explains the most first: weights, rule, projections, state."""
    optimizer = description["optimizer"]
    tensors = {name: f"{dtype} {tuple(shape)}" for name, (dtype, shape) in description["tensors"].items()}
    facts = {name: text for name, text in tensors.items() if name.startswith("model.")} | {"rule": optimizer["rule"]}
    for name, (rank, proj_type, view) in optimizer["projected"].items():
        facts[f"projection of {name}"] = f"of rank {rank}, proj_type {proj_type}, view {view}"
    return facts | tensors


# ------------------------------------------------------------------------------------------------ what is in it


def _trained(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's parameters in its order, by their names in `model`: an optimizer need not know any."""
    names = {p: name for name, p in model.named_parameters()}
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for p in own:
        if p not in names:
            raise ValueError(
                f"the optimizer trains a tensor of shape {tuple(p.shape)} that is no parameter of the model: "
                "give the model that the optimizer was built for"
            )
    return {names[p]: p for p in own}


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """model.* and optimizer.* as they are now, detached, in the memory they have."""
    saved = model.state_dict(keep_vars=True)
    tensors: dict[str, Any] = {}
    for name, W in model.named_parameters():
        parts = ("codes", "scale") if isinstance(W, Int8Weight) else ()
        tensors |= {f"model.{name}.{part}": getattr(W, part) for part in parts} or {f"model.{name}": W}
    persistent = {id(X) for X in saved.values()}  # by identity: wrappers of modules rename entries
    tensors |= {f"model.{name}": X for name, X in model.named_buffers() if id(X) in persistent}
    tensors |= {f"model.{name}": X for name, X in saved.items() if not isinstance(X, Tensor)}
    for name, p in _trained(model, optimizer).items():
        tensors |= {f"optimizer.{name}.{key}": X for key, X in optimizer.state.get(p, {}).items()}
    for name, X in tensors.items():
        if not isinstance(X, Tensor):
            raise ValueError(f"{name} is of type {type(X).__name__}, checkpoints hold tensors: make it a 0-d tensor")
    return {name: X.detach() for name, X in tensors.items()}


def _random_states(together: bool) -> dict[str, Tensor]:
    """together: of one of several processes, which sees the GPUs of all."""
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        if together:
            return {**states, "rng.cuda": torch.cuda.get_rng_state()}
        states |= {f"rng.cuda.{i}": X for i, X in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _description(
    trained: Mapping[str, Tensor], optimizer: Optimizer, tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """What must be equal for the tensors to mean the same, for JSON.

    proj_type is part of it: the bases of a square matrix have one shape on both sides.
    """
    names = {p: name for name, p in trained.items()}
    projected = {
        names[p]: [group["rank"], group.get("proj_type", "std"), group.get("view", "matrix")]
        for group in optimizer.param_groups
        if "rank" in group
        for p in group["params"]
    }
    return {
        "optimizer": {"rule": _rule_names(optimizer), "projected": projected},
        "tensors": {name: [str(X.dtype).removeprefix("torch."), list(X.shape)] for name, X in tensors.items()},
    }


def _rule_names(optimizer: Optimizer) -> str:
    rule = getattr(optimizer, "rule", optimizer)
    dense = getattr(optimizer, "dense_rule", rule)
    names = [type(rule).__name__, type(dense).__name__]
    return names[0] if names[0] == names[1] else f"{names[0]}, dense {names[1]}"


# ------------------------------------------------------------------------------------------------ optimizer state


def _empty_state(table: Mapping[str, Any], trained: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Parameter name -> state key -> CPU tensor to load into, as the table says."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, (dtype, shape) in table.items():
        owner = name.removeprefix("optimizer.")
        while owner and owner not in trained:  # both names and keys may have dots
            owner = owner.rpartition(".")[0]
        if owner:
            key = name.removeprefix(f"optimizer.{owner}.")
            state.setdefault(owner, {})[key] = torch.empty(shape, dtype=getattr(torch, dtype))
    return state


def _replace_state(optimizer: Optimizer, names: list[str], state: Mapping[str, dict[str, Tensor]]) -> None:
    """The optimizer's state becomes `state`, parameter `names[i]` being its i-th; its groups stay."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(
        {"state": {i: state[n] for i, n in enumerate(names) if n in state}, "param_groups": groups}
    )
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for name, p in zip(names, own, strict=True):
        for key, X in state.get(name, {}).items():
            placed = optimizer.state[p][key]
            if placed.dtype != X.dtype:  # torch moved it to p's device, and cast it to p's dtype: bf16 for fp32 moments
                optimizer.state[p][key] = X.to(placed.device)


# ------------------------------------------------------------------------------------------------------------ files


@functools.cache
def _engine() -> Any:
    """torch.distributed.checkpoint: imported where it is used, because it takes a while."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 9) or not torch.distributed.is_available():
        raise ValueError(
            f"checkpoints need torch 2.9 or newer with torch.distributed, this is {torch.__version__}: pip install -U torch"
        )
    require("safetensors.torch", "train")
    import torch.distributed.checkpoint as engine

    # Said at each save and load although no_dist=True asks for it. Not by catch_warnings: that is not for two threads.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    return engine


def _write_tensors(tensors: dict[str, Tensor], folder: Path, together: bool) -> None:
    engine = _engine()
    writer = engine.HuggingFaceStorageWriter(str(folder), _file_numbers(tensors), save_distributed=True)
    writer.per_thread_copy_ahead = 0  # a tensor at a time: to copy ahead it would start CUDA, in a run on the CPU too
    _raising(engine.save, tensors, storage_writer=writer, no_dist=not together)


def _read_tensors(tensors: dict[str, Tensor], folder: Path, together: bool) -> None:
    """Fill `tensors` in place."""
    engine = _engine()
    _raising(engine.load, tensors, storage_reader=engine.HuggingFaceStorageReader(str(folder)), no_dist=not together)


def _call(what: Callable[[], T]) -> T:
    return what()


def _raising(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call it, raising what went wrong instead of torch's report of it, a BaseException that a thread would die of."""
    try:
        function(*args, **kwargs)
    except _engine().api.CheckpointException as report:
        raise next(iter(report.failures.values()))[0] from None


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensor name -> number of its file, from 1: files of at most FILE_BYTES, or of one tensor."""
    numbers: dict[str, int] = {}
    number, size = 1, 0
    for name, X in tensors.items():
        if size and size + X.nbytes > FILE_BYTES:
            number, size = number + 1, 0
        numbers[name] = number
        size += X.nbytes
    return numbers


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything in `folder` that is called step_<number>, oldest first."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name[5:]), folder / name) for name in names if re.fullmatch(r"step_\d{8,}", name))


def _sums(folder: Path) -> bytes:
    """The text of sha256sum over all files of `folder` but its own."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.name == SUMS:
            continue
        if not path.is_file():  # opening a pipe would wait for ever
            raise OSError(errno.EINVAL, "not a file", str(path))
        with path.open("rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {path.name}\n")
    return "".join(lines).encode(errors="surrogateescape")


def _recover(folder: Path) -> None:
    """Give a checkpoint its name back that was hidden to be replaced, by a run killed before the new one had the name."""
    for hidden in folder.glob(".step_*.old"):
        path = folder / hidden.name.removeprefix(".").removesuffix(".old")
        if not path.exists():
            hidden.rename(path)


def _hide(path: Path, suffix: str) -> Path:
    """Rename to a dot-name, which is no checkpoint's; suffix: old where the name gets a new one, gone before deletion."""
    hidden = path.with_name(f".{path.name}.{suffix}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    return hidden


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk and not only on their way."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({Path(str(error.filename)).name})" if error.filename else error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
