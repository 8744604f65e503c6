"""ProjectedOptimizer: a projector (where to look) and a rule (how to step) as one ordinary torch optimizer.

For every parameter of a group with a `rank`, once a step (docs/theory.md; arXiv 2403.03507, Algorithm 2):

    A = orient(G)                      (d, k)
    Q = projector.basis(G, ...)        (d, r)    only every `update_proj_gap` steps
    R = Q^T A                          (r, k)
    U = rule.update(R)                 (r, k)    moments live here
    W <- (1 - lr decay) W - lr scale orient(Q U)          one in-place product, no full-size temporary

A group without a `rank` is dense: U = rule.update(G), W <- (1 - lr decay) W - lr U.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from subspan.optim.projectors import (
    Projector,
    Side,
    SubspaceIteration,
    check_proj_type,
    effective_rank,
    mask_null_directions,
    orient,
    pick_side,
    project,
    random_basis,
)
from subspan.optim.rules import Adam, Rule

VIEWS = ("matrix", "conv", "batch")


@dataclass(frozen=True)
class Refresh:
    """When bases change: every `update_proj_gap` (T, a group key) steps, and before the first T steps are over as said here.

    first="gradient" (the paper): every basis is found from the gradient of step 0.
    first="random": bases are seeded random orthonormal at construction, and parameter i of N has its first true refresh at
        step floor(i S / N), S = `stagger` (None: T), so that no step stalls on all of them.
    seed: of every random draw of the optimizer; equal on all processes.
    """

    first: Literal["gradient", "random"] = "gradient"
    stagger: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.first not in ("gradient", "random"):
            raise ValueError(f"first={self.first!r} is unknown: use 'gradient' or 'random'")
        if self.stagger is not None:
            if self.first == "gradient":
                raise ValueError("stagger needs a basis before the first refresh: set first='random' or drop stagger")
            _check_whole("stagger", self.stagger)


class ProjectedOptimizer(torch.optim.Optimizer):
    """Trains projected parameters in a low-rank subspace of their gradient and dense parameters as usual.

    Args:
        params: parameters, (name, parameter) pairs or groups, as for any torch optimizer; `param_groups` makes them from a
            model. Keys of a group: `lr`, `weight_decay`; `rank` (its presence is what projects the group), `update_proj_gap` T
            (200), `scale` (0.25), `proj_type` (std, reverse_std, left, right), `view` for weights of more than two dimensions:
            "conv" (first dimension x the rest) or "batch" (leading dimensions are a batch of matrices).
        lr: learning rate, a float (a 0-d CPU tensor is accepted).
        rule: `Adam()`, `Adafactor()`, `Lion()`, `SGDMomentum()`.
        projector: `SubspaceIteration()`, `SVD()`, `RandomizedSVD()`, `Random()`.
        refresh: see `Refresh`.
        weight_decay: decoupled, as in torch.optim.AdamW: W <- (1 - lr decay) W before the update; `scale` does not touch it.
        decay_after_update: decay the new update as well, as galore_torch does.
        max_grad_norm: clip to this norm, that of (R of projected, G of dense parameters); None: no clipping. Dense gradients
            are clipped in place, as torch.nn.utils.clip_grad_norm_ does; those of projected parameters stay as they are.
        state_dtype: dtype of the rule's state; None: the parameter's.
        basis_dtype: dtype of the basis; None: the parameter's.
        mask_null: count rows of R that hold only rounding noise as zero (`mask_null_directions`).

    State is tensors only and exists from construction: `step` and `refreshes` (0-d, CPU), `basis` (d, r), the rule's.
    `grad_norm` is a 0-d tensor, the norm of the last step before clipping; reading it is the caller's host sync, `step()`
    makes none outside refreshes. A gradient that is not finite counts as zero (decided per parameter, with `max_grad_norm`
    over all of them) and is never used for a basis.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rule: Rule | None = None,
        projector: Projector | None = None,
        refresh: Refresh | None = None,
        weight_decay: float = 0.0,
        decay_after_update: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: torch.dtype | None = torch.float32,
        basis_dtype: torch.dtype | None = None,
        mask_null: bool = True,
    ) -> None:
        for name, dtype in (("state_dtype", state_dtype), ("basis_dtype", basis_dtype)):
            if dtype is not None and not dtype.is_floating_point:
                raise ValueError(f"{name}={dtype} must be a floating dtype, such as torch.float32 or torch.bfloat16")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm!r} must be positive: use None for no clipping")
        self.rule = Adam() if rule is None else rule
        self.projector = SubspaceIteration() if projector is None else projector
        self.refresh = Refresh() if refresh is None else refresh
        self.decay_after_update = decay_after_update
        self.max_grad_norm = max_grad_norm
        self.state_dtype = state_dtype
        self.basis_dtype = basis_dtype
        self.mask_null = mask_null
        self.grad_norm: Tensor = torch.zeros(())
        self.refresh_seconds = 0.0
        # state["step"] and state["refreshes"] as Python ints, so that asking whether a refresh is due costs no host sync
        self._steps: dict[Tensor, int] = {}
        self._refreshes: dict[Tensor, int] = {}
        self._index: dict[Tensor, int] = {}  # position among the projected parameters: seeds and staggering
        defaults = {"lr": lr, "weight_decay": weight_decay, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        super().__init__(params, defaults)

    # ------------------------------------------------------------------------------------------- construction

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; checks the group's values and creates the state of its parameters."""
        for key in ("betas", "eps", "momentum"):
            if key in param_group:
                raise ValueError(f"{key} in a parameter group has no effect: give it to the optimizer's rule instead")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            names = group.get("param_names", [f"parameter {i}" for i in range(len(group["params"]))])
            _check_group(group, names)
        except ValueError:
            self.param_groups.pop()
            raise
        for p in group["params"]:
            self._init_state(group, p)

    def _init_state(self, group: dict[str, Any], p: Tensor) -> None:
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32)}
        shape = p.shape
        if "rank" in group:
            matrix = _matrix(p, group)
            side = pick_side(matrix.shape, group["proj_type"])
            rank = effective_rank(group["rank"], matrix.shape)
            *batch, d, k = orient(matrix, side).shape
            shape = torch.Size((*batch, rank, k))
            self._index[p] = len(self._index)
            self._refreshes[p] = 0
            state["refreshes"] = torch.zeros((), dtype=torch.float32)
            state["basis"] = torch.empty((*batch, d, rank), dtype=self.basis_dtype or p.dtype, device=p.device)
            if self.refresh.first == "random" and not p.is_meta:
                state["basis"].copy_(random_basis((*batch, d, rank), self._seed(p), p.device))
            else:  # orthonormal from the start, although the first step replaces it
                state["basis"].copy_(torch.eye(d, rank, device=p.device))
        template = torch.empty(shape, dtype=self.state_dtype or p.dtype, device=p.device)
        state.update(self.rule.init(template))
        self.state[p] = state
        self._steps[p] = 0

    # --------------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. `closure` is run with gradients enabled, its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norms: list[Tensor] = []
        waiting: list[tuple[dict[str, Any], Tensor, Tensor]] = []
        for group, p in self._parameters():
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise ValueError("sparse gradients are not supported: use nn.Embedding(sparse=False)")
            R = self.project(group, p)
            norms.append(torch.linalg.vector_norm(R, dtype=torch.promote_types(R.dtype, torch.float32)))
            if self.max_grad_norm is None:  # nothing to wait for: R lives for one parameter only
                self.apply(group, p, R.masked_fill_(~norms[-1].isfinite(), 0))
            else:
                waiting.append((group, p, R))
        if norms:
            self.grad_norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        if self.max_grad_norm is not None:
            finite = self.grad_norm.isfinite()
            clip = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
            for group, p, R in waiting:
                R.mul_(clip.to(R.device)).masked_fill_(~finite.to(R.device), 0)
                self.apply(group, p, R)
        return loss

    def project(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """R (r, k) of a projected parameter, after the refresh if one is due; of a dense one p.grad itself."""
        assert p.grad is not None
        if "rank" not in group:
            return p.grad
        G, Q = _matrix(p.grad.contiguous(), group), self.state[p]["basis"]
        side = pick_side(G.shape, group["proj_type"])
        if self._refresh_due(group, p):
            self._refresh_basis(p, G, side, Q)
        R = project(orient(G, side), Q.to(G.dtype))
        return mask_null_directions(R) if self.mask_null else R

    def apply(self, group: dict[str, Any], p: Tensor, R: Tensor) -> None:
        """Update p from its low-rank gradient R (r, k), or from its gradient if it is dense."""
        state = self.state[p]
        state["step"].add_(1)
        self._steps[p] += 1
        U = self.rule.update(R, state, state["step"])
        lr = float(group["lr"])
        keep = 1 - lr * group["weight_decay"]
        size = lr * keep if self.decay_after_update else lr
        if "rank" not in group:
            if keep != 1:
                p.mul_(keep)
            p.add_(U, alpha=-size)
            return
        Q, W = state["basis"], _matrix(p, group)
        W = orient(W, pick_side(W.shape, group["proj_type"]))
        product = W.addmm_ if W.ndim == 2 else W.baddbmm_
        product(Q.to(W.dtype), U.to(W.dtype), beta=keep, alpha=-size * group["scale"])

    # ------------------------------------------------------------------------------------------------ refresh

    def _refresh_due(self, group: dict[str, Any], p: Tensor) -> bool:
        step: int = self._steps[p]
        gap: int = group["update_proj_gap"]
        if self.refresh.first == "gradient":
            # A first gradient of zero (a zero-initialised layer above) finds no basis: then the next one does.
            return step % gap == 0 or self._refreshes[p] == 0
        offset = self._index[p] * min(self.refresh.stagger or gap, gap) // len(self._index)
        return step >= offset and (step - offset) % gap == 0

    def _refresh_basis(self, p: Tensor, G: Tensor, side: Side, Q: Tensor) -> None:
        """Q <- the projector's basis for G, in place; untouched if G is zero or not finite (looking at G is a host sync)."""
        begin = time.perf_counter()
        largest = float(torch.linalg.vector_norm(G, ord=math.inf))
        if math.isfinite(largest) and largest > 0:
            warm = self._refreshes[p] > 0 or self.refresh.first == "random"
            self._refreshes[p] += 1
            self.state[p]["refreshes"].add_(1)
            Q.copy_(self.projector.basis(G, side, Q.shape[-1], Q if warm else None, self._seed(p)))
        self.refresh_seconds += time.perf_counter() - begin

    def _seed(self, p: Tensor) -> int:
        """One seed for each (parameter, refresh), the same on every process and after a resume."""
        return ((self.refresh.seed * 1_000_003 + self._index[p]) * 1_000_003 + self._refreshes[p]) % 2**63

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                yield group, p

    # ------------------------------------------------------------------------------------------- state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the state that exists since construction; dtypes stay this optimizer's.

        torch would cast every state tensor to its parameter's dtype: fp32 moments of bf16 weights would lose 16 bits.
        Raises ValueError when groups, ranks or state shapes differ: nothing is loaded then.
        """
        own = [p for group in self.param_groups for p in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        if len(own) != len(saved):
            raise ValueError(
                f"state_dict has {len(saved)} parameters, the optimizer {len(own)}: build the same groups first"
            )
        pairs = []
        for p, index in zip(own, saved, strict=True):
            theirs, ours = state_dict["state"].get(index, {}), self.state[p]
            shapes = [{key: tuple(value.shape) for key, value in state.items()} for state in (theirs, ours)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"state of parameter {index} is {shapes[0]} in state_dict and {shapes[1]} here: "
                    "build the optimizer with the same rank, proj_type and rule"
                )
            pairs.append((ours, theirs))
        state = self.state
        super().load_state_dict({**state_dict, "state": {}})
        self.state = state
        for ours, theirs in pairs:
            for key, value in ours.items():
                value.copy_(theirs[key])
        self._steps = {p: int(self.state[p]["step"]) for p in own}
        self._refreshes = {p: int(self.state[p]["refreshes"]) for p in self._index}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()  # torch's keeps only groups and state: a deep copy would lose rule and projector


def _matrix(X: Tensor, group: dict[str, Any]) -> Tensor:
    """A parameter or its gradient as a matrix or a batch of matrices: a view of the same memory."""
    if group.get("view", "matrix") == "conv":
        return X.view(X.shape[0], -1)
    return X if X.ndim <= 3 else X.view(-1, *X.shape[-2:])


def _check_group(group: dict[str, Any], names: list[str]) -> None:
    for key in ("lr", "weight_decay"):
        value = float(group[key])
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{key}={value!r} must be a number of at least 0")
    for name, p in zip(names, group["params"], strict=True):
        if not p.is_floating_point():
            raise ValueError(f"{name} of dtype {p.dtype} cannot be trained: use a real floating dtype")
    if "rank" not in group:
        return
    _check_whole("rank", group["rank"])
    _check_whole("update_proj_gap", group["update_proj_gap"])
    check_proj_type(group["proj_type"])
    if isinstance(group["scale"], (str, bool)) or not math.isfinite(group["scale"]):
        raise ValueError(f"scale={group['scale']!r} must be a number: 0.25 is the paper's")
    view = group.get("view", "matrix")
    if view not in VIEWS:
        raise ValueError(f"view={view!r} is unknown: use one of {', '.join(VIEWS)}")
    for name, p in zip(names, group["params"], strict=True):
        shape = tuple(p.shape)
        if p.numel() == 0:
            raise ValueError(f"{name} of shape {shape} is empty: leave it out of groups with a rank")
        if p.ndim < 2:
            raise ValueError(f"{name} of shape {shape} is no matrix: put it in a group without rank")
        if p.ndim > 2 and view == "matrix":
            raise ValueError(
                f"{name} of shape {shape} is no matrix: set view='conv' (first x rest) or view='batch' in its group"
            )
        if p.ndim == 2 and view == "batch":
            raise ValueError(f"{name} of shape {shape} is one matrix: drop view='batch' from its group")
        if not p.is_contiguous():
            raise ValueError(
                f"{name} of shape {shape} is not contiguous: call .contiguous() before building the optimizer"
            )


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
