"""A run that was stopped or killed goes on as if nothing had happened: bit for bit, through `train` and the command line."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, write_tokenizer
from torch import nn

import subspan
from subspan.cli import main
from subspan.optim import quant
from subspan.training import trainer
from subspan.training.checkpoint import Checkpointer, load
from subspan.training.config import TrainConfig, save_config
from subspan.training.evaluation import evaluate
from subspan.training.optimizers import build_optimizer
from subspan.training.resume import Stopped, StopSignal
from subspan.training.trainer import train

RULES = {"adam": subspan.Adam(), "adafactor": subspan.Adafactor(), "lion": subspan.Lion(), "sgd": subspan.SGDMomentum()}
PROJECTORS = {
    "svd": subspan.SVD(),
    "randomized_svd": subspan.RandomizedSVD(),
    "subspace_iteration": subspan.SubspaceIteration(),
    "random": subspan.Random(),
}
STATES = {
    "fp32": {"state_dtype": torch.float32},
    "bf16": {"state_dtype": torch.bfloat16},
    "int8, rounded": {"state_dtype": torch.int8, "stochastic_rounding": True},
    "int4, basis int4": {"state_dtype": torch.int4, "basis_dtype": torch.int4},
}
CASES = [
    case
    for case in itertools.product(("hold", "project", "update"), RULES, PROJECTORS, STATES)
    if not (case[1] == "adafactor" and case[3].startswith("int"))
]


# ------------------------------------------------------------------------------- every mode, rule, projector, state dtype


@pytest.fixture(autouse=True)
def _no_tensor_is_too_small_for_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant, "MIN_ELEMENTS", 0)


def build(gradients: str, rule: str, projector: str, state: str) -> tuple[nn.Module, subspan.ProjectedOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Dropout(0.1), nn.Linear(10, 4)).to(torch.bfloat16)
    optimizer = subspan.ProjectedOptimizer(
        [{"params": [model[0].weight, model[2].weight], "rank": 3, "update_proj_gap": 3}, {"params": [model[0].bias]}],
        0.05,
        rule=RULES[rule],
        projector=PROJECTORS[projector],
        gradients=gradients,
        **STATES[state],
    )
    return model, optimizer


def steps(model: nn.Module, optimizer: subspan.ProjectedOptimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        X = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).bfloat16()
        loss = model(X).float().square().mean()  # with dropout: the random number state is part of a run
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("gradients", "rule", "projector", "state"), CASES)
def test_a_checkpoint_continues_bit_for_bit(
    tmp_path: Path, gradients: str, rule: str, projector: str, state: str
) -> None:
    """Stopped after one of the steps 1 to 9, another for each case: over three refreshes and between them."""
    case = (gradients, rule, projector, state)
    stop = 1 + CASES.index(case) % 9
    straight = build(*case)
    torch.manual_seed(1)
    losses = steps(*straight, 0, 10)

    model, optimizer = build(*case)
    torch.manual_seed(1)
    seen = steps(model, optimizer, 0, stop)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(stop, model, optimizer, {})
    checkpointer.wait()
    torch.manual_seed(2)
    model, optimizer = build(*case)
    assert load(tmp_path / f"step_{stop:08}", model, optimizer)["step"] == stop
    assert seen + steps(model, optimizer, stop, 10) == losses
    for p, q in zip(straight[0].parameters(), model.parameters(), strict=True):
        assert p.equal(q)
    ours, theirs = straight[1].state_dict()["state"], optimizer.state_dict()["state"]
    for index, state in ours.items():
        assert {key: value.dtype for key, value in state.items()} == {k: v.dtype for k, v in theirs[index].items()}
        assert all(value.equal(theirs[index][key]) for key, value in state.items())


# ----------------------------------------------------------------------------------------------------- through train


def config_of(folder: Path, **run: Any) -> TrainConfig:
    """26 steps of 4 sequences over a text of about 35: epochs end in the middle of a run, refreshes come every 5 steps."""
    return tiny_config(
        folder,
        data={"seq_len": 64},
        run={"steps": 26, "batch_size": 4, "micro_batch": 2, "export": True, "checkpoint_every": 0, **run},
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def log(run: Path) -> list[tuple[float, ...]]:
    """What does not depend on the machine's speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "tokens", "loss", "lr", "grad_norm", "skipped", "valid_loss")
    return [tuple(line[key] for key in keys if key in line) for line in lines]


