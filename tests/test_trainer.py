import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import SIZES, tiny_config, write_text, write_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from subspan.cli import main
from subspan.optim.marks import mark
from subspan.training import trainer
from subspan.training.config import TrainConfig, load_config
from subspan.training.data import PackedDataset
from subspan.training.evaluation import evaluate
from subspan.training.models import compile_blocks
from subspan.training.optimizers import build_optimizer
from subspan.training.profile import PARTS, SKIPPED, StepProfiler, own_times
from subspan.training.text import check_vocabulary, load_data
from subspan.training.trainer import lr_factor, train

PRESETS = {  # a learning rate at which 20 steps of each learn something
    "galore": 0.02,
    "paper": 0.02,
    "galore_adafactor": 0.02,
    "galore_lion": 0.005,
    "galore_sgd": 0.5,
    "fira": 0.02,
    "frugal": 0.003,
    "apollo": 0.02,
    "apollo_mini": 0.02,
    "ldadam": 0.01,
    "subspan": 0.02,
    "adamw": 0.01,
    "galore8bit": 0.02,
    "qgalore": 0.02,
    "adamw8bit": 0.01,
    "adafactor": 0.01,
    "muon": 0.02,
    "sign_sgd": 0.003,
    "scale_sgd": 0.01,
}


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


# --------------------------------------------------------------------------------------------------- a whole run


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_learns(tmp_path: Path, preset: str) -> None:
    config = tiny_config(tmp_path, optim={"preset": preset, "lr": PRESETS[preset]}, run={"export": False})
    summary = train(config)
    assert summary["first_loss"] > math.log(150)  # nothing is known at first: the loss is about that of guessing
    assert summary["valid_loss"] < summary["first_loss"] - 0.5


@pytest.mark.parametrize(
    ("optim", "model"),
    [
        ({"state_dtype": "int4", "basis_dtype": "int4", "dense_rule": "adafactor"}, {}),
        ({"dense_rule": "sgd", "dense_lr": 0.5, "stochastic_rounding": True}, {"dtype": "bfloat16"}),
        ({"dense_state_dtype": "int8", "targets": ["embed_tokens", "mlp"]}, {"int8": True}),
    ],
)
def test_state_in_few_bits_and_cheap_dense_state_learn(tmp_path: Path, optim: dict, model: dict) -> None:
    summary = train(tiny_config(tmp_path, optim=optim, model=model, run={"export": False}))
    assert summary["valid_loss"] < summary["first_loss"] - 0.5


def test_a_model_that_cannot_be_written_leaves_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_pretrained", full)
        with pytest.raises(OSError, match=r"could not be written to .*No space left.*--resume auto"):
            train(tiny_config(tmp_path))
    assert (tmp_path / "run" / "summary.json").exists()
    config = tiny_config(tmp_path)
    config.resume = "auto"
    train(config)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, run={"eval_every": 8})
    summary = train(config)
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "summary.json",
        "tensorboard",
    ]
    assert load_config(run / "config.yaml") == config
    assert json.loads((run / "summary.json").read_text()) == summary
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 21))
    assert [line["step"] for line in lines if "valid_loss" in line] == [8, 16, 20]
    assert lines[-1]["valid_loss"] == summary["valid_loss"]
    assert summary["perplexity"] == math.exp(summary["valid_loss"])
    assert summary["tokens"] == 20 * 4 * 31  # steps x sequences x tokens that something predicts
    assert list((run / "tensorboard").iterdir())


def test_the_same_seed_gives_the_same_losses_and_another_gives_others(tmp_path: Path) -> None:
    seen = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name).mkdir()
        train(tiny_config(tmp_path / name, run={"seed": seed, "steps": 6, "export": False}))
        seen.append(losses(tmp_path / name))
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_learns(tmp_path: Path, autocast: bool) -> None:
    model = {"dtype": "float32" if autocast else "bfloat16"}
    summary = train(tiny_config(tmp_path, model=model, run={"autocast": autocast}))
    assert summary["valid_loss"] < summary["first_loss"] - 0.5
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    assert exported.dtype == getattr(torch, model["dtype"])


