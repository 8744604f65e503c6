"""A run that is saved, broken off and loaded goes on bit for bit; nothing that happens to the disk goes unnoticed."""

from __future__ import annotations

import errno
import itertools
import json
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import subspan
from subspan.training import checkpoint
from subspan.training.checkpoint import Checkpointer, load, newest, verify

# pytest puts the filters back after each test, which the module sets once a process
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Tiny(nn.Module):
    """Embedding tied to the head, two square blocks, dropout, a persistent and a passing buffer."""

    def __init__(self, width: int = 8, dtype: torch.dtype = torch.float32, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width, dtype=dtype)
        self.layers = nn.ModuleList([nn.Linear(width, width, dtype=dtype) for _ in range(layers)])
        self.head = nn.Linear(width, 20, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("passing", torch.zeros(3), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen += tokens.numel()
        X = self.embedding(tokens)
        for layer in self.layers:
            X = X + nn.functional.dropout(layer(X).tanh(), 0.2)
        return self.head(X)


def galore(model: nn.Module, preset: Any = subspan.GaLoreAdamW, rank: int = 3, proj_type: str = "std", **given: Any):
    groups = subspan.param_groups(model, rank=rank, update_proj_gap=2, proj_type=proj_type, verbose=False)
    return preset(groups, 0.02, **given)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 0.01)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


OPTIMIZERS = {
    "GaLoreAdamW": galore,
    "GaLoreAdamW right": lambda model: galore(model, proj_type="right"),
    "GaLoreAdamW bf16 state": lambda model: galore(model, state_dtype=torch.bfloat16),
    "GaLoreAdafactor": lambda model: galore(model, subspan.GaLoreAdafactor),
    "GaLoreLion": lambda model: galore(model, subspan.GaLoreLion),
    "GaLoreSGD": lambda model: galore(model, subspan.GaLoreSGD),
    "AdamW": adamw,
    "SGD": sgd,
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        tokens = torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(1, 1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of weights, buffers, state and random number state: what a load may change."""
    tensors = {name: X.clone() for name, X in model.state_dict().items()}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        tensors |= {f"{i} {key}": X.clone() for key, X in optimizer.state.get(p, {}).items()}
    return tensors | {"rng": torch.get_rng_state()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, X in ours.items():
        assert X.dtype == theirs[name].dtype, name
        assert torch.equal(X, theirs[name]), name


def write(folder: Path, *steps: int, keep: int = 9, width: int = 8) -> SimpleNamespace:
    """A model and a GaLoreAdamW, trained a little, saved at each of `steps`."""
    model = Tiny(width)
    run = SimpleNamespace(model=model, optimizer=galore(model), said=[])
    run.checkpointer = Checkpointer(folder, keep=keep, say=run.said.append)
    for step in steps:
        train(model, run.optimizer, range(step, step + 1))
        run.checkpointer.save(step, model, run.optimizer, {"tokens": 24 * step})
    run.checkpointer.wait()
    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loaded_run_goes_on_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = Tiny(dtype=dtype)
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, range(3))
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(3, model, optimizer, {"position": 12, "loss": 0.1 + 0.2, "text": ["a", None]})
    saved = everything(model, optimizer)
    losses = train(model, optimizer, range(3, 8))
    checkpointer.wait()

    torch.manual_seed(2)
    other = Tiny(dtype=dtype)
    again = OPTIMIZERS[name](other)
    progress = load(tmp_path / "step_00000003", other, again)
    assert progress == {"position": 12, "loss": 0.1 + 0.2, "text": ["a", None], "step": 3}
    assert_same(everything(other, again), saved)
    assert other.head.weight is other.embedding.weight
    assert train(other, again, range(3, 8)) == losses
    assert_same(everything(other, again), everything(model, optimizer))


@pytest.mark.parametrize("build", [galore, adamw])
def test_state_of_a_run_that_went_further_is_replaced(tmp_path: Path, build: Any) -> None:
    """A checkpoint from before the first step: torch's AdamW has no state there."""
    model = Tiny()
    optimizer = build(model)
    begin = everything(model, optimizer)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(0, model, optimizer, {})
    checkpointer.wait()
    losses = train(model, optimizer, range(3))
    load(tmp_path / "step_00000000", model, optimizer)
    assert_same(everything(model, optimizer), begin)
    assert train(model, optimizer, range(3)) == losses


@pytest.mark.parametrize("build", [galore, adamw])
def test_moments_in_fp32_of_weights_in_bf16_keep_their_bits(tmp_path: Path, build: Any) -> None:
    model = Tiny(dtype=torch.bfloat16)
    optimizer = build(model)
    train(model, optimizer, range(1))
    for state in optimizer.state.values():
        state["exp_avg"] = torch.rand_like(state["exp_avg"], dtype=torch.float32)
    saved = everything(model, optimizer)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, model, optimizer, {})
    checkpointer.wait()
    other = Tiny(dtype=torch.bfloat16)
    again = build(other)
    load(tmp_path / "step_00000001", other, again)
    assert_same(everything(other, again), saved)
    assert {state["exp_avg"].dtype for state in again.state.values()} == {torch.float32}


def test_settings_of_the_optimizer_stay_the_current_ones(tmp_path: Path) -> None:
    write(tmp_path, 3)
    model = Tiny()
    optimizer = galore(model)
    for group in optimizer.param_groups:
        group["lr"], group["update_proj_gap"] = 0.5, 7
    load(tmp_path / "step_00000003", model, optimizer)
    assert {(group["lr"], group["update_proj_gap"]) for group in optimizer.param_groups} == {(0.5, 7)}


def test_the_random_numbers_go_on(tmp_path: Path) -> None:
    run = write(tmp_path)
    run.checkpointer.save(1, run.model, run.optimizer, {})
    expected = torch.rand(5)
    run.checkpointer.wait()
    load(tmp_path / "step_00000001", run.model, run.optimizer)
    assert torch.equal(torch.rand(5), expected)


class AnyTensors(nn.Module):
    """A buffer of every dtype in shapes (2, 3), (), (0, 4), and one that is not contiguous."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, 2, generator=draw).t())
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
        ):
            for shape in ((2, 3), (), (0, 4)):
                X = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=draw).to(dtype)
                self.register_buffer(f"{dtype}_{len(shape)}_{X.numel()}".replace(".", "_"), X)


def test_every_dtype_and_shape_survives(tmp_path: Path) -> None:
    model, other = AnyTensors(0), AnyTensors(1)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, model, sgd(model), {})
    checkpointer.wait()
    load(tmp_path / "step_00000001", other, sgd(other))
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


# ------------------------------------------------------------------------------------------------------ the files


def test_what_a_checkpoint_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors files of limited size, JSON and sums that sha256sum reads: nothing is a pickle."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 1000)
    write(tmp_path, 3)
    path = tmp_path / "step_00000003"
    tensors: dict[str, Tensor] = {}
    files = sorted(path.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as stored:
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        assert sum(X.nbytes for X in found.values()) <= 1000 or len(found) == 1
        tensors |= found
    assert len(files) > 2
    assert names(path) == ["SHA256SUMS", "manifest.json", *(file.name for file in files)]

    assert "model.embedding.weight" in tensors
    assert "model.head.weight" not in tensors  # tied: once
    assert "model.seen" in tensors
    assert "model.passing" not in tensors
    assert "optimizer.layers.0.weight.basis" in tensors
    assert "rng.cpu" in tensors
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest == verify(path)
    assert {name: [str(X.dtype), list(X.shape)] for name, X in tensors.items()} == {
        name: [f"torch.{dtype}", shape] for name, (dtype, shape) in manifest["tensors"].items()
    }
    assert manifest["step"] == 3
    assert manifest["progress"] == {"tokens": 72}
    assert manifest["optimizer"]["rule"] == "Adam"
    assert manifest["optimizer"]["projected"]["layers.0.weight"] == [3, "std", "matrix"]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, check=True, capture_output=True)


def damage(path: Path, draw: random.Random) -> str:
    """One accident to one file; returns what it was."""
    data = path.read_bytes()
    kind = draw.choice(["flip", "flip", "flip", "truncate", "append", "delete"])
    place = draw.randrange(len(data))
    if kind == "flip":
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])
    elif kind == "truncate":
        path.write_bytes(data[:place])
    elif kind == "append":
        path.write_bytes(data + b"\n")
    else:
        path.unlink()
    return f"{kind} {path.name} at {place}"


def test_no_accident_to_any_file_goes_unnoticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 3000)
    run = write(tmp_path, 1, 2)
    before = everything(run.model, run.optimizer)
    older, path = tmp_path / "step_00000001", tmp_path / "step_00000002"
    assert newest(tmp_path) == path
    files = sorted(path.iterdir())
    assert len(files) >= 4
    draw = random.Random(0)
    for case in range(200):
        file = files[case % len(files)]
        data = file.read_bytes()
        what = damage(file, draw)
        with pytest.raises(ValueError, match=r"checkpoint .*step_00000002") as error:
            load(path, run.model, run.optimizer)
        assert "\n" not in str(error.value), what
        assert_same(everything(run.model, run.optimizer), before)
        said: list[str] = []
        assert newest(tmp_path, said.append) == older, what
        assert len(said) == 1
        assert "step_00000002" in said[0]
        file.write_bytes(data)
    assert newest(tmp_path) == path


@pytest.mark.parametrize("extra", ["file", "folder"])
def test_what_does_not_belong_there_is_no_checkpoint(tmp_path: Path, extra: str) -> None:
    write(tmp_path, 1)
    path = tmp_path / "step_00000001"
    (path / "more").mkdir() if extra == "folder" else (path / "more").write_text("")
    with pytest.raises(ValueError, match="more"):
        verify(path)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None
    assert newest(tmp_path) is None
    (tmp_path / "step_00000001").mkdir()
    said: list[str] = []
    assert newest(tmp_path, said.append) is None
    assert "cannot be read, No such file or directory (SHA256SUMS)" in said[0]


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    run = write(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(ValueError, match="has format 2, this subspan reads 1"):
        load(tmp_path / "step_00000001", run.model, run.optimizer)


# -------------------------------------------------------------------------------------------------- what does not fit


MISMATCHES = {
    "other width": (lambda: Tiny(12), galore, r"another model: model.embedding.weight is float32 \(20, 8\) in it"),
    "other dtype": (lambda: Tiny(dtype=torch.bfloat16), galore, "another model: .* bfloat16 .* here: build the model"),
    "fewer layers": (lambda: Tiny(layers=1), galore, "another model: model.layers.1.weight is .* missing here"),
    "more layers": (lambda: Tiny(layers=3), galore, "another model: model.layers.2.weight is missing in it"),
    "other rank": (Tiny, lambda model: galore(model, rank=4), "layers.0.weight is of rank 3, .* of rank 4"),
    "other side": (Tiny, lambda model: galore(model, proj_type="left"), "proj_type std, .* proj_type left"),
    "other rule": (Tiny, OPTIMIZERS["GaLoreLion"], "another optimizer: rule is Adam in it, Lion here: build"),
    "other state": (Tiny, OPTIMIZERS["GaLoreAdamW bf16 state"], "exp_avg is float32 .* in it, bfloat16"),
    "torch's": (Tiny, adamw, "another optimizer: rule is Adam in it, AdamW here"),
    "dense": (Tiny, lambda model: galore(model, rank=None), "layers.0.weight is of rank 3, .* in it, missing here"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_another_model_or_optimizer_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1)
    build_model, build, message = MISMATCHES[name]
    model = build_model()
    optimizer = build(model)
    train(model, optimizer, range(2))
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "step_00000001", model, optimizer)
    assert "\n" not in str(error.value)
    assert_same(everything(model, optimizer), before)


def test_parameters_that_only_one_optimizer_trains(tmp_path: Path) -> None:
    model = Tiny()
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, model, optimizer, {})
    checkpointer.wait()
    part = torch.optim.AdamW(model.layers.parameters())
    with pytest.raises(ValueError, match=r"optimizer.embedding.weight.* missing here: build the optimizer"):
        load(tmp_path / "step_00000001", model, part)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = Tiny()
    checkpointer = Checkpointer(tmp_path, keep=1)
    with pytest.raises(ValueError, match=r"shape .8, 8. that is no parameter of the model: give the model"):
        checkpointer.save(1, nn.Linear(2, 2), galore(model), {})
    with pytest.raises(ValueError, match=r"progress is no JSON .*Tensor"):
        checkpointer.save(1, model, galore(model), {"loss": torch.zeros(())})
    optimizer = adamw(model)
    optimizer.state[model.layers[0].bias]["step"] = 3
    with pytest.raises(ValueError, match=r"optimizer.layers.0.bias.step is of type int"):
        checkpointer.save(1, model, optimizer, {})
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match="keep=0 must be"):
        Checkpointer(tmp_path, keep=0)


def test_an_old_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.8.0+cu128")
    checkpoint._engine.cache_clear()
    with pytest.raises(ValueError, match=r"need torch 2.9 or newer.*this is 2.8.0\+cu128"):
        Checkpointer(tmp_path, keep=1)


# -------------------------------------------------------------------------------------------- how many, and when


def test_the_newest_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4, 5, keep=2)
    assert names(tmp_path) == ["step_00000004", "step_00000005"]


def test_a_broken_checkpoint_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    (tmp_path / "step_00000002" / "manifest.json").write_text("{}")
    write(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003"]
    write(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]


def test_a_run_that_was_set_back_does_not_delete_what_it_writes(tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    write(tmp_path, 15, keep=1)
    assert names(tmp_path) == ["step_00000015", "step_00000020"]
    run = write(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step_00000020"]
    load(tmp_path / "step_00000020", run.model, run.optimizer)


def test_a_new_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    for name in (
        ".step_00000003.tmp",
        ".step_00000001.gone",
        ".step_00000002.old",
        "step_00000002",
        ".other",
        ".step_notes",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    write(tmp_path)
    assert names(tmp_path) == [".other", ".step_notes", "step_00000002"]


def test_a_checkpoint_hidden_to_be_replaced_comes_back(tmp_path: Path) -> None:
    """A run killed between the two renames of a checkpoint that is written again."""
    write(tmp_path, 1, 2)
    (tmp_path / "step_00000002").rename(tmp_path / ".step_00000002.old")
    (tmp_path / ".step_00000003.gone").mkdir()
    assert newest(tmp_path) == tmp_path / "step_00000002"
    assert names(tmp_path) == [".step_00000003.gone", "step_00000001", "step_00000002"]


def test_a_save_is_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while the writer waits; what it writes is from before."""
    go, real = threading.Event(), checkpoint._write_tensors
    monkeypatch.setattr(checkpoint, "_write_tensors", lambda *args: go.wait(60) and real(*args))
    run = write(tmp_path)
    train(run.model, run.optimizer, range(2))
    saved, progress = everything(run.model, run.optimizer), {"tokens": [1]}
    run.checkpointer.save(2, run.model, run.optimizer, progress)
    train(run.model, run.optimizer, range(2, 5))
    progress["tokens"].append(2)
    assert newest(tmp_path) is None
    go.set()
    run.checkpointer.wait()
    assert load(tmp_path / "step_00000002", run.model, run.optimizer) == {"tokens": [1], "step": 2}
    assert_same(everything(run.model, run.optimizer), saved)


def test_without_memory_for_a_copy_it_writes_at_once_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "available_memory", lambda: 1000)
    run = write(tmp_path)
    for step in (1, 2):
        run.checkpointer.save(step, run.model, run.optimizer, {})
        assert newest(tmp_path) == tmp_path / f"step_{step:08d}"  # before any wait
    assert len(run.said) == 1
    assert "does not fit into free host memory" in run.said[0]
    load(tmp_path / "step_00000002", run.model, run.optimizer)
    monkeypatch.setattr(checkpoint, "available_memory", lambda: None)
    run.checkpointer.save(3, run.model, run.optimizer, {})
    run.checkpointer.wait()
    assert newest(tmp_path) == tmp_path / "step_00000003"


# ------------------------------------------------------------------------------------------------- a disk that is full


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_after(files: int) -> Any:
    """torch's way to open a file to write, on a disk that has room for so many."""
    opened = itertools.count()

    def create_stream(self: object, path: Path, mode: str) -> Any:
        return open(path, mode) if next(opened) < files else no_space()

    return create_stream


@pytest.mark.parametrize("room", [1000, None])
@pytest.mark.parametrize("where", ["tensors", "sums", "rename"])
def test_a_save_that_fails_costs_nothing_but_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, room: int | None
) -> None:
    """Written by the thread, or at once for want of memory."""
    monkeypatch.setattr(checkpoint, "available_memory", lambda: room)
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 1000)
    run = write(tmp_path, 1, keep=1)
    run.said.clear()
    with monkeypatch.context() as patch:
        if where == "tensors":
            patch.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", full_after(2))
        elif where == "sums":
            patch.setattr(checkpoint, "_sums", no_space)
        else:
            patch.setattr(Path, "rename", no_space)
        run.checkpointer.save(2, run.model, run.optimizer, {})
        for _ in range(2):
            with pytest.raises(OSError, match=r"step 2 .* No space left on device: .*step_00000001 is intact"):
                run.checkpointer.wait()
    assert names(tmp_path) == ["step_00000001"]
    assert newest(tmp_path) == tmp_path / "step_00000001"
    run.checkpointer.save(3, run.model, run.optimizer, {})
    run.checkpointer.wait()
    assert names(tmp_path) == ["step_00000003"]
    assert len(run.said) == (room == 1000)  # else wait() was the first to tell