def stop_after(step: int, number: int = signal.SIGTERM) -> Any:
    """A builder whose optimizer sends this process a signal in step `step`."""

    def builder(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        optimizer = build_optimizer(model, config)
        count = itertools.count(1)
        optimizer.register_step_post_hook(lambda *_: os.kill(os.getpid(), number) if next(count) == step else None)
        return optimizer

    return builder


def same_run(one: Path, other: Path) -> None:
    assert log(one) == log(other)
    theirs = weights(other)
    assert all(X.equal(theirs[name]) for name, X in weights(one).items())


@pytest.mark.parametrize(
    ("gradients", "preset"), [("hold", "galore"), ("project", "galore"), ("update", "galore"), ("project", "qgalore")]
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, gradients: str, preset: str) -> None:
    """Stopped twice, by SIGTERM and by Ctrl-C, inside an epoch and a refresh interval."""
    change = {"run": {"micro_batch": None}} if gradients == "update" else {"run": {}}
    configs = []
    for name in ("straight", "stopped"):
        config = config_of(tmp_path, out=str(tmp_path / name), eval_every=10, **change["run"])
        config.optim.gradients, config.optim.preset = gradients, preset  # type: ignore[assignment]
        config.optim.max_grad_norm = None if gradients == "update" else 1.0
        configs.append(config)
    train(configs[0])
    configs[1].resume = "auto"
    with pytest.raises(Stopped, match=r"stopped by SIGTERM after step 7 of 26, .*config.yaml --resume auto"):
        train(configs[1], stop_after(7))
    with pytest.raises(Stopped, match=r"SIGINT after step 18 "):
        train(configs[1], stop_after(11, signal.SIGINT))
    train(configs[1])
    same_run(tmp_path / "straight", tmp_path / "stopped")
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir() if path.name.startswith("step")]


