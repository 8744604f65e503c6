"""What refreshes find: how much of a gradient the old and the new basis hold, how far they lie apart, how many directions matter,
and what storing state in few bits changes of the update.

    watch = Diagnostics(optimizer, model)
    loss.backward()
    watch.before()
    optimizer.step()
    rows = watch.after()        # one for each basis that changed, plain numbers

Everything is read at refreshes, on what is there then: nothing is computed, and nobody waits, in a step without one. A
gradient is kept until `after`, as `gradients="project"` would otherwise free it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from subspan.optim.groups import as_matrix
from subspan.optim.int8 import Int8Weight
from subspan.optim.optimizer import ProjectedOptimizer
from subspan.optim.projectors import captured_energy, live_directions, orient, overlap, pick_side, project
from subspan.optim.quant import Store
from subspan.optim.sweep import OWN, sweep

FIELDS = {
    "stale": "share of the gradient's energy in the old basis",
    "captured": "share of the gradient's energy in the new basis",
    "overlap": "overlap of old and new basis",
    "median_angle": "median principal angle between them, degrees",
    "largest_angle": "largest principal angle between them, degrees",
    "stable_rank": "stable rank of the gradient",
    "moment_stable_rank": "stable rank of the first moment",
    "outside": "share of the update's energy outside of the new basis",
    "state_error": "error of the direction from storing moments once",
    "basis_error": "error of the new basis, as it is stored",
}
"""What a row says, besides the parameter's `name`. `moment_stable_rank` only where there is a first moment and it is not zero,
`outside` only with a combine: without one it is 0. In bf16 weights `outside` holds their rounding too.

`state_error`, only where moments are kept in less than fp32 (it is 0 elsewhere): ||U' - U|| / ||U||. From the moments as they are
now, the rule takes two more steps with this R; U is the second direction with fp32 moments, U' the one with moments that went
through codes (or bf16) between the two, as they do between any two steps.

`basis_error`: ||Q^T Q - I||_F / sqrt(r) of the basis as it is read: rounding in fp32, about 0.001 in bf16, 0.05 in 4 bits.
"""


class Diagnostics:
    """Watches the refreshes of `optimizer`; `model` gives the names.

    Raises ValueError for gradients="update", which leaves no gradient to read, and for another model.
    """

    def __init__(self, optimizer: ProjectedOptimizer, model: nn.Module) -> None:
        if optimizer.gradients == "update":
            raise ValueError(
                "diagnostics read gradients before step(), and gradients='update' leaves none: use gradients='project' or 'hold'"
            )
        self.optimizer = optimizer
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        if any(p not in self.names for group in optimizer.param_groups if "rank" in group for p in group["params"]):
            raise ValueError("model lacks parameters that optimizer projects: give the model that it trains")
        self._seen: list[tuple[Tensor, Tensor, Tensor, Tensor | None, float]] = []

    @torch.no_grad()
    def before(self) -> None:
        """Keep what is needed of the parameters whose basis the coming step changes. Call it after the backward pass."""
        optimizer = self.optimizer
        self._seen = [
            (
                p,
                p.grad,
                optimizer.basis(p).clone(),
                _values(p).clone() if optimizer.combine else None,
                float(optimizer.state[p]["refreshes"]),
            )
            for group in optimizer.param_groups
            if "rank" in group
            for p in group["params"]
            if p.grad is not None and optimizer.refresh_due(p)
        ]

    @torch.no_grad()
    def after(self) -> list[dict[str, Any]]:
        """A row of numbers for each of them whose basis did change. Call it after step()."""
        rows = [
            {"name": self.names[p], **self._row(p, G, old, W)}
            for p, G, old, W, count in self._seen
            if float(self.optimizer.state[p]["refreshes"]) > count
        ]
        self._seen = []
        return rows

    def _row(self, p: Tensor, G: Tensor, old: Tensor, W: Tensor | None) -> dict[str, float]:
        group, new = self.optimizer.group_of(p), self.optimizer.basis(p)
        X = as_matrix(G.contiguous(), group).float()
        side = pick_side(X.shape, group["proj_type"])
        A = orient(X, side)
        R, r = project(A, new), new.shape[-1]
        energy = A.square().sum((-2, -1))
        seen = energy > 0  # an expert without tokens has nothing to say, and the basis that it had
        angles = torch.linalg.svdvals(new.mT @ old)[seen].clamp(max=1.0).acos() * (180 / math.pi)
        row = {
            "stale": captured_energy(A, old),
            "captured": captured_energy(A, new),
            "overlap": overlap(new, old),
            "median_angle": angles.median().expand_as(seen),
            "largest_angle": angles.max().expand_as(seen),
            # Its largest singular value is that of its projection, as far as the basis holds the leading direction.
            "stable_rank": _stable_rank(R, energy),
            "basis_error": _norm(new.mT @ new - torch.eye(r, device=new.device)) / math.sqrt(r),
        }
        error = self._state_error(p, group, R, G.dtype)
        if error is not None:
            row["state_error"] = error
        moment = self.optimizer.first_moment(p)
        if moment is not None and bool(moment.any()):
            row["moment_stable_rank"] = _stable_rank(moment, moment.square().sum((-2, -1)))
        if W is not None:
            keep = 1 - group["lr"] * group["weight_decay"]
            D = orient(as_matrix(W * keep - _values(p), group), side)
            if bool(D.any()):  # not with a learning rate of 0
                row["outside"] = (1 - captured_energy(D, new)).clamp_min(0)
        return {key: float(value[seen].mean()) for key, value in row.items()}

    def _state_error(self, p: Tensor, group: dict[str, Any], R: Tensor, dtype: torch.dtype) -> Tensor | None:
        """`state_error` in `FIELDS`, R being of a gradient of `dtype`; None where storing loses nothing."""
        optimizer, state = self.optimizer, self.optimizer.state[p]
        rule, store, _ = optimizer.memory(group)
        kept = {key: X.clone() for key, X in state.items() if key not in OWN}
        if all(X.dtype in (torch.float32, torch.float64) for X in kept.values()):
            return None
        if optimizer.mask_null:
            dtype = optimizer.mask_null if isinstance(optimizer.mask_null, torch.dtype) else dtype
            R = R * live_directions(torch.linalg.vector_norm(R, dim=-1), dtype).unsqueeze(-1)
        if optimizer.max_grad_norm is not None:
            R = R * (optimizer.max_grad_norm / (optimizer.grad_norm + 1e-6)).clamp(max=1.0)
        exact = {key: X.float().clone() for key, X in store.load(kept, R.shape).items()}
        step = int(state["step"] - state.get("reset", 0.0)) + 1
        for count in (step, step + 1):
            stored, U = sweep(rule, store, R, kept, count), sweep(rule, Store(), R, exact, count)
        return _norm(stored - U) / _norm(U).clamp_min(torch.finfo(torch.float32).tiny)


def _norm(X: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(X)
    return norm


def _values(p: Tensor) -> Tensor:
    return p.dequantize().float() if isinstance(p, Int8Weight) else p.detach().float()


def _stable_rank(R: Tensor, energy: Tensor) -> Tensor:
    """`energy` (a squared Frobenius norm) over the squared largest singular value of R (..., r, k), from R R^T (..., r, r)."""
    largest: Tensor = torch.linalg.eigvalsh(R @ R.mT)[..., -1]
    return energy / largest.clamp_min(torch.finfo(torch.float32).tiny)
