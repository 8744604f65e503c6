"""The optimizer that a configuration means."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from subspan.optim.groups import param_groups
from subspan.optim.optimizer import ProjectedOptimizer
from subspan.optim.presets import FULL_RANK, PRESETS
from subspan.optim.projectors import SVD, Random, RandomizedSVD, SubspaceIteration
from subspan.optim.refresh import Refresh
from subspan.optim.rules import Adafactor, Adam, Lion, Rule, SGDMomentum
from subspan.training.config import OptimConfig, TrainConfig

RULES: dict[str, type[Rule]] = {"adam": Adam, "adafactor": Adafactor, "lion": Lion, "sgd": SGDMomentum}
PROJECTORS = {"subspace_iteration": SubspaceIteration, "svd": SVD, "randomized_svd": RandomizedSVD, "random": Random}
OTHER_DENSE_RULE = ("galore_lion", "galore_sgd", "galore_adafactor", "adafactor")
"""Presets that step dense parameters with another rule than an Adam of their own."""


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer of `config.optim` over the parameter groups of `model`."""
    average_over = torch.distributed.group.WORLD if config.averages_low_rank else None
    return make_optimizer(
        model,
        config.optim,
        config.run.seed,
        autocast=torch.bfloat16 if config.run.autocast else None,
        average_over=average_over,
    )


def groups_of(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The parameter groups of `model`."""
    assert optim.scale is not None  # OptimConfig has filled them in
    assert optim.update_proj_gap is not None
    return param_groups(
        model,
        rank=None if optim.preset in FULL_RANK else optim.rank,
        targets=optim.targets,
        scale=optim.scale,
        update_proj_gap=optim.update_proj_gap,
        proj_type=optim.proj_type,
        dense_lr=optim.dense_lr,
        split=optim.preset == "scale_sgd",
        verbose=False,
    )


def make_optimizer(
    model: nn.Module,
    optim: OptimConfig,
    seed: int,
    stagger: int | None = None,
    groups: list[dict[str, Any]] | None = None,
    autocast: torch.dtype | None = None,
    **more: Any,
) -> ProjectedOptimizer:
    """The same by parts. stagger: steps within which every random first basis is replaced; None: the optimizer's own way.
    groups: None: `groups_of(model, optim)`. autocast: the dtype of the products that gradients come from; None: their own. more:
    for the optimizer."""
    assert optim.gradients is not None
    has_adam = optim.dense_rule == "adam" and optim.preset not in OTHER_DENSE_RULE
    given: dict[str, Any] = {
        "betas": tuple(optim.betas) if optim.betas else None,
        "eps": optim.eps,
        "projector": PROJECTORS[optim.projector]() if optim.projector else None,
        "state_dtype": getattr(torch, optim.state_dtype) if optim.state_dtype else None,
        "basis_dtype": getattr(torch, optim.basis_dtype) if optim.basis_dtype else None,
        "dense_rule": RULES[optim.dense_rule]() if optim.dense_rule and not has_adam else None,
        "dense_state_dtype": getattr(torch, optim.dense_state_dtype) if optim.dense_state_dtype else None,
        "stochastic_rounding": optim.stochastic_rounding,
        "max_grad_norm": optim.max_grad_norm or None,
        "mask_null": autocast if optim.preset != "paper" else None,
    }
    return PRESETS[optim.preset](
        groups_of(model, optim) if groups is None else groups,
        optim.lr,
        weight_decay=optim.weight_decay,
        refresh=Refresh(
            first="random" if stagger else None,
            stagger=stagger,
            adaptive=optim.adaptive_refresh,
            max_gap=optim.max_update_proj_gap,
            moments=optim.moments,
            gate=optim.moments_gate,
            align=optim.align,
            seed=seed,
        ),
        gradients=optim.gradients,
        compile=optim.compile,
        **more,
        **{key: value for key, value in given.items() if value is not None},
    )
