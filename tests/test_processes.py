"""`subspan train` on several processes: same losses and weights as on one, and checkpoints that any number of them continues."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, write_text

from subspan.options import parse_train
from subspan.training import trainer
from subspan.training.config import ParallelConfig, RunConfig, TrainConfig
from subspan.training.processes import leave_group
from subspan.training.resume import Stopped
from subspan.training.trainer import train

RUN = {"batch_size": 8, "steps": 6, "eval_every": 3, "checkpoint_every": 3, "warmup_steps": 1, "export": True}
CASES: dict[str, dict[str, Any]] = {
    "project": {"optim": {"update_proj_gap": 2, "max_grad_norm": 0.5}, "run": {"micro_batch": 2}},
    "update": {"optim": {"gradients": "update", "update_proj_gap": 2}},
    "int8": {"optim": {"preset": "galore8bit", "update_proj_gap": 2}},
    "fira": {"optim": {"preset": "fira", "update_proj_gap": 2}},
    "subspan": {"optim": {"preset": "subspan"}},
    "adamw": {"optim": {"preset": "adamw", "lr": 0.003}, "run": {"profile": 2}},
}


def configure(folder: Path, case: str, shard: int, replicate: int, run: dict[str, Any] | None = None) -> TrainConfig:
    changes = CASES[case]
    config = tiny_config(
        folder, optim={"lr": 0.005, **changes["optim"]}, run={**RUN, **changes.get("run", {}), **(run or {})}
    )
    config.parallel = ParallelConfig(shard, replicate, check_every=2 if replicate > 1 else 0)
    config.__post_init__()
    return config


def stop_after(step: int) -> None:
    """A SIGTERM, to this process alone, in the middle of `step`."""
    factor = trainer.lr_factor

    def stopping(now: int, run: RunConfig) -> float:
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return factor(now, run)

    trainer.lr_factor = stopping


def worker(rank: int, port: int, configs: list[TrainConfig], last: int | None) -> None:
    torch.set_num_threads(1)
    if last is not None and rank == configs[0].parallel.count - 1:
        stop_after(last)
    count = configs[0].parallel.count
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="localhost")
    os.environ["MASTER_PORT"] = str(port)
    torch.distributed.init_process_group("gloo")  # for all of them: torchrun's processes join and leave once
    with contextlib.redirect_stdout(None):
        for config in configs:
            if last is None:
                train(config)
            else:
                with pytest.raises(Stopped):
                    train(config)
    leave_group()


def together(configs: list[TrainConfig], last: int | None = None) -> None:
    """Train each, all on the same processes; up to step `last`, if given."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, configs, last), nprocs=configs[0].parallel.count)


def found(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "tokens", "loss", "valid_loss", "grad_norm", "lr")
    metrics = [{key: line[key] for key in kept if key in line} for line in lines]
    return metrics, load_file(folder / "model" / "model.safetensors"), json.loads((folder / "summary.json").read_text())


def check_same(one: Path, many: Path, atol: float = 1e-5) -> None:
    (metrics, weights, summary), (others, other_weights, other_summary) = found(one), found(many)
    assert len(others) == len(metrics)
    for line, other in zip(metrics, others, strict=True):
        assert other == pytest.approx(line, rel=1e-5, abs=atol)
    assert other_weights.keys() == weights.keys()
    for name, W in weights.items():
        torch.testing.assert_close(other_weights[name], W, rtol=0, atol=atol)
    assert other_summary["tokens"] == summary["tokens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the run of every case on one process, in one_CASE."""
    folder = tmp_path_factory.mktemp("processes")
    write_text(folder)
    for case in CASES:
        train(configure(folder, case, 1, 1, {"out": str(folder / f"one_{case}")}))
    return folder


LAYOUTS = {"shards": (2, 1), "copies": (1, 2)}
PAIRS = [(case, name) for case in CASES for name in LAYOUTS if (case, name) != ("update", "copies")]


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    together([configure(folder, case, *LAYOUTS[name], {"out": str(folder / f"{name}_{case}")}) for case, name in PAIRS])
    return folder


@pytest.mark.parametrize(("case", "layout"), PAIRS)
def test_two_processes_train_as_one(two: Path, case: str, layout: str) -> None:
    check_same(two / f"one_{case}", two / f"{layout}_{case}", atol=1e-3 if case == "int8" else 1e-4)
    share = [found(two / f"{name}_{case}")[2]["bytes"]["moments"] for name in ("one", layout)]
    assert share[1] / share[0] == pytest.approx(0.5 if layout == "shards" else 1, rel=0.1)
    if case == "adamw":
        assert len(json.loads((two / f"{layout}_{case}" / "profile.json").read_text())["steps"]) == 2


def test_a_checkpoint_goes_on_with_another_number_of_processes(folder: Path) -> None:
    """Two steps on four processes, two on two, two on one: the unbroken run on one."""
    out = folder / "resharded"
    for shard, replicate, last in ((2, 2, 2), (2, 1, 4), (1, 1, None)):
        config = configure(folder, "project", shard, replicate, {"out": str(out)})
        config.resume = "auto"
        if last is None:
            train(config)
        else:
            together([config], last)
    check_same(folder / "one_project", out)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--parallel.shard", "2"], "parallel.shard=2 times parallel.replicate=1 is not 1, the number of processes"),
        (["--parallel.shard", "0"], "parallel.shard=0 must be a whole number"),
        (["--parallel.shard", "3"], "run.batch_size=16 is no multiple of 3 processes"),
        (["--parallel.replicate", "2", "--run.diagnostics", "true"], "run.diagnostics=True works on one process alone"),
        (["--parallel.shard", "2", "--optim.preset", "qgalore"], "model.int8=True works on one process alone"),
        (
            ["--parallel.replicate", "2", "--optim.preset", "adamw", "--optim.gradients", "update"],
            "use optim.gradients=hold, or --parallel.shard",
        ),
    ],
)
def test_what_does_not_fit_is_refused(words: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        train(parse_train(["train", *words]))
