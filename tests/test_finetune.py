"""Fine-tuning: it learns with every kind of method, seeds are independent, a stopped run goes on, and what comes out loads."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZES, WORDS, write_classifier, write_rows, write_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import subspan
from subspan.cli import main
from subspan.options import parse_finetune
from subspan.training import finetune as module
from subspan.training.classifier import build_classifier, load_tokenizer
from subspan.training.config import SECTIONS
from subspan.training.finetune import finetune, with_own_rate
from subspan.training.finetune_config import (
    FINETUNE_SECTIONS,
    ClassifierConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
    FinetuneRunConfig,
    TaskConfig,
)
from subspan.training.optimizers import groups_of, make_optimizer
from subspan.training.resume import Stopped
from subspan.training.tasks import load_task

pytest.importorskip("sklearn")
pytest.importorskip("peft")

METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # optim, model
    "full": ({"preset": "adamw", "lr": 0.003}, {}),
    "galore": ({"preset": "galore", "lr": 0.003}, {}),
    "qgalore": ({"preset": "qgalore", "lr": 0.003}, {}),
    "fira": ({"preset": "fira", "lr": 0.003}, {}),
    "lora": ({"preset": "adamw", "lr": 0.02}, {"baseline": "lora"}),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_classifier(tmp_path_factory.mktemp("encoder"))


def write_task(folder: Path, *, numbers: bool = False) -> str:
    """Sentences of four words; the class is which half of the words they are from, the number how many are from the first."""
    draw, half = random.Random(0), len(WORDS) // 2
    for name, size in (("train", 64), ("dev", 32)):
        rows = []
        for i in range(size):
            first = i % 5 if numbers else 4 * (i % 2)
            words = draw.choices(WORDS[:half], k=first) + draw.choices(WORDS[half:], k=4 - first)
            draw.shuffle(words)
            rows.append({"sentence": " ".join(words), "label": first / 4 if numbers else i % 2})
        write_rows(folder / "tasks" / "halves" / f"{name}.jsonl", rows)
    return str(folder / "tasks")


def configure(
    folder: Path, name: str, *, optim: Any = None, model: Any = None, data: Any = None, run: Any = None
) -> Any:
    if not (folder / "tasks").exists():
        write_task(folder)
    return FinetuneConfig(
        ClassifierConfig(**{"name": name, **(model or {})}),
        TaskConfig(**{"task": "halves", "folder": str(folder / "tasks"), **(data or {})}),
        FinetuneOptimConfig(**{"rank": 4, "scale": 1.0, "lr": 0.003, "update_proj_gap": 5, **(optim or {})}),
        FinetuneRunConfig(
            **{"out": str(folder / "run"), "epochs": 4, "batch_size": 8, "checkpoint_every": 0, **(run or {})}
        ),
    )


def numbers_of(summary: dict[str, Any]) -> list[Any]:
    """Of every seed, what does not depend on the clock or the machine."""
    return [
        [result[key] for key in ("seed", "best", "last", "epochs", "steps", "tokens")] for result in summary["seeds"]
    ]


# ----------------------------------------------------------------------------------------------------- a whole run


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_method_learns_and_exports(tmp_path: Path, encoder: str, method: str) -> None:
    optim, model = METHODS[method]
    config = configure(tmp_path, encoder, optim=optim, model=model, run={"export": True})
    summary = finetune(config)
    (result,) = summary["seeds"]
    assert result["best"]["accuracy"] >= 0.9
    assert result["epochs"][-1]["valid_loss"] < result["epochs"][0]["valid_loss"]
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "seed_0" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "seed_0" / "model")
    rows = [json.loads(line) for line in (tmp_path / "tasks" / "halves" / "dev.jsonl").read_text().splitlines()]
    inputs = tokenizer([row["sentence"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        predicted = exported(**inputs).logits.argmax(-1).tolist()
    right = statistics.fmean(p == row["label"] for p, row in zip(predicted, rows, strict=True))
    assert right == pytest.approx(result["last"]["accuracy"])
    assert not any("lora" in name for name in exported.state_dict())


def test_what_a_run_says_and_leaves(tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_task(tmp_path)
    words = ["finetune", "--model.name", encoder, "--data.task", "halves", "--data.folder", str(tmp_path / "tasks")]
    words += ["--optim.rank", "4", "--optim.lr", "1e-3", "--run.seeds", "[3, 5]", "--run.out", str(tmp_path / "run")]
    words += ["--run.epochs", "2", "--run.checkpoint_every", "0"]
    main(words)
    shown = capsys.readouterr().out
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "seed_3", "seed_5", "summary.json"]
    assert sorted(path.name for path in (run / "seed_3").iterdir()) == ["metrics.jsonl", "result.json", "tensorboard"]
    summary = json.loads((run / "summary.json").read_text())
    for which in ("best", "last"):
        values = [result[which]["accuracy"] for result in summary["seeds"]]
        assert summary[which]["accuracy"] == {
            "mean": pytest.approx(statistics.fmean(values)),
            "std": pytest.approx(statistics.stdev(values)),
        }
        assert f"{100 * statistics.fmean(values):.2f}" in shown
    for result in summary["seeds"]:
        assert result["best"]["accuracy"] == max(epoch["accuracy"] for epoch in result["epochs"])
        assert result["last"] == {"epoch": 2, **result["epochs"][1]}
        assert result["steps"] == 2 * 64 / 16
    assert summary["seeds"][0]["epochs"] != summary["seeds"][1]["epochs"]  # another head, another order
    assert 0 < summary["bytes"]["basis"] < summary["bytes"]["moments"] < summary["bytes"]["adam_full_rank"]
    assert summary["peak_memory_bytes"] > summary["bytes"]["weights"]
    lines = [json.loads(line) for line in (run / "seed_5" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    rates = [line["lr"] for line in lines if "loss" in line]
    assert rates == pytest.approx([1e-3 * (1 - step / 8) for step in range(1, 9)])
    assert [line["accuracy"] for line in lines if "epoch" in line] == [
        epoch["accuracy"] for epoch in summary["seeds"][1]["epochs"]
    ]
    config = parse_finetune(["finetune", "--config", str(run / "config.yaml")])
    assert dataclasses.asdict(config) == {**summary["config"], "resume": None}
    assert config.optim.scale == 4.0


def test_numbers_are_predicted(tmp_path: Path, encoder: str) -> None:
    write_task(tmp_path, numbers=True)
    summary = finetune(configure(tmp_path, encoder, run={"epochs": 8}))
    assert summary["metrics"] == ["pearson", "spearman"]
    assert summary["labels"] == 1
    assert summary["best"]["pearson"]["mean"] > 0.8


def test_seeds_that_have_no_correlation_have_a_summary(tmp_path: Path, encoder: str) -> None:
    write_task(tmp_path, numbers=True)
    data = {"max_valid_rows": 1}
    summary = finetune(configure(tmp_path, encoder, data=data, run={"epochs": 1, "seeds": [1, 2]}))
    assert summary["metrics"][0] == "pearson"
    assert math.isnan(summary["last"]["pearson"]["mean"])
    assert math.isnan(summary["last"]["pearson"]["std"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["last"]["pearson"] == {"mean": None, "std": None}


def test_a_causal_model_without_a_pad_token_learns(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "llama", special=False)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(**SIZES, vocab_size=len(tokenizer), initializer_range=0.2, max_position_embeddings=64)
    ).save_pretrained(tmp_path / "llama")
    summary = finetune(configure(tmp_path, str(tmp_path / "llama"), run={"epochs": 6}))
    assert summary["best"]["accuracy"]["mean"] >= 0.9


def test_a_run_that_is_not_finite_ends_with_advice(tmp_path: Path, encoder: str) -> None:
    with pytest.raises(FloatingPointError, match=r"10 steps in a row, up to step 1[12].*--optim\.lr"):
        finetune(configure(tmp_path, encoder, optim={"preset": "adamw", "lr": 1e30}, run={"epochs": 3}))


# --------------------------------------------------------------------------------------------- what is the same


@pytest.mark.parametrize("preset", ["galore", "paper"])
def test_modes_of_gradients_and_micro_batches_are_the_same_run(tmp_path: Path, encoder: str, preset: str) -> None:
    seen = []
    for gradients, micro_batch in (("hold", None), ("project", None), ("update", None), ("project", 4)):
        out = str(tmp_path / f"{gradients}_{micro_batch}")
        optim = {"preset": preset, "gradients": gradients, "lr": 0.001}
        run = {"out": out, "micro_batch": micro_batch, "epochs": 2}
        summary = finetune(configure(tmp_path, encoder, optim=optim, run=run))
        seen.append([epoch["valid_loss"] for epoch in summary["seeds"][0]["epochs"]])
    for other in seen[1:]:
        assert other == pytest.approx(seen[0], rel=1e-3)
    assert seen[0][0] != pytest.approx(seen[0][1], rel=1e-3)


def test_a_run_that_died_goes_on_and_ends_the_same(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, in the second epoch of the second seed; then a seed is added."""
    shutil.copytree(encoder, tmp_path / "dropout")
    settings = json.loads((tmp_path / "dropout" / "config.json").read_text())
    (tmp_path / "dropout" / "config.json").write_text(json.dumps({**settings, "hidden_dropout_prob": 0.2}))
    name, run = str(tmp_path / "dropout"), {"epochs": 3, "seeds": [1, 2], "checkpoint_every": 1}
    whole = finetune(configure(tmp_path, name, run={**run, "out": str(tmp_path / "whole")}))

    calls, evaluate = iter(range(100)), module.evaluate

    def dies(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate", dies)
    parts = configure(tmp_path, name, run=run)
    with pytest.raises(KeyboardInterrupt):
        finetune(parts)
    assert not (tmp_path / "run" / "summary.json").exists()
    seeds = []
    build = module.build_classifier
    monkeypatch.setattr(module, "build_classifier", lambda *args: seeds.append(torch.initial_seed()) or build(*args))
    parts.resume = "auto"
    assert numbers_of(finetune(parts)) == numbers_of(whole)
    assert seeds == [2]
    losses = [
        [line.get("loss") for line in map(json.loads, (tmp_path / out / "seed_2" / "metrics.jsonl").open())]
        for out in ("run", "whole")
    ]
    assert losses[0] == losses[1]
    more = dataclasses.replace(parts, run=dataclasses.replace(parts.run, seeds=[1, 2, 3]))
    assert numbers_of(finetune(more))[:2] == numbers_of(whole)
    assert seeds == [2, 3]

    one = dataclasses.replace(parts, run=dataclasses.replace(parts.run, seeds=[3]))
    assert [result["seed"] for result in finetune(one)["seeds"]] == [1, 2, 3]  # none is forgotten

    file = tmp_path / "run" / "config.yaml"
    assert "gradients: null" in file.read_text()
    file.write_text(
        file.read_text().replace("gradients: null", f"gradients: {parts.optim.gradients}")
    )  # the same, said
    assert numbers_of(finetune(more))[:2] == numbers_of(whole)
    file.write_text(
        file.read_text().replace("  attn_implementation: null\n", "")
    )  # of a version that had no such field
    assert numbers_of(finetune(more))[:2] == numbers_of(whole)
    other = dataclasses.replace(parts, optim=dataclasses.replace(parts.optim, lr=0.5))
    with pytest.raises(ValueError, match=r"optim\.lr was 0\.003 in .* and is 0\.5: set it back"):
        finetune(other)
    with pytest.raises(ValueError, match="exists and is not empty"):
        finetune(dataclasses.replace(parts, resume=None))
    write_rows(tmp_path / "tasks" / "halves" / "dev.jsonl", [{"sentence": "red", "label": 1}])
    with pytest.raises(ValueError, match="is of other rows"):
        finetune(parts)


def test_warm_up_and_decay(tmp_path: Path, encoder: str) -> None:
    run = {"epochs": 1, "warmup_ratio": 0.25, "decay": "cosine", "min_lr_ratio": 0.1}
    finetune(configure(tmp_path, encoder, optim={"lr": 1.0}, run=run))
    lines = map(json.loads, (tmp_path / "run" / "seed_0" / "metrics.jsonl").open())
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(1, 7)]
    assert [line["lr"] for line in lines if "loss" in line] == pytest.approx([0.5, 1.0, *cosine])