def test_what_was_logged_behind_the_checkpoint_is_forgotten(tmp_path: Path) -> None:
    """As after kill -9: steps 9 to 13 were done and logged, the last line in part, the checkpoint is of step 8."""
    straight = config_of(tmp_path, out=str(tmp_path / "straight"))
    train(straight)
    config = config_of(tmp_path, checkpoint_every=4)

    def builder(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        optimizer = build_optimizer(model, config)
        count = itertools.count(1)

        def fail(*_: object) -> None:
            if next(count) == 11:
                raise MemoryError

        optimizer.register_step_pre_hook(fail)
        return optimizer

    with pytest.raises(MemoryError):
        train(config, builder)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    config.resume = "auto"
    train(config)
    same_run(tmp_path / "straight", tmp_path / "run")
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == config.run.keep_checkpoints


def test_a_broken_checkpoint_is_said_and_the_one_before_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, checkpoint_every=5)
    with pytest.raises(Stopped):
        train(config, stop_after(12))
    broken = tmp_path / "run" / "checkpoints" / "step_00000012"
    file = next(broken.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    config.resume = "auto"
    capsys.readouterr()
    train(config)
    said = capsys.readouterr().out
    assert "step_00000012" in said
    assert "resume: " in said
    assert "step_00000010" in said
    straight = config_of(tmp_path, out=str(tmp_path / "straight"))
    train(straight)
    same_run(tmp_path / "straight", tmp_path / "run")


def test_a_checkpoint_can_start_another_run(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(Stopped):
        train(config, stop_after(12))
    for name, resume in (("branch", tmp_path / "run"), ("twig", tmp_path / "run" / "checkpoints" / "step_00000012")):
        branch = config_of(tmp_path, out=str(tmp_path / name), steps=14)
        branch.resume = str(resume)
        train(branch)
        assert [line[0] for line in log(tmp_path / name)] == [13, 14, 14]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_finished_run_resumed_is_evaluated_again_and_can_be_extended(tmp_path: Path) -> None:
    config = config_of(tmp_path, checkpoint_every=100)
    first = train(config)
    config.resume = "auto"
    assert train(config)["valid_loss"] == first["valid_loss"]
    assert [line[0] for line in log(tmp_path / "run")] == [*range(1, 27), 26]  # one evaluation, made again
    config.run.steps = 30
    assert train(config)["steps"] == 30
    assert [line[0] for line in log(tmp_path / "run")] == [*range(1, 27), 26, *range(27, 31), 30]


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, steps=3, warmup_steps=1)
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run" / "config.yaml")
    config.resume = "auto"
    train(config)
    assert "no checkpoint yet, starting from the beginning" in capsys.readouterr().out


def test_a_run_killed_while_it_writes_its_first_file_starts_again(tmp_path: Path) -> None:
    config = config_of(tmp_path, steps=3, warmup_steps=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.new").touch()
    config.resume = "auto"
    train(config)
    assert not (tmp_path / "run" / "config.new").exists()


def test_the_folder_is_known_as_a_run_before_anything_else_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        assert (tmp_path / "run" / "config.yaml").exists()
        raise MemoryError

    config = config_of(tmp_path, steps=3, warmup_steps=1)
    config.resume = "auto"
    monkeypatch.setattr(trainer.RunLog, "__enter__", killed)
    with pytest.raises(MemoryError):
        train(config)
    monkeypatch.undo()
    train(config)


def test_a_signal_during_evaluation_does_not_wait_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(model: nn.Module, loader: Any, **kwargs: Any) -> Any:
        batches = iter(loader)
        next(batches)
        os.kill(os.getpid(), signal.SIGTERM)
        next(batches)
        raise AssertionError("went on")

    config = config_of(tmp_path, eval_every=4, micro_batch=1)
    monkeypatch.setattr(trainer, "evaluate", slow)
    with pytest.raises(Stopped, match="after step 4 "):
        train(config)
    config.resume = "auto"
    with pytest.raises(Stopped, match="after step 4 "):  # in the evaluation of step 4, which is made up for
        train(config)
    monkeypatch.setattr(trainer, "evaluate", evaluate)
    with pytest.raises(Stopped, match="after step 6 "):
        train(config, stop_after(2))
    assert [line[0] for line in log(tmp_path / "run")] == [1, 2, 3, 4, 4, 5, 6]
    config.run.eval_every = 0
    monkeypatch.setattr(trainer, "evaluate", slow)
    with pytest.raises(Stopped, match="after step 26 "):  # in the last evaluation
        train(config)
    monkeypatch.setattr(trainer, "evaluate", evaluate)
    assert train(config)["steps"] == 26


def test_a_second_ctrl_c_stops_at_once() -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with StopSignal(said.append):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert said == ["SIGINT: finishing this step and saving; Ctrl-C again stops at once"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, **{str(i): i + 1 for i in range(40)}}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "data").mkdir()
    for split, rows in (("train", 23), ("validation", 4)):
        texts = [{"text": " ".join(str((7 * i + j * j) % 40) for j in range(5 + i % 9))} for i in range(rows)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    for name in ("straight", "stopped"):
        config = tiny_config(
            tmp_path,
            data={
                "files": None,
                "dataset": str(tmp_path / "data"),
                "tokenizer": str(tmp_path / "tokenizer"),
                "seq_len": 8,
            },
            run={"out": str(tmp_path / name), "eval_sequences": 2},
        )
        if name == "stopped":
            with pytest.raises(Stopped):
                train(config, stop_after(9))
            config.resume = "auto"
        train(config)
    same_run(tmp_path / "straight", tmp_path / "stopped")


# ------------------------------------------------------------------------------------------------------------ errors


def test_resuming_what_is_not_the_same_run_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(Stopped):
        train(config, stop_after(3))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for section, key, value, message in (
        ("optim", "rank", 4, "is of another optimizer: projection of .* is of rank 8"),
        ("optim", "preset", "galore_lion", "optimizer"),
        ("optim", "proj_type", "reverse_std", "proj_type"),
        ("model", "dtype", "bfloat16", "model"),
        ("run", "seed", 1, "run.seed was 0 and is 1"),
        ("data", "seq_len", 48, "data.seq_len"),
        ("data", "valid_fraction", 0.2, "its text, of training or of validation, is another one"),
    ):
        other = config_of(tmp_path)
        setattr(getattr(other, section), key, value)
        other.resume = "auto"
        with pytest.raises(ValueError, match=message) as error:
            train(other)
        assert "\n" not in str(error.value)
    other = config_of(tmp_path, steps=2, warmup_steps=1)
    other.resume = "auto"
    with pytest.raises(ValueError, match=r"run.steps=2 is less than the 3 steps of .*: raise it"):
        train(other)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_that_goes_on_otherwise_says_so_and_keeps_what_it_was(tmp_path: Path, capsys: Any) -> None:
    config = config_of(tmp_path)
    with pytest.raises(Stopped):
        train(config, stop_after(3))
    before, lr = (tmp_path / "run" / "config.yaml").read_text(), config.optim.lr
    config.optim.lr, config.resume = lr / 2, "auto"
    train(config)
    assert f"resume: optim.lr was {lr} and is {lr / 2} from step 4 on" in capsys.readouterr().out
    assert (tmp_path / "run" / "config_to_step_3.yaml").read_text() == before


def test_a_change_whose_steps_were_lost_is_not_what_was(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(Stopped):
        train(config, stop_after(3))
    before = (tmp_path / "run" / "config.yaml").read_text()
    config.resume = "auto"
    for lr in (0.011, 0.012):
        config.optim.lr = lr

        def dies(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
            optimizer = build_optimizer(model, config)
            optimizer.register_step_post_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            return optimizer

        with pytest.raises(KeyboardInterrupt):
            train(config, dies)
    assert (tmp_path / "run" / "config_to_step_3.yaml").read_text() == before


def test_a_finished_run_without_a_checkpoint_of_its_end_is_not_made_again(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(Stopped):
        train(config, stop_after(3))
    config.resume = "auto"
    train(config)
    summary = (tmp_path / "run" / "summary.json").read_text()
    with pytest.raises(ValueError, match="is finished and has no checkpoint of its end"):
        train(config)
    assert (tmp_path / "run" / "summary.json").read_text() == summary
    config.run.steps = 30  # from the checkpoint that there is
    assert train(config)["steps"] == 30


def test_a_resume_that_names_nothing_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for resume, message in (("nowhere", "neither a checkpoint nor a run"), (str(tmp_path), "neither")):
        config.resume = resume
        with pytest.raises(ValueError, match=message):
            train(config)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    config.resume = str(tmp_path / "empty")
    with pytest.raises(ValueError, match="no good checkpoint"):
        train(config)
    with pytest.raises(Stopped):
        train(config_of(tmp_path, out=str(tmp_path / "real"), checkpoint_every=2), stop_after(5))
    other = config_of(tmp_path, out=str(tmp_path / "real"))
    other.resume = str(tmp_path / "real" / "checkpoints" / "step_00000004")
    with pytest.raises(ValueError, match="not the newest checkpoint"):
        train(other)
    for path in (tmp_path / "real" / "checkpoints").glob("step_*"):
        (path / "manifest.json").write_text("{}")
    other.resume = "auto"
    with pytest.raises(ValueError, match=r"no checkpoint in .* is good"):
        train(other)
    other = config_of(tmp_path, out=str(tmp_path / "finished"), steps=3, warmup_steps=1)
    train(other)
    other.resume = "auto"
    with pytest.raises(ValueError, match="is finished and has no checkpoint"):
        train(other)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("not ours")
    config.resume = "auto"
    with pytest.raises(ValueError, match="is not empty"):
        train(config)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "not ours"


# ---------------------------------------------------------------------------------------------------- not finite, full


@pytest.mark.parametrize("gradients", ["hold", "project", "update"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    tmp_path: Path, gradients: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss of steps 4 and 5 is nan: nothing changes in them, and a run that resumes after 4 counts on."""

    def builder(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        optimizer = build_optimizer(model, config)
        forward, count = model.forward, itertools.count(1)

        def spoiled(**inputs: Any) -> Any:
            result = forward(**inputs)
            if model.training and next(count) in (4, 5):
                before[:] = [p.detach().clone() for p in model.parameters()]
                states[:] = [X.clone() for state in optimizer.state.values() for X in state.values()]
                result.loss = result.loss * float("nan")
            elif before:
                after[:] = after or [p.detach().clone() for p in model.parameters()]
                states_after[:] = states_after or [X.clone() for s in optimizer.state.values() for X in s.values()]
            return result

        before: list[torch.Tensor] = []
        after: list[torch.Tensor] = []
        states: list[torch.Tensor] = []
        states_after: list[torch.Tensor] = []
        checks.append((before, after, states, states_after))
        model.forward = spoiled  # type: ignore[method-assign]
        return optimizer

    checks: list[Any] = []
    config = config_of(tmp_path, steps=8, micro_batch=None)
    config.optim.gradients = gradients  # type: ignore[assignment]
    summary = train(config, builder)
    (before, after, states, states_after) = checks[0]
    assert before
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))
    assert all(a.equal(b) for a, b in zip(states, states_after, strict=True))
    assert summary["skipped_steps"] == 2
    assert capsys.readouterr().out.count("skipped, nothing was updated") == 2
    assert [line[-1] for line in log(tmp_path / "run")[:8]] == [0, 0, 0, 1, 2, 2, 2, 2]


def test_a_disk_that_is_full_is_said_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Checkpointer._write

    def full(self: Checkpointer, step: int, *args: Any) -> None:
        if step in (10, 15):
            raise OSError(28, "No space left on device")
        write(self, step, *args)

    monkeypatch.setattr(Checkpointer, "_write", full)
    summary = train(config_of(tmp_path, checkpoint_every=5, steps=20, micro_batch=None))
    assert summary["steps"] == 20
    assert capsys.readouterr().out.count("No space left on device") == 2
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_00000005", "step_00000020"]


# ------------------------------------------------------------------------------------------------ logged = applied


@pytest.mark.parametrize("gradients", ["hold", "project"])
def test_the_logged_norm_and_learning_rate_are_those_applied(tmp_path: Path, gradients: str) -> None:
    """Against an independent computation: autograd on a copy of the model, the basis from the state, norms by hand."""
    seen: list[tuple[float, float]] = []
    config = config_of(tmp_path, steps=12, micro_batch=None)
    config.optim.gradients = gradients  # type: ignore[assignment]
    config.optim.max_grad_norm = 0.1

    def builder(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        optimizer = build_optimizer(model, config)
        raw: dict[torch.Tensor, torch.Tensor] = {}
        for p in model.parameters():  # tensor hooks see a gradient before the optimizer's hook takes it
            p.register_hook(lambda grad, p=p: raw.__setitem__(p, grad.detach().clone()))
        start: dict[torch.Tensor, torch.Tensor] = {}

        def before(*_: object) -> None:
            start.update({p: p.detach().clone() for p in model.parameters()})

        def after(*_: object) -> None:
            total = 0.0
            for p, G in raw.items():
                Q = optimizer.state[p].get("basis")  # after the refresh, if one was due
                A = G if Q is None else Q.mT @ (G if G.shape[0] < G.shape[1] else G.mT)  # std: the short side
                total += A.square().sum().item()
            # Adam's very first step moves a dense weight by lr times about one: what was applied is the logged rate.
            moved = (model.model.norm.weight - start[model.model.norm.weight]).abs().max().item()
            seen.append((total**0.5, moved))

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        return optimizer

    train(config, builder)
    lines = log(tmp_path / "run")[:12]
    for (norm, _), line in zip(seen, lines, strict=True):
        assert norm == pytest.approx(line[4], rel=1e-4)
        assert norm > 0.1  # clipped
    assert seen[0][1] == pytest.approx(lines[0][3], rel=1e-3)


# ------------------------------------------------------------------------------------------------------ command line


def test_the_command_line_stops_saves_and_goes_on(tmp_path: Path) -> None:
    """A process of its own, stopped by SIGTERM while it trains; resumed here with the command that it printed."""
    config = config_of(tmp_path, steps=400, warmup_steps=1, min_lr_ratio=1.0)  # the same rate, however many steps
    save_config(config, tmp_path / "recipe.yaml")
    words = ["train", "--config", str(tmp_path / "recipe.yaml"), "--resume", "auto"]
    process = subprocess.Popen(
        [sys.executable, "-m", "subspan", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 20/"):
            process.send_signal(signal.SIGTERM)
            break
    _, error = process.communicate()
    assert process.returncode == 143, error
    stopped = int(error.split("after step ")[1].split()[0])
    assert "all is saved; go on with: " in error
    assert "--resume auto" in error
    steps = stopped + 3
    main([*words, "--run.steps", str(steps), "--run.export", "false"])
    assert [line[0] for line in log(tmp_path / "run")] == [*range(1, steps + 1), steps]
    train(config_of(tmp_path, out=str(tmp_path / "straight"), steps=steps, warmup_steps=1, min_lr_ratio=1.0))
    assert log(tmp_path / "run") == log(tmp_path / "straight")


def test_a_run_that_was_extended_keeps_what_it_had_found(tmp_path: Path) -> None:
    """The last evaluation, where none is due, and the peak; but not the summary, until it ends again."""
    config = config_of(tmp_path, steps=10, eval_every=4, checkpoint_every=4)
    first = train(config)
    config.resume = "auto"
    again = train(config)
    assert again["peak_memory_bytes"] >= first["peak_memory_bytes"]
    config.run.steps = 14
    with pytest.raises(Stopped):
        train(config, stop_after(2))
    assert not (tmp_path / "run" / "summary.json").exists()
    train(config)
    assert [line[0] for line in log(tmp_path / "run") if len(line) == 3] == [4, 8, 10, 12, 14]


def test_another_tokenizer_of_the_same_text_is_refused(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "one", special=False)
    words = tokenizer.get_vocab()
    config = config_of(tmp_path, steps=2, warmup_steps=0, checkpoint_every=2)
    config.data.tokenizer, config.data.valid_fraction = str(tmp_path / "one"), 0.3
    train(config)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    file = tmp_path / "two" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {"cat": words["dog"], "dog": words["cat"]}
    file.write_text(json.dumps(content))
    config.resume, config.data.tokenizer, config.run.steps = "auto", str(tmp_path / "two"), 4
    with pytest.raises(ValueError, match=r"cannot be continued: tokens was .* and is "):
        train(config)