@pytest.mark.parametrize("preset", ["galore", "qgalore"])
def test_the_exported_model_has_the_loss_of_the_summary(tmp_path: Path, preset: str) -> None:
    """INT8 weights too are exported as ordinary ones."""
    config = tiny_config(tmp_path, optim={"preset": preset})
    summary = train(config)
    folder = tmp_path / "run" / "model"
    assert (folder / "model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.eos_token_id == tokenizer.eos_token_id is not None
    valid = load_data(config.data, str(folder)).valid_loader(3, None)
    assert evaluate(model, valid).loss == pytest.approx(summary["valid_loss"], rel=1e-6)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_activation_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    seen = []
    for name in ("plain", "checkpointed"):
        (tmp_path / name).mkdir()
        model = {"activation_checkpointing": name == "checkpointed"}
        train(tiny_config(tmp_path / name, model=model, run={"steps": 5, "export": False}))
        seen.append(losses(tmp_path / name))
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


def test_pretrained_weights_are_where_a_run_starts(tmp_path: Path) -> None:
    first = train(tiny_config(tmp_path))
    folder = str(tmp_path / "run" / "model")
    model = {"name": folder, "pretrained": True, "overrides": {}}
    again = train(tiny_config(tmp_path, model=model, run={"out": str(tmp_path / "again"), "warmup_steps": 0}))
    assert again["first_loss"] < first["first_loss"] - 0.5
    assert again["valid_loss"] < first["valid_loss"]


# ------------------------------------------------------------------------------------------- steps and gradients


def final_weights(folder: Path, preset: str, **run: object) -> dict[str, Tensor]:
    folder.mkdir()
    optim = {"preset": preset, "lr": PRESETS[preset], "max_grad_norm": 0.5}
    train(tiny_config(folder, optim=optim, run={"steps": 4, "batch_size": 8, **run}))
    return AutoModelForCausalLM.from_pretrained(folder / "run" / "model").state_dict()


def test_micro_batches_are_one_big_batch(tmp_path: Path) -> None:
    whole = final_weights(tmp_path / "whole", "galore")
    parts = final_weights(tmp_path / "parts", "galore", micro_batch=2)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-5, atol=1e-5)


