"""Presets: ProjectedOptimizer with a rule, a few lines each.

All take parameter groups (`param_groups(model, rank=...)`), the learning rate and `ProjectedOptimizer`'s own keywords
(dense_rule, projector, refresh, combine, gradients, weight_decay, max_grad_norm, state_dtype, dense_state_dtype, basis_dtype,
stochastic_rounding, compile).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from subspan.optim.combine import Apollo, Fira, Frugal
from subspan.optim.feedback import Feedback
from subspan.optim.optimizer import ProjectedOptimizer
from subspan.optim.projectors import SVD, Random
from subspan.optim.refresh import Refresh
from subspan.optim.rules import Adafactor, Adam, ColumnNorm, Lion, Muon, SGDMomentum, SignSGD


class GaLoreAdamW(ProjectedOptimizer):
    """GaLore with AdamW (arXiv 2403.03507): moments in fp32, eps and the order of weight decay as in torch.optim.AdamW.

    A dense group is torch.optim.AdamW. galore_torch puts eps before the bias correction and decays after the update:
    for those conventions use `presets.paper` or `subspan.compat`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, rule=Adam(tuple(betas), eps), **kwargs)  # type: ignore[arg-type]


class GaLoreAdamW8bit(GaLoreAdamW):
    """8-bit GaLore (arXiv 2403.03507): GaLoreAdamW with its moments, dense parameters' too, in 8 bits, block by block.

    With groups that are all dense it is 8-bit AdamW (arXiv 2110.02861). `param_groups(proj_type="reverse_std")` puts the basis
    on the long side: with a bf16 basis both sides take the same bytes, with a 4-bit one the long side takes less.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(params, lr, **{"state_dtype": torch.int8, **kwargs})


class QGaLoreAdamW(GaLoreAdamW8bit):
    """Q-GaLore (arXiv 2407.08296): 8-bit moments, packed 4-bit basis, weights in 8 bits with stochastic rounding.

    The weights are the model's: `subspan.quantize_weights(model)` before `param_groups`. bf16 weights stay bf16 and are
    rounded at random as well. Refreshes come every `update_proj_gap` steps; the paper's lazy ones are not part of it.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(params, lr, **{"basis_dtype": torch.int4, "stochastic_rounding": True, **kwargs})  # type: ignore[attr-defined]


class GaLoreAdafactor(ProjectedOptimizer):
    """GaLore with Adafactor: no first moment, no parameter scaling, a given lr. State per matrix: d r + r + k."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        eps: float = 1e-30,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, rule=Adafactor(eps, clip_threshold, decay_rate), **kwargs)


class GaLoreLion(ProjectedOptimizer):
    """GaLore with Lion: one moment. State per matrix: d r + r k."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), **kwargs: Any
    ) -> None:
        super().__init__(params, lr, rule=Lion(tuple(betas)), **kwargs)  # type: ignore[arg-type]


