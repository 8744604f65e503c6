"""`subspan.hf`: what `Trainer(optimizer_cls_and_kwargs=...)` gets, who clips, and what the callback leaves behind.

That the steps are those of `subspan train`, and resume is exact, is tests/test_integrations.py's part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import subspan
import subspan.compat
import subspan.hf
from subspan.optim.presets import PRESETS
from subspan.optim.refresh import Refresh
from subspan.report.page import plan_runs
from subspan.report.runs import durations, read_runs

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(0, 8, (32, 16), generator=torch.manual_seed(0))]


def arguments(out: Path, **given: Any) -> TrainingArguments:
    settings = {"learning_rate": 0.02, "lr_scheduler_type": "constant", "max_steps": 4, "logging_steps": 1}
    settings |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(str(out), **{**settings, **given})


def trainer(args: TrainingArguments, *callbacks: TrainerCallback, model: Any = None, **optim: Any) -> Trainer:
    if model is None:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    return Trainer(
        model=model,
        args=args,
        train_dataset=ROWS,
        eval_dataset=ROWS[:8],
        optimizer_cls_and_kwargs=subspan.hf.optimizer(args, **{"rank": 8, "update_proj_gap": 2, **optim}),
        callbacks=list(callbacks),
    )


def logged(made: Trainer, name: str) -> list[float]:
    return [line[name] for line in made.state.log_history if "loss" in line]


def trained(out: Path, *callbacks: TrainerCallback, optim: Any = None, **given: Any) -> Trainer:
    made = trainer(arguments(out, **given), *callbacks, **(optim or {}))
    made.train()
    return made


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(preset: str, tmp_path: Path) -> None:
    lr = {
        "galore_lion": 0.002,
        "frugal": 0.005,
        "sign_sgd": 0.002,
        "scale_sgd": 0.005,
        "apollo_mini": 0.002,
        "ldadam": 0.005,
    }
    made = trained(
        tmp_path, learning_rate=lr.get(preset, 0.02), optim={"preset": preset, "rank": 1 if "mini" in preset else 8}
    )
    losses = logged(made, "loss")
    assert losses[-1] < losses[0] - 0.05
    assert all(norm > 0 for norm in logged(made, "grad_norm"))


@pytest.mark.parametrize(
    ("preset", "modes"), [("muon", ("hold", "project", "update")), ("galore", ("project", "update"))]
)
def test_the_modes_of_gradients_take_the_same_steps(preset: str, modes: tuple[str, ...], tmp_path: Path) -> None:
    """Where bases start alike: those of `hold` come from the first gradient, those of the others are random."""
    found = [trained(tmp_path, max_grad_norm=0, optim={"preset": preset, "gradients": mode}) for mode in modes]
    for name in ("loss", "grad_norm"):
        for other in found[1:]:
            assert logged(other, name) == pytest.approx(logged(found[0], name), rel=1e-5)


def test_the_logged_rate_is_the_one_of_the_step(tmp_path: Path) -> None:
    class Rates(TrainerCallback):
        seen: list[float] = []  # noqa: RUF012

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            self.seen.append(optimizer.param_groups[0]["lr"])

    made = trained(
        tmp_path, Rates(), lr_scheduler_type="cosine", warmup_steps=2, max_steps=6, optim={"dense_lr": 0.005}
    )
    assert logged(made, "learning_rate") == Rates.seen
    assert max(Rates.seen) == 0.02
    assert [group["initial_lr"] for group in made.optimizer.param_groups] == [0.02, 0.005, 0.005]


def test_clipping_is_that_of_the_optimizer(tmp_path: Path) -> None:
    """Against a loop of its own with max_grad_norm, with refreshes and two micro-batches, and a rule that sees the difference."""
    made = trained(
        tmp_path,
        max_grad_norm=0.3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        optim={"preset": "galore_sgd"},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    groups = subspan.param_groups(model, rank=8, update_proj_gap=2, verbose=False)
    optimizer = subspan.GaLoreSGD(groups, lr=0.02, gradients="project", max_grad_norm=0.3, refresh=Refresh(seed=42))
    norms = []
    for step in range(4):
        ids = torch.stack([row["input_ids"] for row in ROWS[8 * step : 8 * step + 8]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        norms.append(optimizer.grad_norm.item())
        optimizer.zero_grad()
    assert min(norms) > 0.3
    assert logged(made, "grad_norm") == pytest.approx(norms, rel=1e-5)
    for ours, theirs in zip(model.parameters(), made.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_other_optimizers_are_clipped_as_before(tmp_path: Path) -> None:
    subspan.hf.clip_in_optimizer()
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(4, 3))
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=1.0))
    model(torch.ones(2, 4)).sum().backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert accelerator.clip_grad_norm_(model.parameters(), 0.1) == pytest.approx(expected.item())
    assert torch.stack([p.grad.norm() for p in model.parameters()]).norm().item() == pytest.approx(0.1, rel=1e-3)
    optimizer.step()


@pytest.mark.parametrize(
    ("given", "optim", "message"),
    [
        ({}, {"lr": 0.1}, "learning_rate for it, set it in TrainingArguments"),
        ({}, {"weight_decay": 0.1}, "Trainer has weight_decay"),
        ({}, {"max_grad_norm": 0.1}, "Trainer has max_grad_norm"),
        ({"optim_target_modules": ["attn"]}, {}, r"targets=\[...\]"),
        ({"optim_args": "rank=8"}, {}, "optim_args='rank=8' is for Trainer's own GaLore"),
        ({}, {"preset": "galor"}, "^preset='?galor"),
        ({}, {"ran": 3}, "ran=3 is no field of OptimConfig: rank is near"),
        ({}, {"rank": 0}, "^rank=0"),
        ({}, {"preset": "fira", "gradients": "project"}, "use gradients=hold"),
        (
            {"gradient_accumulation_steps": 2, "max_grad_norm": 0},
            {"gradients": "update"},
            "gradient_accumulation_steps=2",
        ),
        ({}, {"gradients": "update"}, "1.0 is Trainer's default"),
        ({"adam_beta1": 0.8}, {"preset": "muon"}, "betas="),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(
    given: Any, optim: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        subspan.hf.optimizer(arguments(tmp_path, **given), **optim)


def test_projected_gradients_leave_nothing_to_a_grad_scaler(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.fp16 = True  # which TrainingArguments refuses on a CPU
    assert subspan.hf.optimizer(args)
    with pytest.raises(ValueError, match="GradScaler"):
        subspan.hf.optimizer(args, gradients="project")


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_what_accelerate_launch_would_take_apart_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ValueError, match=f"ACCELERATE_USE_{name.upper()}=true takes parameters apart"):
        subspan.hf.optimizer(args)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_what_takes_parameters_apart_is_refused(name: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    setattr(args, name, "something")
    with pytest.raises(ValueError, match=f"{name}='something'"):
        subspan.hf.optimizer(args)


def test_betas_and_epsilon_come_from_trainer(tmp_path: Path) -> None:
    made = trainer(arguments(tmp_path, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1))
    rule = subspan.hf.projected(made.create_optimizer()).rule
    assert (rule.betas, rule.eps) == ((0.8, 0.95), 1e-6)
    assert [group["weight_decay"] for group in made.optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_int8_weights_are_refused(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    subspan.quantize_weights(model)
    with pytest.raises(ValueError, match="INT8 weights"):
        trainer(arguments(tmp_path), model=model).create_optimizer()


def test_a_compiled_model_takes_the_same_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = trained(tmp_path, max_steps=2)
    watch = subspan.hf.SubspanCallback()
    compiled = trained(tmp_path, watch, max_steps=2, torch_compile=True, torch_compile_backend="aot_eager")
    for name in ("loss", "grad_norm"):
        assert logged(compiled, name) == pytest.approx(logged(plain, name), rel=1e-4)
    assert "keeps every gradient alive" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert not any("tokens" in key for row in rows for key in row)  # none could be counted


def test_the_callback_leaves_a_run_that_can_be_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trained(tmp_path, subspan.hf.SubspanCallback(diagnostics=True), eval_strategy="steps", eval_steps=2)
    said = capsys.readouterr().out
    assert "projected: 14 tensors" in said
    assert "lr 0.02" in said
    assert "optimizer: moments" in said
    assert "memory  planned " in said
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["loss"] for row in steps] == logged(made, "loss")
    assert [row["grad_norm"] for row in steps] == logged(made, "grad_norm")
    assert [row["tokens"] for row in steps] == [128, 256, 384, 512]
    assert [row["step"] for row in rows if "valid_loss" in row] == [2, 4]
    refreshes = [(row["step"], line) for row in rows for line in row.get("refreshes", [])]
    assert {step for step, _ in refreshes} <= {1, 2, 3, 4}
    assert len(refreshes) >= 14  # each matrix was refreshed
    assert all(0 < line["captured"] <= 1.0001 for _, line in refreshes)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 4
    own = subspan.hf.projected(made.optimizer)
    assert summary["bytes"]["moments"] == sum(
        X.nbytes for state in own.state.values() for key, X in state.items() if key != "basis"
    )
    assert summary["plan"]["moments"] == summary["bytes"]["moments"]
    assert "prepare" not in vars(own)  # all is as it was
    (run,) = read_runs([tmp_path])
    assert (run.notices, run.status, len(run.steps)) == ([], "finished", 4)
    assert '"update_proj_gap": 2' in run.config_text
    assert [bar["label"] for bar in plan_runs([run])[0]["bars"]] == ["planned", "measured"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, None], ids=["bfloat16", "float64", "no config"])
def test_a_run_ends_well_whatever_the_planner_knows(
    dtype: torch.dtype | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                [torch.nn.Embedding(64, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 64)]
            )

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            X = input_ids
            for layer in self.layers:
                X = layer(X)
            return {"loss": torch.nn.functional.cross_entropy(X.flatten(0, 1), labels.flatten())}

    model = Plain() if dtype is None else LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype)
    args = arguments(tmp_path, bf16=dtype == torch.bfloat16, max_steps=2)  # TRL sets bf16 by itself
    trainer(args, subspan.hf.SubspanCallback(), model=model).train()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 2
    assert (summary["plan"] is not None) == (dtype == torch.bfloat16)
    assert ("no plan: " in capsys.readouterr().out) == (dtype != torch.bfloat16)


def test_a_plan_is_of_the_models_own_attention(tmp_path: Path) -> None:
    peaks = []
    for name in ("eager", "sdpa"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation=name)
        trainer(arguments(tmp_path / name, max_steps=1), subspan.hf.SubspanCallback(), model=model).train()
        peaks.append(json.loads((tmp_path / name / "summary.json").read_text())["plan"]["peak"])
    assert peaks[0] > peaks[1]


def test_the_log_of_a_run_that_goes_on_is_one_log(tmp_path: Path) -> None:
    for steps, resume in ((3, False), (5, True)):
        args = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=2)
        trainer(args, subspan.hf.SubspanCallback()).train(resume_from_checkpoint=resume)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["tokens"] for row in rows] == [128, 256, 384, 512, 640]


def test_a_training_that_ended_with_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    watch = subspan.hf.SubspanCallback(diagnostics=True)
    trained(tmp_path, watch, max_steps=1)
    broken = trainer(arguments(tmp_path, logging_steps=2, max_steps=4), watch, Stops())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    (run,) = read_runs([tmp_path])
    assert run.status != "finished"  # the summary of the run before is gone
    broken.pop_callback(Stops)
    broken.train()
    (run,) = read_runs([tmp_path])
    assert [row["tokens"] for row in run.steps] == [256, 512]  # each counted once
    seconds = [row["seconds"] for row in run.steps]
    assert durations(run) == pytest.approx([seconds[0] / 2, (seconds[1] - seconds[0]) / 2])


def test_what_comes_after_a_training(tmp_path: Path) -> None:
    """Another optimizer trains the model, an error leaves no gradient behind, and none of it needs the callback."""

    class Breaks(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise KeyboardInterrupt

    ways = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential", "max_steps": 2}
    clean = trained(tmp_path / "a", **ways)
    broken = trainer(arguments(tmp_path / "b", **ways), Breaks())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    broken.pop_callback(Breaks)
    broken.train()
    assert logged(broken, "grad_norm")[0] == pytest.approx(logged(clean, "grad_norm")[0], rel=1e-5)

    first = broken.optimizer
    other = torch.optim.AdamW(broken.model.parameters())
    broken.model(**{key: X[None] for key, X in ROWS[0].items()}).loss.backward()
    with pytest.raises(ValueError, match=r"AdamW steps parameters whose gradients .* has taken.*release\(\)"):
        other.step()
    subspan.hf.projected(first).release()
    broken.model.zero_grad()
    done = trained(tmp_path / "c", subspan.hf.SubspanCallback(), **ways)  # its callback releases
    for model, mine in ((broken.model, other), (done.model, torch.optim.AdamW(done.model.parameters()))):
        before = [p.detach().clone() for p in model.parameters()]
        model(**{key: X[None] for key, X in ROWS[0].items()}).loss.backward()
        mine.step()
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_clipping_by_value_is_refused(tmp_path: Path) -> None:
    subspan.hf.clip_in_optimizer()
    for gradients in ("project", "hold"):
        accelerator = Accelerator(cpu=True)
        model = accelerator.prepare(LlamaForCausalLM(LlamaConfig(**SIZES)))
        groups = subspan.param_groups(model, rank=8, verbose=False)
        accelerator.prepare(subspan.GaLoreAdamW(groups, gradients=gradients))
        model(**{key: X[None] for key, X in ROWS[0].items()}).loss.backward()
        if gradients == "project":
            with pytest.raises(ValueError, match=r"clip_value=1e-09 cannot clip.*use clip_grad_norm_"):
                accelerator.clip_grad_value_(model.parameters(), 1e-9)
        else:
            accelerator.clip_grad_value_(model.parameters(), 1e-9)
            assert max(p.grad.abs().max().item() for p in model.parameters()) <= 1e-9


def test_names_of_the_reference_are_clipped_by_trainer(tmp_path: Path) -> None:
    """Also after `clip_in_optimizer`, whole gradients as before."""
    subspan.hf.clip_in_optimizer()
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(model)
    matrices = [p for name, p in model.named_parameters() if "layers" in name and p.ndim == 2]
    group = {"params": matrices, "rank": 4, "update_proj_gap": 10, "scale": 0.25, "proj_type": "std"}
    accelerator.prepare(subspan.compat.GaLoreAdamW([group], lr=0.01))
    model(**{key: X[None] for key, X in ROWS[0].items()}).loss.backward()
    whole = torch.stack([p.grad.norm() for p in matrices]).norm()
    assert accelerator.clip_grad_norm_(matrices, 0.1) == pytest.approx(whole.item())


def test_several_sets_and_frozen_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first set is the validation curve; memory is planned for what is trained, or not at all."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.layers[0].requires_grad_(False)
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2)
    made = trainer(args, subspan.hf.SubspanCallback(), model=model)
    made.eval_dataset = {"a": ROWS[:8], "b": ROWS[8:16]}
    made.train()
    (run,) = read_runs([tmp_path])
    seen = [row["eval_a_loss"] for row in made.state.log_history if "eval_a_loss" in row]
    assert [row["valid_loss"] for row in run.evaluations] == seen
    assert len(seen) > 1
    assert "no plan: of causal language models alone" in capsys.readouterr().out


def test_the_callback_wants_an_optimizer_of_subspan(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    plain = Trainer(model, arguments(tmp_path), train_dataset=ROWS, callbacks=[subspan.hf.SubspanCallback()])
    with pytest.raises(ValueError, match=r"optimizer_cls_and_kwargs=subspan\.hf\.optimizer"):
        plain.train()


def test_an_optimizer_that_trainer_is_given_ready_does_as_well(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    groups = subspan.param_groups(model, rank=8, update_proj_gap=2, verbose=False)
    ready = subspan.GaLoreAdamW(groups, lr=0.02, gradients="project", refresh=Refresh(seed=42))
    args = arguments(tmp_path, max_grad_norm=0.5)
    made = Trainer(model, args, train_dataset=ROWS, optimizers=(ready, None), callbacks=[subspan.hf.SubspanCallback()])
    made.train()
    assert logged(made, "grad_norm") == logged(trained(tmp_path / "own", max_grad_norm=0.5), "grad_norm")


def test_a_search_for_hyperparameters_reaches_the_optimizer(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    made = trainer(args)
    args.learning_rate = 0.007
    assert made.create_optimizer().param_groups[0]["lr"] == 0.007


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """DistributedDataParallel, which wants whole gradients: `hold` is chosen for it."""
    script = """
    import json, sys
    from pathlib import Path
    import subspan.hf
    from test_hf import arguments, logged, trainer
    args = arguments(Path(sys.argv[1]), per_device_train_batch_size=2, train_sampling_strategy="sequential")
    made = trainer(args, subspan.hf.SubspanCallback())
    made.train()
    if made.is_world_process_zero():
        own = subspan.hf.projected(made.optimizer)
        print(json.dumps([own.gradients, logged(made, "loss"), logged(made, "grad_norm")]))
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    gradients, losses, norms = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert gradients == "hold"
    one = trained(
        tmp_path / "one",
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        optim={"gradients": "hold"},
    )
    assert losses == pytest.approx(logged(one, "loss"), rel=1e-4)
    assert norms == pytest.approx(logged(one, "grad_norm"), rel=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [64, 128, 192, 256]  # of both


def test_it_needs_its_own_extra_alone() -> None:
    code = """
    import sys
    for module in ("datasets", "jsonargparse", "docstring_parser", "matplotlib", "peft", "pyarrow", "rich", "tensorboard"):
        sys.modules[module] = None  # cannot be imported
    import torch, transformers, subspan.hf
    args = transformers.TrainingArguments(sys.argv[1], use_cpu=True)
    build = subspan.hf.optimizer(args, rank=4)[0]()
    print(type(build(torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(8, 8)])))).__name__)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), "unused"], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["GaLoreAdamW"], done.stderr[-1000:]