def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rename = write(tmp_path, 1), Path.rename
    written = (tmp_path / "step_00000001" / "SHA256SUMS").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda path, to: no_space() if path.suffix == ".tmp" else rename(path, to))
        run.checkpointer.save(1, run.model, run.optimizer, {"tokens": "others"})
        with pytest.raises(OSError, match="No space left"):
            run.checkpointer.wait()
    assert names(tmp_path) == ["step_00000001"]
    assert verify(tmp_path / "step_00000001")["progress"] == {"tokens": 24}
    assert (tmp_path / "step_00000001" / "SHA256SUMS").read_text() == written


def test_a_failed_save_is_said_once_and_in_the_thread_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write(tmp_path)
    threads: list[threading.Thread] = []
    run.checkpointer.say = lambda line: (run.said.append(line), threads.append(threading.current_thread()))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_tensors", no_space)
        run.checkpointer.save(1, run.model, run.optimizer, {})
        run.checkpointer._join()
        assert run.said == []
    run.checkpointer.save(2, run.model, run.optimizer, {})
    run.checkpointer.save(3, run.model, run.optimizer, {})
    run.checkpointer.wait()
    assert len(run.said) == 1
    assert f"what {tmp_path} had is untouched" in run.said[0]
    assert threads == [threading.current_thread()]
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