class GaLoreSGD(ProjectedOptimizer):
    """GaLore with SGD and momentum. State per matrix: d r + r k; d r with momentum=0."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, momentum: float = 0.9, nesterov: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(params, lr, rule=SGDMomentum(momentum, nesterov), **kwargs)


def paper(
    params: Iterable[Any],
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    **kwargs: Any,
) -> ProjectedOptimizer:
    """GaLore as the authors' code computes it, and so as the published numbers were made.

    Exact SVD of the current gradient every T steps, state in the parameter's dtype, eps 1e-6 before the bias correction,
    weight decay after the update, square matrices on the right, rounding noise not masked, the first basis from the gradient
    in every mode of `gradients`.
    """
    rule = Adam(tuple(betas), eps, uncorrected_eps=True)  # type: ignore[arg-type]
    refresh = kwargs.pop("refresh", None) or Refresh()
    kwargs["refresh"] = replace(refresh, first=refresh.first or "gradient")
    own = {"projector": SVD(), "state_dtype": None, "decay_after_update": True, "mask_null": False}
    return ProjectedOptimizer(params, lr, rule=rule, **{**own, **kwargs})


def fira(params: Iterable[Any], lr: float = 1e-2, **kwargs: Any) -> ProjectedOptimizer:
    """Fira (arXiv 2410.01623): GaLore with AdamW, and the scaled residual (`combine.Fira`)."""
    return GaLoreAdamW(params, lr, **{"combine": Fira(), **kwargs})


def frugal(params: Iterable[Any], lr: float = 1e-3, **kwargs: Any) -> ProjectedOptimizer:
    """FRUGAL (arXiv 2411.07837): AdamW in the subspace, signs outside of it, moments reset at refreshes. Groups want scale=1."""
    refresh = kwargs.pop("refresh", None) or Refresh()
    kwargs["refresh"] = replace(refresh, moments=refresh.moments or "reset")
    return GaLoreAdamW(params, lr, **{"combine": Frugal(), **kwargs})


def apollo(params: Iterable[Any], lr: float = 1e-2, **kwargs: Any) -> ProjectedOptimizer:
    """APOLLO (arXiv 2412.05270): the gradient, each channel scaled as AdamW scales its projection. Groups want scale=1."""
    return GaLoreAdamW(params, lr, **{"combine": Apollo(), "projector": Random(), **kwargs})


def apollo_mini(params: Iterable[Any], lr: float = 1e-2, **kwargs: Any) -> ProjectedOptimizer:
    """APOLLO-Mini: one scale for each matrix. Groups want rank=1 and scale=sqrt(128)."""
    return GaLoreAdamW(params, lr, **{"combine": Apollo(by="tensor"), "projector": Random(), **kwargs})


def ldadam(params: Iterable[Any], lr: float = 3e-3, **kwargs: Any) -> ProjectedOptimizer:
    """LDAdam (arXiv 2410.16103) in 8 bits: AdamW in a subspace that follows the momentum, which is transported, and with error
    feedback. Groups want update_proj_gap=1 and scale=1."""
    refresh = kwargs.pop("refresh", None) or Refresh()
    kwargs["refresh"] = replace(refresh, moments=refresh.moments or "transport")
    own = {"feedback": Feedback(), "state_dtype": torch.int8, "dense_state_dtype": torch.float32}
    return GaLoreAdamW(params, lr, **{**own, **kwargs})


def adafactor(params: Iterable[Any], lr: float = 1e-3, **kwargs: Any) -> ProjectedOptimizer:
    """Full-rank Adafactor without a first moment, with a given lr."""
    return GaLoreAdafactor(params, lr, **kwargs)


def muon(params: Iterable[Any], lr: float = 2e-2, **kwargs: Any) -> ProjectedOptimizer:
    """Muon for the matrices of `param_groups(rank=None)`, AdamW for everything else, which wants a learning rate of its own."""
    return ProjectedOptimizer(params, lr, rule=Muon(), **{"dense_rule": Adam(), **kwargs})


def subspan(params: Iterable[Any], lr: float = 1e-2, **kwargs: Any) -> ProjectedOptimizer:
    """Ours: Muon with its momentum in 8 bits for the matrices of `param_groups(rank=None)`, AdamW in fp32 for the rest.

    A byte a value of a matrix: a third of GaLore's fp32 state at a quarter of the rank. state_dtype=torch.int4 halves it and
    gives most of Muon's gain away; dense_state_dtype=torch.int8 saves more, at no cost in short runs (benchmarks/quality).
    A step takes up to 30 m^2 n operations for a matrix (m, n) with m <= n, where a batch of t tokens takes 6 m n t: see
    docs/choosing.md for when that is too much.
    """
    own = {"dense_rule": Adam(), "state_dtype": torch.int8, "dense_state_dtype": torch.float32}
    return ProjectedOptimizer(params, lr, rule=Muon(), **{**own, **kwargs})


def sign_sgd(params: Iterable[Any], lr: float = 1e-3, **kwargs: Any) -> ProjectedOptimizer:
    """Signs of the gradient for the matrices of `param_groups(rank=None)`, AdamW for everything else: almost no state."""
    return ProjectedOptimizer(params, lr, rule=SignSGD(), **{"dense_rule": Adam(), **kwargs})


def scale_sgd(params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.9, **kwargs: Any) -> ProjectedOptimizer:
    """SCALE (arXiv 2506.16659): columns of the gradient at equal length for every matrix, embeddings too, with momentum in the
    last layer alone; AdamW for vectors. Over `param_groups(rank=None, split=True)`.

    Not `scale`, the preset's name: that is the factor on projected updates. A tied embedding is the last layer.
    """
    groups = list(params)
    names = {group.get("name") for group in groups if isinstance(group, dict)}
    if "head" not in names:
        raise ValueError(
            "scale_sgd found no group named 'head', the last layer: give it param_groups(model, rank=None, split=True)"
        )
    turned = ColumnNorm(dim=-2)
    rules = {
        "projected (in, out)": turned,
        "dense (in, out)": turned,
        "dense": ColumnNorm(),
        "head": ColumnNorm(momentum),
    }
    rules = {name: rule for name, rule in rules.items() if name in names}
    return ProjectedOptimizer(groups, lr, rule=ColumnNorm(), rules=rules, **{"dense_rule": Adam(), **kwargs})


PRESETS: dict[str, Callable[..., ProjectedOptimizer]] = {
    "galore": GaLoreAdamW,
    "galore8bit": GaLoreAdamW8bit,
    "qgalore": QGaLoreAdamW,
    "paper": paper,
    "galore_adafactor": GaLoreAdafactor,
    "galore_lion": GaLoreLion,
    "galore_sgd": GaLoreSGD,
    "fira": fira,
    "frugal": frugal,
    "apollo": apollo,
    "apollo_mini": apollo_mini,
    "ldadam": ldadam,
    "adamw": GaLoreAdamW,  # FULL_RANK: over param_groups(rank=None), every group dense
    "adamw8bit": GaLoreAdamW8bit,
    "adafactor": adafactor,
    "muon": muon,
    "subspan": subspan,
    "sign_sgd": sign_sgd,
    "scale_sgd": scale_sgd,
}

FULL_RANK = ("adamw", "adamw8bit", "adafactor", "muon", "subspan", "sign_sgd", "scale_sgd")
"""The presets that project nothing: baselines."""

FULL_GRADIENT = ("fira", "frugal", "apollo", "apollo_mini", "ldadam")
"""The presets that need the full gradient of what they project: not with gradients="project"."""

SCALES = {"frugal": 1.0, "apollo": 1.0, "ldadam": 1.0}
"""The `scale` of their papers, where it is not GaLore's 0.25."""

GAPS = {"ldadam": 1}
"""The `update_proj_gap` of their papers, where it is not that of GaLore."""


def scale_of(preset: str, rank: int, usual: float) -> float:
    """The `scale` of the preset's paper, `usual` for GaLore's. APOLLO-Mini's is sqrt(128) at its rank of 1; ||U|| / ||R||
    grows with the square root of the rank, so at another rank steps of the same size want sqrt(128 / rank)."""
    return math.sqrt(128 / rank) if preset == "apollo_mini" else SCALES.get(preset, usual)
