"""Damage checkpoints on purpose, one file at a time: no damaged one may verify, load, or be taken for the newest."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.utils.logging import disable_progress_bar

from subspan.training.checkpoint import load, newest, verify
from subspan.training.config import load_config
from subspan.training.models import build_model
from subspan.training.optimizers import build_optimizer

KINDS = ("flip", "truncate", "delete")


class Violation(Exception):
    """Something is not what it should be after a kill or with a damaged checkpoint."""


def corrupt(run: Path, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Damage a copy of the newest checkpoint of a finished `run` `count` times, each file in turn and each kind in turn.

    folder: where to put copies of it and of the one before.
    """
    older, target = sorted((run / "checkpoints").glob("step_*"))[-2:]
    for path in (older, target):
        shutil.copytree(path, folder / path.name)
    older, target = folder / older.name, folder / target.name
    files = sorted(file.name for file in target.iterdir())
    draw = random.Random(seed)
    config = load_config(run / "config.yaml")
    disable_progress_bar()
    model = build_model(str(run / "model"), pretrained=True)
    optimizer = build_optimizer(model, config)
    for p in model.parameters():
        p.data.zero_()  # other than in the checkpoint: a load that changes something is then seen

    counts: Counter[str] = Counter()
    refused_by_verify = refused_by_load = fell_back = 0
    before = [X.clone() for X in _everything(model, optimizer)]
    for index in range(count):
        kind, file = KINDS[index // len(files) % len(KINDS)], target / files[index % len(files)]
        original = file.read_bytes()
        what = damage(file, kind, draw)
        refused_by_verify += _refused(what, verify, target)
        refused_by_load += _refused(what, load, target, model, optimizer)
        after = _everything(model, optimizer)
        if not all(X.equal(Y) for X, Y in zip(before, after, strict=True)):
            raise Violation(f"{what}: refused, but the model or the optimizer has changed")
        said: list[str] = []
        found = newest(folder, said.append)
        if found != older or len(said) != 1:
            raise Violation(f"{what}: newest() is {found} and says {said}")
        fell_back += 1
        counts[kind] += 1
        file.write_bytes(original)
        if (index + 1) % 50 == 0:
            print(f"{index + 1} corruptions of {count} found out, the last: {what}", flush=True)

    # The other side of it: the same files, whole again, are accepted, so that refusing everything would not pass.
    if newest(folder) != target:
        raise Violation(f"{target} is whole and newest() does not take it")
    load(target, model, optimizer)
    if all(X.equal(Y) for X, Y in zip(before, _everything(model, optimizer), strict=True)):
        raise Violation(f"{target} is whole and load() did nothing")
    return {
        "corruptions": count,
        "files": files,
        "by_kind": dict(counts),
        "refused_by_verify": refused_by_verify,
        "refused_by_load": refused_by_load,
        "fell_back": fell_back,
    }


def damage(file: Path, kind: str, draw: random.Random) -> str:
    """Damage `file`; what was done, in words."""
    data = bytearray(file.read_bytes())
    if kind == "delete":
        file.unlink()
        return f"{file.name} deleted"
    if kind == "truncate":
        size = draw.randrange(len(data))
        file.write_bytes(data[:size])
        return f"{file.name} cut off at {size:,} of {len(data):,} bytes"
    place, bit = draw.randrange(len(data)), draw.randrange(8)
    data[place] ^= 1 << bit
    file.write_bytes(data)
    return f"{file.name}, bit {bit} of byte {place:,} of {len(data):,} flipped"


def _refused(what: str, function: Any, *arguments: Any) -> bool:
    try:
        function(*arguments)
    except ValueError as error:
        if "\n" in str(error):
            raise Violation(f"{what}: the message of {function.__name__} has more than one line: {error}") from None
        return True
    raise Violation(f"{what}: {function.__name__} accepts it")


def _everything(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    state = [X for values in optimizer.state.values() for X in values.values()]
    return [*(p.detach() for p in model.parameters()), *state]
