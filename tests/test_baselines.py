"""LoRA, ReLoRA and factorized weights: what is trained, what comes out, and that runs resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import subspan
from subspan.plan import plan_memory
from subspan.training.baselines import Factorized, add_baseline, merge, restart_adapters, restart_factor
from subspan.training.models import build_model
from subspan.training.optimizers import groups_of
from subspan.training.trainer import train

pytest.importorskip("peft")
KINDS = ("lora", "relora", "factorized")


def configure(folder: Path, kind: str, *, rank: int = 4, steps: int = 20, **model: Any) -> Any:
    return tiny_config(
        folder,
        model={"baseline": kind, **({"merge_every": 8, "rewarm_steps": 3} if kind == "relora" else {}), **model},
        optim={"preset": "adamw", "lr": 0.01, "rank": rank},
        run={"steps": steps},
    )


def made(folder: Path, kind: str, **options: Any) -> tuple[Any, Any, Any]:
    """A model before and after `add_baseline`, and its configuration."""
    config = configure(folder, kind, **options)
    torch.manual_seed(0)
    plain = build_model("llama-9m", vocab_size=200, seq_len=16, overrides=config.model.overrides)
    torch.manual_seed(0)
    model = build_model("llama-9m", vocab_size=200, seq_len=16, overrides=config.model.overrides)
    add_baseline(model, config)
    return plain, model, config


IDS = torch.arange(12).view(1, 12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train_rest", [True, False])
def test_what_is_trained(tmp_path: Path, kind: str, train_rest: bool) -> None:
    _, model, _ = made(tmp_path, kind, train_rest=train_rest)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    thin = {name for name in trained if ".lora_" in name or name.endswith((".A.weight", ".B.weight"))}
    assert len(thin) == 2 * 7 * 2  # two of each of seven matrices in two blocks
    rest = trained - thin
    assert not any("proj" in name for name in rest)
    assert any("embed_tokens" in name for name in rest) == train_rest
    assert bool(rest) == train_rest


@pytest.mark.parametrize("kind", KINDS)
def test_rank_1_has_the_rate_of_matrices(tmp_path: Path, kind: str) -> None:
    _, model, config = made(tmp_path, kind, rank=1)
    names = {name for name, _ in groups_of(model, config.optim)[0]["params"]}
    assert len(names) == 2 * 7 * 2


@pytest.mark.parametrize("kind", ["lora", "relora"])
def test_adapters_begin_as_nothing(tmp_path: Path, kind: str) -> None:
    plain, model, _ = made(tmp_path, kind)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)


def test_factors_begin_as_the_best_approximation(tmp_path: Path) -> None:
    plain, model, _ = made(tmp_path, "factorized", rank=1000)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)
    layer = nn.Linear(10, 6)
    U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    torch.testing.assert_close(Factorized(layer, 2).merged().weight.detach(), (U[:, :2] * S[:2]) @ Vh[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_merged_models_are_ordinary_and_compute_the_same(tmp_path: Path, kind: str) -> None:
    plain, model, _ = made(tmp_path, kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    expected = model.eval()(IDS).logits
    merge(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-4)


def test_adapters_of_layers_that_lie_the_other_way(tmp_path: Path) -> None:
    """GPT-2's Conv1D."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16)).eval()
    names = model.state_dict().keys()
    with pytest.raises(ValueError, match=r"cannot factorize transformer\.h\.0\..*: use lora"):
        add_baseline(model, configure(tmp_path, "factorized"))
    config = configure(tmp_path, "relora")
    add_baseline(model, config)
    optimizer = subspan.GaLoreAdamW(subspan.param_groups(model, rank=None, verbose=False), 0.01)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    expected = model(IDS).logits
    restart_adapters(model, optimizer, seed=1)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-4)
    merge(model)
    assert model.state_dict().keys() == names
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-4)


def test_a_restart_changes_nothing_but_where_things_are(tmp_path: Path) -> None:
    _, model, config = made(tmp_path, "relora")
    groups = subspan.param_groups(model, rank=None, verbose=False)
    optimizer = subspan.GaLoreAdamW(groups, 0.01)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = model(IDS).logits
    random = torch.get_rng_state()
    restart_adapters(model, optimizer, seed=1)
    assert torch.get_rng_state().equal(random)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-3, atol=1e-4)
    for name, p in model.named_parameters():
        if ".lora_B" in name:
            assert not p.any()
        if p.requires_grad:
            moments = [optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq", "step")]
            assert all(bool(x.any()) == (".lora_" not in name) for x in moments)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert config.model.baseline == "relora"


def test_the_jagged_schedule(tmp_path: Path) -> None:
    config = configure(tmp_path, "relora")
    factors = [restart_factor(step, config) for step in range(1, 21)]
    third = pytest.approx(1 / 3)
    assert factors[:8] == [1.0] * 8
    assert factors[8:12] == [third, pytest.approx(2 / 3), 1.0, 1.0]
    assert factors[16] == third
    assert {restart_factor(step, configure(tmp_path, "lora")) for step in range(1, 21)} == {1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_runs_learn_resume_and_export(tmp_path: Path, kind: str) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = configure(tmp_path / "whole", kind)
    summary = train(whole)
    assert summary["valid_loss"] < summary["first_loss"] - 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "run" / "model")
    assert not any("lora" in name or ".A." in name for name in model.state_dict())

    parts = configure(tmp_path / "parts", kind)
    parts.run.checkpoint_every = 10
    train(parts)
    (checkpoint,) = (
        path for path in (tmp_path / "parts" / "run" / "checkpoints").iterdir() if path.name.endswith("10")
    )
    again = configure(tmp_path / "parts", kind)
    again.run.out, again.resume = str(tmp_path / "again"), str(checkpoint)
    assert train(again)["valid_loss"] == summary["valid_loss"]


def test_a_run_of_relora_extended_at_a_merge_restarts_there(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, parts = (configure(tmp_path / name, "relora") for name in ("whole", "parts"))
    for config in (whole, parts):
        config.run.min_lr_ratio, config.run.steps = 1.0, 12
    summary = train(whole)
    parts.run.steps = 8  # merge_every
    train(parts)
    parts.run.steps, parts.resume = 12, "auto"
    assert train(parts)["valid_loss"] == summary["valid_loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_memory_can_be_planned(tmp_path: Path, kind: str) -> None:
    config = configure(tmp_path, kind)
    full = tiny_config(tmp_path, optim={"preset": "adamw"})
    assert 0 < plan_memory(config).optimizer < plan_memory(full).optimizer


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.baseline=lora has thin weights of its own.*use optim\.preset=adamw"):
        tiny_config(tmp_path, model={"baseline": "lora"}, optim={"preset": "galore"})
    with pytest.raises(ValueError, match=r"model\.int8=true and model\.baseline=lora exclude each other"):
        tiny_config(tmp_path, model={"baseline": "lora", "int8": True}, optim={"preset": "adamw"})
