"""Training inside Trainer, SFTTrainer, Accelerate, Lightning and a plain loop, as the files of examples/ do it: the steps are
those of `subspan train` on the same batches, learning rate and norm the real ones, and a run that goes on is the unbroken one."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import random
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy
import pytest
import torch
from tiny import tiny_config

from subspan.training.data import make_loader
from subspan.training.models import build_model
from subspan.training.text import load_data, tokenizer_name
from subspan.training.trainer import train

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = 8
SETTINGS = {"batch_size": 2, "accumulation": 2, "lr": 0.02, "rank": 8, "gap": 3, "save_every": 4}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Expected:
    """A run of `subspan train`, its batches as rows, its model before the first step, and its log."""

    def __init__(self, folder: Path, warmup: int) -> None:
        self.config = tiny_config(
            folder,
            optim={"max_grad_norm": 1.0, "update_proj_gap": 3},
            run={"warmup_steps": warmup, "min_lr_ratio": 1.0, "micro_batch": 2, "batch_size": 4, "steps": STEPS},
        )
        train(self.config)
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        self.log = [line for line in lines if "loss" in line]
        self.corpus = load_data(self.config.data, tokenizer_name(self.config))
        loader = make_loader(self.corpus.train, batch_size=2, seed=self.config.run.seed, start=0)
        self.rows = [
            {name: batch[name][i].tolist() for name in ("input_ids", "labels")}
            for batch in itertools.islice(loader, 2 * STEPS)
            for i in range(2)
        ]

    def model(self) -> Any:
        torch.manual_seed(self.config.run.seed)
        model = self.config.model
        return build_model(model.name, vocab_size=len(self.corpus.tokenizer), seq_len=32, overrides=model.overrides)

    def agrees(self, history: list[dict[str, float]], first: int = 0) -> None:
        assert len(history) == STEPS - first
        for ours, theirs in zip(self.log[first:], history, strict=True):
            lr = theirs.get("lr", theirs.get("learning_rate"))
            assert (lr, theirs["loss"]) == pytest.approx((ours["lr"], ours["loss"]), rel=1e-5)
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-5)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return Expected(tmp_path_factory.mktemp("expected"), warmup=3)


@pytest.fixture(scope="module")
def constant(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """transformers' warm-up starts from a learning rate of 0, that of `subspan train` does not: this has none."""
    return Expected(tmp_path_factory.mktemp("constant"), warmup=0)


def forget_random_numbers() -> None:
    """A process that goes on has others."""
    random.seed(7)
    numpy.random.seed(7)
    torch.manual_seed(7)


LOOPS = ("plain_pytorch", "accelerate_loop", "lightning_module")


@pytest.mark.parametrize("name", LOOPS)
def test_loops_take_the_steps_of_subspan_train_and_go_on_exactly(name: str, expected: Expected, tmp_path: Path) -> None:
    run = example(name).train
    unbroken = expected.model()
    expected.agrees(run(unbroken, expected.rows, str(tmp_path / "a"), steps=STEPS, **SETTINGS, warmup=3))
    first, second = expected.model(), expected.model()
    run(first, expected.rows, str(tmp_path / "b"), steps=4, **SETTINGS, warmup=3)
    forget_random_numbers()
    expected.agrees(run(second, expected.rows, str(tmp_path / "b"), steps=STEPS, **SETTINGS, warmup=3), first=4)
    for ours, theirs in zip(unbroken.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


IN_ORDER = {"train_sampling_strategy": "sequential", "seed": 0, "warmup": 0}


def test_trainer_takes_the_steps_of_subspan_train_and_goes_on_exactly(constant: Expected, tmp_path: Path) -> None:
    run = functools.partial(example("trainer").train, **IN_ORDER)
    unbroken = constant.model()
    constant.agrees(run(unbroken, constant.rows, str(tmp_path), steps=STEPS, **SETTINGS))
    for path in ("metrics.jsonl", "checkpoint-8"):
        (tmp_path / path).rename(tmp_path / f"unbroken-{path}")
    second = constant.model()
    forget_random_numbers()
    log = run(second, constant.rows, str(tmp_path), steps=STEPS, resume=True, **SETTINGS)
    constant.agrees(log)
    for ours, theirs in zip(unbroken.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    states = [torch.load(tmp_path / f"{c}/optimizer.pt", weights_only=True)["state"] for c in CHECKPOINTS]
    for key, state in states[0].items():
        assert all(torch.equal(X, states[1][key][name]) for name, X in state.items())


CHECKPOINTS = ("unbroken-checkpoint-8", "checkpoint-8")


def test_sft_trainer_takes_the_steps_of_subspan_train(constant: Expected, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in constant.rows])
    more = {**IN_ORDER, "packing": False, "max_length": None, "bf16": False}
    run = functools.partial(example("sft").train, rows=rows, tokenizer=constant.corpus.tokenizer, **SETTINGS, **more)
    unbroken, second = constant.model(), constant.model()
    constant.agrees(run(unbroken, out=str(tmp_path), steps=STEPS))
    shutil.rmtree(tmp_path / "checkpoint-8")
    forget_random_numbers()
    constant.agrees(run(second, out=str(tmp_path), steps=STEPS, resume=True))
    for ours, theirs in zip(unbroken.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