def test_a_signal_ends_it_after_the_step(tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there then goes on from the last epoch, with the same numbers."""
    run = {"epochs": 3, "checkpoint_every": 1}
    whole = finetune(configure(tmp_path, encoder, run={**run, "out": str(tmp_path / "whole")}))
    calls, batch_loss = iter(range(1000)), module.batch_loss

    def kicked(*args: Any) -> Any:
        if next(calls) == 11:  # in the second of eight steps each
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_loss(*args)

    monkeypatch.setattr(module, "batch_loss", kicked)
    config = configure(tmp_path, encoder, run=run)
    with pytest.raises(
        Stopped, match=r"SIGTERM after step 1\d of 24, epochs that ended are saved; go on with: .* finetune"
    ):
        finetune(config)
    config.resume = "auto"
    assert numbers_of(finetune(config)) == numbers_of(whole)


def test_a_signal_in_the_last_evaluation_ends_it_before_the_next_seed(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, evaluate = iter(range(100)), module.evaluate

    def kicked(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate", kicked)
    with pytest.raises(Stopped, match="SIGTERM after step 8 of 8, seeds that ended are saved"):
        finetune(configure(tmp_path, encoder, run={"epochs": 1, "seeds": [1, 2]}))
    assert (tmp_path / "run" / "seed_1" / "result.json").is_file()
    assert not (tmp_path / "run" / "seed_2").exists()


def test_a_model_that_cannot_be_written_leaves_its_result(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(model: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    config = configure(tmp_path, encoder, run={"epochs": 1, "export": True})
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_pretrained", full)
        with pytest.raises(OSError, match=r"seed_0/model \(.*No space left on device\): make room"):
            finetune(config)
    config.resume = "auto"
    assert len(finetune(config)["seeds"]) == 1
    assert "seed 0 is done, its model was not kept" in capsys.readouterr().out


def test_the_attention_is_the_one_asked_for(tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, build = [], module.build_classifier

    def built(*args: Any) -> Any:
        made = build(*args)
        seen.append(made[0].config._attn_implementation)
        return made

    monkeypatch.setattr(module, "build_classifier", built)
    for name in ("eager", None):
        run = {"epochs": 1, "out": str(tmp_path / str(name))}
        finetune(configure(tmp_path, encoder, model={"attn_implementation": name}, run=run))
    assert seen == ["eager", "sdpa"]
    for name, message in (("no_such", "Specified"), ("kernels-community/no-such", "kernels")):
        config = configure(tmp_path, encoder, model={"attn_implementation": name}, run={"out": str(tmp_path / "none")})
        with pytest.raises(ValueError, match=rf"^model\.attn_implementation={name} cannot be used here: .*{message}"):
            finetune(config)


# ------------------------------------------------------------------------------------------- models and settings


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(BertForSequenceClassification, BertConfig), (RobertaForSequenceClassification, RobertaConfig)],
)
def test_the_papers_matrices_are_projected(kind: Any, settings: Any) -> None:
    with torch.device("meta"):
        model = kind(settings(**SIZES, vocab_size=30))
    groups = subspan.param_groups(model, rank=4, verbose=False)
    projected = {name for name, _ in groups[0]["params"]}
    inside = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    wanted = {
        f"encoder.layer.{i}.{part}.weight" for i in (0, 1) for part in (*inside, "intermediate.dense", "output.dense")
    }
    assert {name.partition(".")[2] for name in projected} == wanted
    rest = {name for group in groups[1:] for name, _ in group["params"]}
    assert {name for name in rest if name.startswith("classifier") or "pooler" in name} == {
        name for name, _ in model.named_parameters() if name.startswith("classifier") or "pooler" in name
    }


@pytest.mark.parametrize("train_rest", [False, True])
def test_lora_trains_adapters_and_head(tmp_path: Path, encoder: str, train_rest: bool) -> None:
    config = configure(
        tmp_path, encoder, optim={"preset": "adamw"}, model={"baseline": "lora", "train_rest": train_rest}
    )
    tokenizer = load_tokenizer(encoder)
    model, new, _ = build_classifier(config, load_task(config.data, tokenizer), tokenizer, torch.device("cpu"))
    assert new == ["classifier.bias", "classifier.weight"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name in trained if "lora_" in name}
    assert len(adapters) == 2 * 6 * 2
    rest = trained - adapters
    assert set(new) <= rest
    assert (rest == set(new)) == (not train_rest)


@pytest.mark.parametrize(
    ("optim", "model"), [({}, {}), ({"preset": "scale_sgd"}, {}), ({"preset": "adamw"}, {"baseline": "lora"})]
)
def test_a_head_can_have_a_rate_of_its_own(tmp_path: Path, encoder: str, optim: Any, model: Any) -> None:
    config = configure(tmp_path, encoder, optim={"dense_lr": 0.002, "head_lr": 0.03, **optim}, model=model)
    tokenizer = load_tokenizer(encoder)
    built, _, head = build_classifier(config, load_task(config.data, tokenizer), tokenizer, torch.device("cpu"))
    assert {"classifier.weight", "classifier.bias"} <= head
    before = groups_of(built, config.optim)
    groups = with_own_rate(before, head, config.optim.head_lr)
    rates = {name: group["lr"] for group in groups if "lr" in group for name, _ in group["params"]}
    assert {name for name, lr in rates.items() if lr == 0.03} == head
    assert 0.002 in rates.values() or model
    names = [sorted(name for group in found for name, _ in group["params"]) for found in (before, groups)]
    assert names[0] == names[1]
    make_optimizer(built, config.optim, 0, groups=groups)


def test_a_head_at_the_rate_of_the_rest_changes_nothing(tmp_path: Path, encoder: str) -> None:
    found = [
        finetune(configure(tmp_path / name, encoder, optim={"dense_lr": 0.002, "head_lr": lr}))
        for name, lr in (("a", None), ("b", 0.002), ("c", 0.03))
    ]
    assert numbers_of(found[0]) == numbers_of(found[1])
    assert numbers_of(found[0]) != numbers_of(found[2])


def test_a_head_that_fits_is_kept_and_another_is_new(tmp_path: Path, encoder: str) -> None:
    tokenizer = load_tokenizer(encoder)
    for labels, expected in ((2, []), (5, ["classifier.bias", "classifier.weight"])):
        folder = tmp_path / str(labels)
        model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=labels)
        model.save_pretrained(folder)
        config = configure(tmp_path, str(folder))
        task = load_task(config.data, tokenizer)
        _, new, _ = build_classifier(config, task, tokenizer, torch.device("cpu"))
        assert new == expected


def test_defaults_are_the_papers_and_follow_what_is_given() -> None:
    def optim(*words: str) -> FinetuneOptimConfig:
        return parse_finetune(["finetune", *words]).optim

    assert (optim("--optim.rank", "4").scale, optim("--optim.rank", "8").scale, optim().update_proj_gap) == (4, 2, 500)
    assert (optim().gradients, optim("--optim.preset", "fira").gradients) == ("project", "hold")
    assert optim("--optim.preset", "apollo").scale == 1.0
    assert optim("--optim.scale", "0.5").scale == 0.5
    assert [*FINETUNE_SECTIONS, "parallel"] == list(SECTIONS)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--run.seeds", "[1, 1]"], "run.seeds=[1, 1] must be different"),
        (["--run.epochs", "0"], "run.epochs=0"),
        (["--run.micro_batch", "3"], "does not divide run.batch_size=16"),
        (["--optim.gradients", "update", "--run.micro_batch", "8"], "optim.gradients=update takes one"),
        (["--model.baseline", "lora"], "use optim.preset=adamw"),
        (["--optim.rank", "0"], "optim.rank=0"),
        (["--data.columns", "[a, b, c]"], "one or two columns"),
        (["--data.metric", "speed"], "--data.metric"),
        (["--run.steps", "3"], "--run.steps"),
        (["--model.name", "no/such/model"], "model.name='no/such/model'"),
        ([], "no data"),
    ],
)
def test_a_wrong_command_is_one_line_and_leaves_nothing(
    tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--model.name", encoder, "--run.out", str(tmp_path / "run"), *words])
    shown = capsys.readouterr().err
    assert stop.value.code == 2
    assert shown.startswith("subspan: error: ")
    assert shown.count("\n") == 1
    assert named in shown
    assert not (tmp_path / "run").exists()
