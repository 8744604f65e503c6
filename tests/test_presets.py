"""What each preset is made of, and that a configuration reaches the optimizer whole."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import subspan
from subspan.optim.presets import FULL_RANK, PRESETS
from subspan.optim.projectors import SVD, Random, SubspaceIteration
from subspan.optim.rules import Adafactor, Adam, ColumnNorm, Lion, Muon, SGDMomentum, SignSGD
from subspan.training.config import OptimConfig
from subspan.training.optimizers import groups_of, make_optimizer

FP32, INT8, INT4 = torch.float32, torch.int8, torch.int4
USUAL = {
    "rule": Adam(),
    "dense_rule": Adam(),
    "projector": SubspaceIteration(),
    "combine": None,
    "feedback": None,
    "moments": None,
    "state_dtype": FP32,
    "dense_state_dtype": FP32,
    "basis_dtype": None,
    "stochastic_rounding": False,
}
MADE_OF = {
    "galore": {},
    "galore8bit": {"state_dtype": INT8, "dense_state_dtype": INT8},
    "qgalore": {"state_dtype": INT8, "dense_state_dtype": INT8, "basis_dtype": INT4, "stochastic_rounding": True},
    "paper": {
        **dict.fromkeys(("rule", "dense_rule"), Adam((0.9, 0.999), 1e-6, uncorrected_eps=True)),
        **dict.fromkeys(("state_dtype", "dense_state_dtype")),
        "projector": SVD(),
    },
    "galore_adafactor": dict.fromkeys(("rule", "dense_rule"), Adafactor()),
    "galore_lion": dict.fromkeys(("rule", "dense_rule"), Lion()),
    "galore_sgd": dict.fromkeys(("rule", "dense_rule"), SGDMomentum(0.9)),
    "fira": {"combine": subspan.Fira()},
    "frugal": {"combine": subspan.Frugal(), "moments": "reset"},
    "apollo": {"combine": subspan.Apollo(), "projector": Random()},
    "apollo_mini": {"combine": subspan.Apollo(by="tensor"), "projector": Random()},
    "ldadam": {"feedback": subspan.Feedback(), "moments": "transport", "state_dtype": INT8},
    "adamw": {},
    "adamw8bit": {"state_dtype": INT8, "dense_state_dtype": INT8},
    "adafactor": dict.fromkeys(("rule", "dense_rule"), Adafactor()),
    "muon": {"rule": Muon()},
    "subspan": {"rule": Muon(), "state_dtype": INT8},
    "sign_sgd": {"rule": SignSGD()},
    "scale_sgd": {"rule": ColumnNorm()},
}


def net() -> nn.Module:
    """A block to project and a head."""
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8)]), "head": nn.Linear(8, 4)})


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_preset_is_made_of(preset: str) -> None:
    optimizer = make_optimizer(net(), OptimConfig(preset=preset, rank=2), seed=0)  # type: ignore[arg-type]
    found = {name: getattr(optimizer, name) for name in USUAL if name != "moments"}
    assert found | {"moments": optimizer.refresh.moments} == USUAL | MADE_OF[preset]
    assert any("rank" in group for group in optimizer.param_groups) == (preset not in FULL_RANK)


def test_scales_of_presets() -> None:
    published = {
        "galore": 0.25,
        "fira": 0.25,
        "frugal": 1.0,
        "apollo": 1.0,
        "apollo_mini": math.sqrt(128),
        "ldadam": 1.0,
    }
    for preset, scale in published.items():
        assert groups_of(net(), OptimConfig(preset=preset, rank=1))[0]["scale"] == scale  # type: ignore[arg-type]
    assert [OptimConfig(preset=preset).update_proj_gap for preset in ("galore", "ldadam")] == [200, 1]  # type: ignore[arg-type]
    assert OptimConfig(preset="apollo_mini", rank=128).scale == 1.0  # steps of one size at every rank


def test_every_field_of_a_configuration_reaches_the_optimizer() -> None:
    optim = OptimConfig(
        preset="galore",
        lr=0.02,
        dense_lr=0.03,
        rank=3,
        scale=0.7,
        update_proj_gap=11,
        adaptive_refresh=0.6,
        max_update_proj_gap=44,
        proj_type="left",
        projector="random",
        moments="transport",
        moments_gate=0.4,
        align=True,
        gradients="hold",
        targets=["blocks"],
        betas=[0.8, 0.9],
        eps=1e-5,
        weight_decay=0.05,
        max_grad_norm=2.0,
        state_dtype="bfloat16",
        basis_dtype="bfloat16",
        dense_rule="lion",
        dense_state_dtype="int8",
        stochastic_rounding=True,
        compile=True,
    )
    usual = OptimConfig()
    assert [f.name for f in dataclasses.fields(optim) if getattr(optim, f.name) == getattr(usual, f.name)] == ["preset"]
    optimizer = make_optimizer(net(), optim, seed=5, stagger=7)
    refresh = {"first": "random", "stagger": 7, "adaptive": 0.6, "max_gap": 44}
    assert optimizer.refresh == subspan.Refresh(**refresh, moments="transport", gate=0.4, align=True, seed=5)  # type: ignore[arg-type]
    assert (optimizer.rule, optimizer.dense_rule) == (Adam((0.8, 0.9), 1e-5), Lion())
    assert (optimizer.state_dtype, optimizer.dense_state_dtype) == (torch.bfloat16, INT8)
    assert (optimizer.basis_dtype, optimizer.projector) == (torch.bfloat16, Random())
    assert (optimizer.gradients, optimizer.max_grad_norm) == ("hold", 2.0)
    assert (optimizer.stochastic_rounding, optimizer.compile) == (True, True)
    projected, dense = optimizer.param_groups[:2]
    keys = ("lr", "rank", "scale", "update_proj_gap", "proj_type", "weight_decay")
    assert [projected[key] for key in keys] == [0.02, 3, 0.7, 11, "left", 0.05]
    assert projected["param_names"] == ["blocks.0.weight"]
    assert dense["lr"] == 0.03


def test_dense_parameters_of_an_adam_preset_have_its_adam() -> None:
    """Its betas and eps, and the reference's conventions where it follows them."""
    for preset, rule in (("paper", Adam(eps=1e-6, uncorrected_eps=True)), ("galore_lion", Adam()), ("muon", Adam())):
        optim = OptimConfig(preset=preset, rank=2, dense_rule="adam")  # type: ignore[arg-type]
        assert make_optimizer(net(), optim, seed=0).dense_rule == rule
    optim = OptimConfig(rank=2, betas=[0.8, 0.9], eps=1e-5, dense_rule="adam")
    assert make_optimizer(net(), optim, seed=0).dense_rule == Adam((0.8, 0.9), 1e-5)