PRELUDE = """
import os, random, resource, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from subspan.training.checkpoint import Checkpointer, load, newest
torch.set_num_threads(1)
folder = Path(sys.argv[1])
model = nn.Linear(64, 64)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
"""

FULL = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write past the limit is an error
checkpointer = Checkpointer(folder, keep=2)
checkpointer.save(1, model, optimizer, {})
checkpointer.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
checkpointer.save(2, model, optimizer, {})
try:
    checkpointer.wait()
except OSError as error:
    print(error)
print(sorted(os.listdir(folder)))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpointer.save(3, model, optimizer, {})
checkpointer.wait()
print(sorted(os.listdir(folder)), newest(folder).name)
"""

KILL = """
draw = random.Random(0)
nn.init.constant_(model.weight, 0)
for life in range(8):
    child = os.fork()
    if not child:
        path = newest(folder)
        step = load(path, model, optimizer)["step"] if path else 0
        checkpointer = Checkpointer(folder, keep=2)
        while True:
            step += 1
            nn.init.constant_(model.weight, step)
            checkpointer.save(step, model, optimizer, {"life": life})
    before = set(os.listdir(folder))
    while not any(name.startswith("step_") for name in set(os.listdir(folder)) - before):
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = []
    path = newest(folder, said.append)
    assert not said, said
    step = load(path, model, optimizer)["step"]
    assert (model.weight == step).all() and path.name == f"step_{step:08d}"
print(len([name for name in os.listdir(folder) if name.startswith("step_")]), step >= 8)
"""


def run_script(folder: Path, script: str) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-c", PRELUDE + script, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_file_that_the_system_will_not_let_grow(tmp_path: Path) -> None:
    failure, after, later = run_script(tmp_path, FULL)
    assert "checkpoint of step 2 could not be written, File too large" in failure
    assert after == "['step_00000001']"
    assert later == "['step_00000001', 'step_00000003'] step_00000003"


def test_a_run_that_is_killed_leaves_whole_checkpoints(tmp_path: Path) -> None:
    (line,) = run_script(tmp_path, KILL)
    assert line in ("2 True", "3 True")  # three where it was killed between the rename and the deletion