def test_micro_batches_weigh_as_many_tokens_as_they_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the sequences train on a few tokens only: a mean of means would weigh those tokens too much."""
    original = PackedDataset.__getitem__

    def sparse(self: object, index: int) -> dict[str, Tensor]:
        item = original(self, index)
        if index % 2:
            item["labels"][: 5 + index % 20] = -100
        return item

    monkeypatch.setattr(PackedDataset, "__getitem__", sparse)
    whole = final_weights(tmp_path / "whole", "galore_sgd")
    parts = final_weights(tmp_path / "parts", "galore_sgd", micro_batch=1)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-5, atol=1e-5)


def test_warm_up_starts_above_zero_and_cosine_ends_at_the_ratio(tmp_path: Path) -> None:
    run = tiny_config(tmp_path, run={"steps": 100, "warmup_steps": 10, "min_lr_ratio": 0.1}).run
    factors = [lr_factor(step, run) for step in range(1, 101)]
    assert factors[0] == 0.1
    assert factors[9] == 1.0
    assert factors[54] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1)
    assert max(factors) == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))
    assert lr_factor(1, dataclasses.replace(run, steps=1, warmup_steps=1)) == 1.0
    assert lr_factor(1, dataclasses.replace(run, steps=1, warmup_steps=0)) == pytest.approx(0.1)


def test_the_optimizer_steps_as_often_as_asked_with_the_lr_of_the_schedule(tmp_path: Path) -> None:
    used = []

    def counting(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        optimizer = build_optimizer(model, config)
        optimizer.register_step_pre_hook(lambda o, *_: used.append([group["lr"] for group in o.param_groups]))
        return optimizer

    config = tiny_config(tmp_path, optim={"lr": 0.02, "dense_lr": 0.01}, run={"micro_batch": 2, "export": False})
    train(config, counting)
    assert used == [[lr * lr_factor(step, config.run) for lr in (0.02, 0.01, 0.01)] for step in range(1, 21)]
    assert [line["lr"] for line in metrics(tmp_path) if "lr" in line] == [lrs[0] for lrs in used]


def test_a_torch_optimizer_runs_in_the_same_loop_and_is_clipped(tmp_path: Path) -> None:
    norms = []

    def sgd(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=config.optim.lr)
        parameters = list(model.parameters())
        optimizer.register_step_pre_hook(lambda *_: norms.append(float(trainer.gradient_norm(parameters))))
        return optimizer

    train(tiny_config(tmp_path, optim={"max_grad_norm": 0.1}, run={"steps": 5, "export": False}), sgd)
    assert norms == pytest.approx([0.1] * 5, rel=1e-4)
    logged = [line["grad_norm"] for line in metrics(tmp_path) if "grad_norm" in line]
    assert min(logged) > 0.1  # the norm before clipping is what is written


# ------------------------------------------------------------------------------------------------- not finite


def poisoned(at: set[int]) -> tuple[Callable[[nn.Module, TrainConfig], torch.optim.Optimizer], list[list[Tensor]]]:
    """Spoil the gradient of the steps in `at`, counted from 1, and remember the weights around each step."""
    seen: list[list[Tensor]] = []

    def build(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        weight = model.model.layers[0].mlp.up_proj.weight
        calls = iter(range(1, 1000))

        def spoil(p: Tensor) -> None:
            seen.append([q.detach().clone() for q in model.parameters()])
            if next(calls) in at:
                p.grad.fill_(math.inf)

        weight.register_post_accumulate_grad_hook(spoil)
        return build_optimizer(model, config)

    return build, seen


def test_a_step_that_is_not_finite_is_skipped_whole(tmp_path: Path) -> None:
    build, seen = poisoned({1, 4})
    summary = train(tiny_config(tmp_path, run={"steps": 8, "export": False}), build)
    assert summary["skipped_steps"] == 2
    assert summary["tokens"] == 6 * 4 * 31
    for step in range(1, 8):
        same = all(torch.equal(a, b) for a, b in zip(seen[step - 1], seen[step], strict=True))
        assert same == (step in {1, 4}), step
    assert math.isfinite(summary["valid_loss"])
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert [line["grad_norm"] is None for line in lines] == [step in {1, 4} for step in range(1, 9)]


def test_a_run_that_is_not_finite_stops_with_advice(tmp_path: Path) -> None:
    build, seen = poisoned(set(range(3, 100)))
    with pytest.raises(FloatingPointError, match=r"10 steps in a row, up to step 12: lower --optim.lr"):
        train(tiny_config(tmp_path, run={"steps": 30}), build)
    assert len(seen) == 12


# --------------------------------------------------------------------------------------------------- evaluation


def random_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **SIZES)).train()


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    made = []
    for masked in (0, 8, 3):
        ids = torch.randint(50, (2, 12))
        labels = ids.clone()
        labels[:, :masked] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def test_every_token_weighs_the_same_in_an_evaluation() -> None:
    model = random_model()
    result = evaluate(model, batches())
    with torch.no_grad():
        parts = [(float(model(**batch).loss), int((batch["labels"][:, 1:] != -100).sum())) for batch in batches()]
    tokens = sum(count for _, count in parts)
    assert result.tokens == tokens == 2 * (11 + 4 + 9)
    assert result.loss == pytest.approx(sum(loss * count for loss, count in parts) / tokens, rel=1e-6)
    assert result.perplexity == math.exp(result.loss)
    assert model.training


def test_the_paper_compatible_loss_is_the_sum_of_batch_means_over_one_more_batch() -> None:
    model = random_model()
    with torch.no_grad():
        means = [float(model(**batch).loss) for batch in batches()]
    assert evaluate(model, batches(), paper_compatible=True).loss == pytest.approx(sum(means) / 4, rel=1e-6)


# ------------------------------------------------------------------------------------------------ other data


def test_chat_data_trains_on_answers_only(tmp_path: Path) -> None:
    train(tiny_config(tmp_path))  # for its tokenizer
    rows = [{"prompt": "the cat sees ", "completion": f"the red dog {i}"} for i in range(40)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"files": str(tmp_path / "chat.jsonl"), "format": "chat", "tokenizer": str(tmp_path / "run" / "model")}
    summary = train(tiny_config(tmp_path, data=data, run={"out": str(tmp_path / "chat"), "steps": 10}))
    assert summary["tokens"] < 10 * 4 * 31 / 2
    assert summary["valid_loss"] < summary["first_loss"] - 0.5


def test_a_streamed_dataset_trains(tmp_path: Path) -> None:
    train(tiny_config(tmp_path))  # for its tokenizer
    folder = tmp_path / "dataset"
    folder.mkdir()
    documents = (tmp_path / "text.txt").read_text().split("<|endoftext|>")
    for name, part in (("train", documents[8:]), ("validation", documents[:8])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in part))
    data = {"files": None, "dataset": str(folder), "tokenizer": str(tmp_path / "run" / "model")}
    run = {"out": str(tmp_path / "streamed"), "eval_sequences": 6}
    summary = train(tiny_config(tmp_path, data=data, run=run))
    assert summary["valid_tokens"] == 6 * 31
    assert summary["valid_loss"] < summary["first_loss"] - 0.5


def test_only_pieces_that_text_can_hold_need_an_embedding(tmp_path: Path) -> None:
    tokenizer = load_data(tiny_config(tmp_path).data, None).tokenizer
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES))
    tokenizer.add_tokens(
        ["<extra_id_0>", "<extra_id_1>"], special_tokens=True
    )  # as T5's: 100 more than the paper's models have
    check_vocabulary(model, tokenizer)
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match=f"--model.overrides.vocab_size {len(tokenizer)}"):
        check_vocabulary(model, tokenizer)


def test_a_warning_when_a_step_has_fewer_tokens_than_the_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = {"rank": 16, "update_proj_gap": 2}
    for seq_len, warned in ((8, True), (9, False)):
        out = str(tmp_path / str(seq_len))
        run = {"batch_size": 2, "steps": 2, "out": out}
        train(tiny_config(tmp_path, data={"seq_len": seq_len}, optim=optim, run=run))
        shown = capsys.readouterr().out
        assert ("a step trains on 14 tokens, fewer than optim.rank=16" in shown) == warned
        assert ("warning" in shown) == warned


# ------------------------------------------------------------------------------- what is refused leaves nothing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "no/such/model"}}, "model.name='no/such/model'"),
        ({"model": {"overrides": {"hiden_size": 3}}}, "model.overrides: hiden_size"),
        ({"model": {"overrides": {**SIZES, "vocab_size": 20}}}, "--model.overrides.vocab_size"),
        ({"optim": {"targets": ["nothing"]}}, "'nothing' matches no"),
        ({"data": {"files": "nothing*.txt"}}, r"nothing\*.txt"),
        ({"data": {"seq_len": 100_000}}, "data.seq_len=100000"),
        ({"data": {"tokenizer": "no/such/tokenizer"}}, "data.tokenizer='no/such/tokenizer'"),
        ({"run": {"device": "abacus"}}, "run.device='abacus'"),
    ],
)
def test_a_refused_run_leaves_no_folder(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        train(tiny_config(tmp_path, **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    write_text(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("precious")
    with pytest.raises(ValueError, match=r"--run.out"):
        train(tiny_config(tmp_path))
    assert [path.read_text() for path in (tmp_path / "run").iterdir()] == ["precious"]


# ---------------------------------------------------------------------------------------------------- profile


@pytest.mark.parametrize("gradients", ["hold", "project", "update"])
def test_a_profile_says_where_a_steps_time_goes(tmp_path: Path, capsys: pytest.CaptureFixture, gradients: str) -> None:
    config = tiny_config(tmp_path, optim={"gradients": gradients}, run={"profile": 6, "steps": 9, "export": False})
    train(config)
    profile = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert len(profile["steps"]) == 6
    for times in profile["steps"]:
        assert {"data", "forward", "backward", "project", "rule", "apply", "step"} <= times.keys() <= PARTS.keys()
        assert all(seconds >= 0 for seconds in times.values())
    assert any("refresh" in times for times in profile["steps"])  # every 5 steps
    assert "where a step's time goes" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("steps", range(SKIPPED + 3))
def test_a_run_that_ends_before_its_profile_does(tmp_path: Path, steps: int) -> None:
    """What ended it is raised, not what a profile of no steps makes of that."""

    def profiled() -> None:
        with StepProfiler(tmp_path, 5, torch.device("cpu")) as profiler:
            for _ in range(steps):
                with mark("step"):
                    torch.ones(3).sum()
                profiler.step()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profiled()
    assert (tmp_path / "profile.json").exists() == (steps > SKIPPED + 1)


def test_own_times_of_nested_ranges() -> None:
    """Times without those of the ranges inside, whatever the order they are told in; what is outside of steps does not count."""
    ranges = [
        ("forward", 90.0, 99.0),  # an evaluation
        ("step", 100.0, 200.0),
        ("forward", 110.0, 130.0),
        ("backward", 130.0, 180.0),
        ("project", 140.0, 150.0),
        ("refresh", 150.0, 175.0),
        ("project", 160.0, 165.0),
        ("step", 300.0, 301.0),
    ]
    first, second = own_times(reversed(ranges))
    assert second == {"step": pytest.approx(1e-6)}
    expected = {"step": 30, "forward": 20, "backward": 15, "project": 15, "refresh": 20}
    assert first == {name: pytest.approx(micros * 1e-6) for name, micros in expected.items()}
    assert sum(first.values()) == pytest.approx(100e-6)


def test_a_profile_longer_than_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run.profile=8 needs 3 steps before .* the run has 10: raise run.steps"):
        train(tiny_config(tmp_path, run={"profile": 8, "steps": 10}))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------- compiled blocks


@pytest.mark.parametrize("gradients", ["project", "update"])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_a_compiled_model_trains_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gradients: str, int8: bool, activation_checkpointing: bool
) -> None:
    compile_module, compiled = nn.Module.compile, []

    def quickly(module: nn.Module) -> None:  # all of torch.compile but its code generation, which takes half a minute
        compiled.append(type(module).__name__)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", quickly)
    seen = []
    for compile in (False, True):
        folder = tmp_path / str(compile)
        folder.mkdir()
        model = {"compile": compile, "int8": int8, "activation_checkpointing": activation_checkpointing}
        train(tiny_config(folder, model=model, optim={"gradients": gradients}, run={"steps": 8}))
        seen.append(losses(folder))
    assert compiled == ["LlamaDecoderLayer"] * 2
    assert seen[1] == pytest.approx(seen[0], rel=1e-4)


def test_a_model_without_blocks_is_not_compiled() -> None:
    with pytest.raises(ValueError, match=r"model\.compile=true finds no ModuleList"):
        compile_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_what_is_resumed_too_near_its_end_is_not_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps, warning in ((6, False), (7, True), (7, False)):
        config = tiny_config(tmp_path, run={"steps": steps, "profile": 2, "export": False})
        config.resume = "auto"
        train(config)
        assert ("none is profiled" in capsys.readouterr().out) == warning


def test_a_run_too_short_for_its_bases_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out, gap, late in (("short", 40, 7), ("long", 20, 0)):
        train(tiny_config(tmp_path, optim={"update_proj_gap": gap}, run={"out": str(tmp_path / out), "export": False}))
        assert (f"{late} of 14 matrices keep their random first basis" in capsys.readouterr().out) == bool(late)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_model_that_cannot_keep_documents_apart_is_refused(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "opt":
        made = OPTConfig(**sizes, ffn_dim=32, word_embed_proj_dim=32)
    else:
        made = LlamaConfig(**sizes, intermediate_size=32)
    made.save_pretrained(tmp_path / "model")
    tokenizer = write_tokenizer(tmp_path / "words", special=False)
    assert len(tokenizer) <= 300
    config = tiny_config(
        tmp_path,
        model={"name": str(tmp_path / "model"), "overrides": {}},
        data={"keep_documents_apart": True, "tokenizer": str(tmp_path / "words")},
        run={"steps": 2, "warmup_steps": 0, "export": False},
    )
    if kind == "llama":
        train(config)
        return
    message = r"data\.keep_documents_apart=true: this model lets"
    with pytest.raises(ValueError, match=message):
        train(config)
    OPTForCausalLM(made).save_pretrained(tmp_path / "model")
    words = ["eval", str(tmp_path / "model"), "--data.files", str(tmp_path / "text.txt"), "--data.seq_len", "16"]
    (tmp_path / "text.txt").write_text("the red cat and a blue dog " * 100)
    words += ["--data.tokenizer", str(tmp_path / "words"), f"--data.cache_dir={tmp_path}/c"]
    main(words)
    with pytest.raises(SystemExit):
        main([*words, "--data.keep_documents_apart", "true"])
    assert re.search(message, capsys.readouterr().err)
