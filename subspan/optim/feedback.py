"""Error feedback: what a step leaves out of a gradient is added to the next one (LDAdam, arXiv 2410.16103, Algorithm 1).

For a projected parameter with E, the error so far, at a step with gradient A (..., d, k), basis Q (..., d, r) and moment m:

    B = rho Q m / (1 - b1^t) + (1 - rho) (A + E)
    Q' = qr(B (B^T Q))                      one block power iteration, every `update_proj_gap` steps, 1 in the paper
    E <- E + b1 / (1 - b1) (Q m - Q' C m)   what the moment loses, C = Q'^T Q; Q'^T does not see it
    R = Q'^T (A + E)                        steps as any low-rank gradient
    E <- A + E - Q' R

E is as large as the gradient: in 8 bits a byte a value. It lies as (..., k, d), in blocks of codes along d, and is worked through
in parts of some rows; B is never made. Products with E, Q m apart, are taken in the gradient's dtype, as all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.optim.books import Bits, book_name
from subspan.optim.norms import parts_of
from subspan.optim.projectors import orthonormalize
from subspan.optim.quant import BLOCK_SIZE, State, dequantize, quantize_into
from subspan.optim.refresh import Refresh
from subspan.optim.rules import Adam, Rule

KEYS = ("error", "error.codes", "error.scale")


@dataclass(frozen=True)
class Feedback:
    """bits: of the error, 8 or 4 in codes; None: fp32. rho: the moment's share in the search for a basis, in [0, 1)."""

    bits: Bits | None = 8
    rho: float = 0.908

    def __post_init__(self) -> None:
        if self.bits not in (None, 4, 8):
            raise ValueError(f"bits={self.bits!r} is not supported: use 8, 4, or None for fp32")
        if not 0 <= self.rho < 1:
            raise ValueError(f"rho={self.rho!r} must be in [0, 1)")

    def check(self, rule: Rule, refresh: Refresh, combine: object, gradients: str, average_over: object) -> None:
        """ValueError for what a `ProjectedOptimizer` with this feedback cannot have."""
        for wrong, said in (
            (not isinstance(rule, Adam), f"rule={type(rule).__name__}: use Adam()"),
            (
                refresh.moments != "transport",
                f"moments={refresh.moments!r} at a refresh: use Refresh(moments='transport')",
            ),
            (refresh.needs_overlap or refresh.align, "adaptive, gate or align of a Refresh: drop them"),
            (combine is not None, f"combine={combine!r}, which uses what is fed back: drop one"),
            (
                gradients == "project",
                "gradients='project', which keeps no full gradient: use gradients='hold' or 'update'",
            ),
            (
                average_over is not None,
                "average_over, which sends projections: use DistributedDataParallel for all of the model",
            ),
        ):
            if wrong:
                raise ValueError(f"feedback={self!r} does not go with {said}")

    def init(self, shape: Sequence[int], device: torch.device) -> State:
        """Zeros for A of `shape` (..., d, k)."""
        *batch, d, k = shape
        if self.bits is None:
            return {"error": torch.zeros((*batch, k, d), dtype=torch.float32, device=device)}
        blocks = -(-d // min(BLOCK_SIZE[self.bits], d))
        return {
            "error.codes": torch.zeros((*batch, k, -(-d * self.bits // 8)), dtype=torch.uint8, device=device),
            "error.scale": torch.zeros((*batch, k, blocks), dtype=torch.float32, device=device),
        }

    def follow(
        self, state: State, A: Tensor, Q: Tensor, moments: State, rule: Rule, done: int
    ) -> tuple[Tensor, Tensor]:
        """The basis after Q, fp32, and whether it is a new one (0-d, bool): not if A is not finite, and then
        nothing changes but by rounding. `moments`, of `done` steps, are moved in place, and E takes what they lose."""
        assert isinstance(rule, Adam)
        m, beta = moments["exp_avg"].float().clone(), rule.betas[0]
        Y = self.search(state, A, Q, m / (1 - beta**done))
        finite = torch.isfinite(Y).all()
        new = torch.where(finite, orthonormalize(torch.where(finite, Y, Q)), Q)
        C = torch.where(finite, new.mT @ Q, torch.eye(Q.shape[-1], device=Q.device))
        rule.transport(moments, C, done)
        self.lose(state, Q, m, new, moments["exp_avg"].float(), beta / (1 - beta), finite)
        return new, finite

    def search(self, state: State, A: Tensor, Q: Tensor, m: Tensor) -> Tensor:
        """B (B^T Q), (..., d, r) fp32; m (..., r, k): the moment, corrected for its bias. A in any dtype."""
        X = (A.mT @ Q.to(A.dtype)).float().mul_(1 - self.rho).add_(m.mT, alpha=self.rho)  # B^T Q, (..., k, r)
        Y = torch.zeros_like(Q)
        for rows, E in self._parts(state, Q.shape[-2]):
            x = X[..., rows, :]
            E = E.to(A.dtype)
            x.add_(E @ Q.to(A.dtype), alpha=1 - self.rho)
            Y.add_(E.mT @ x.to(A.dtype))
        Y.add_((A @ X.to(A.dtype)).float()).mul_(1 - self.rho)
        return Y.add_(Q @ (m @ X), alpha=self.rho)

    def low_rank(self, state: State, Q: Tensor, R: Tensor) -> Tensor:
        """R + Q^T E, in place."""
        for rows, E in self._parts(state, Q.shape[-2]):
            R[..., rows].add_((E.to(R.dtype) @ Q.to(R.dtype)).mT)
        return R

    def lose(self, state: State, Q: Tensor, m: Tensor, new: Tensor, moved: Tensor, weight: float, use: Tensor) -> None:
        """E <- E + weight (Q m - new moved); use: 0-d bool tensor, False: E stays."""
        for rows, E in self._parts(state, Q.shape[-2]):
            lost = (m[..., rows].mT @ Q.mT).sub_(moved[..., rows].mT @ new.mT)
            self._write(state, rows, E + weight * lost, use)

    def keep(self, state: State, A: Tensor, Q: Tensor, R: Tensor, use: Tensor) -> None:
        """E <- A + E - Q R; use: 0-d bool tensor, False: E stays."""
        for rows, E in self._parts(state, Q.shape[-2]):
            left = (A[..., rows].mT + E).sub_(R[..., rows].mT.to(A.dtype) @ Q.mT.to(A.dtype))
            self._write(state, rows, left, use)

    def _parts(self, state: State, d: int) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of E, (..., c, d) fp32, at a time."""
        whole = next(X for key, X in state.items() if key in ("error", "error.codes"))
        for start, length in parts_of(whole, -2):
            rows = slice(start, start + length)
            if self.bits is None:
                yield rows, state["error"][..., rows, :]
            else:
                codes, scale = (state[f"error.{key}"][..., rows, :] for key in ("codes", "scale"))
                yield rows, dequantize(codes, scale, self.bits, True, BLOCK_SIZE[self.bits], d)

    def _write(self, state: State, rows: slice, E: Tensor, use: Tensor) -> None:
        if self.bits is None:
            kept = state["error"][..., rows, :]
            kept.copy_(torch.where(use, E, kept))
        else:
            codes, scale = (state[f"error.{key}"][..., rows, :] for key in ("codes", "scale"))
            quantize_into(codes, scale, E, book_name(self.bits, True), BLOCK_SIZE[self.bits], use)
