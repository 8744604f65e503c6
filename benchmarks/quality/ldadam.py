"""LDAdam (arXiv 2410.16103) for the benchmark, written from the paper's formulas: there is no package of it on the index.

For every parameter of a group with a `rank`, at step t, from A = orient(G) + E:

    B = rho Q m / (1 - b1^(t-1)) + (1 - rho) A
    Q' = qr(B (B^T Q)), one block power iteration from the last basis; at t = 1 the leading singular vectors of A
    C = Q'^T Q,  R = Q'^T A
    m', v' = m, v moved by C (`Adam.transport`), then stepped with R; U from them
    E <- A - Q' R + b1 / (1 - b1) (Q m - Q' C m)                    what the subspace lost, of A and of the moment
    W <- (1 - lr decay) W - lr orient(Q' U)

Dense groups are AdamW. The groups are those of `subspan.param_groups`; `scale` and `update_proj_gap` mean nothing here. E is as
large as the gradient and counts as state, in fp32 or in codes. rho is the paper's; betas and eps are those of all other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from subspan.optim.projectors import effective_rank, orient, orthonormalize, pick_side
from subspan.optim.quant import BLOCK_SIZE, Bits, Store, dequantize, quantize
from subspan.optim.rules import Adam

RHO = 0.908


class LDAdam(torch.optim.Optimizer):
    """error_bits: E in blocks of codes; moment_bits: the moments in the subspace too. None: fp32. `error_feedback=False`: E stays
    zero, and is not kept."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        rho: float = RHO,
        rule: Adam | None = None,
        error_feedback: bool = True,
        error_bits: Bits | None = None,
        moment_bits: Bits | None = None,
    ) -> None:
        self.rho, self.rule, self.error_bits = rho, rule or Adam(), error_bits
        self.store = Store(moment_bits, transposed=True)
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        for group in self.param_groups:
            for p in group["params"]:
                A = p.float()
                if "rank" in group:
                    A = orient(A, pick_side(p.shape, group["proj_type"]))
                    rank = effective_rank(group["rank"], A.shape)
                    self.state[p] = {"basis": torch.eye(A.shape[0], rank, device=p.device)}
                    if error_feedback:
                        self._keep_error(self.state[p], torch.zeros_like(A))
                    A = A[:rank]
                moments = self.rule.init(A)
                self.state[p] |= {"step": torch.zeros(()), **(self.store.init(moments) if "rank" in group else moments)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                if "rank" in group:
                    side = pick_side(p.shape, group["proj_type"])
                    D = orient(self._direction(orient(p.grad.float(), side), state), side)
                else:
                    D = self.rule.update(p.grad, state, state["step"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(D, alpha=group["lr"])

    def _direction(self, A: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Q' U (d, k); brings `state` forward."""
        t, beta1, kept = int(state["step"]), self.rule.betas[0], state
        Q, E = state["basis"], self._error(state, A.shape[1])
        state = self.store.load(state, (Q.shape[1], A.shape[1]))
        m = state["exp_avg"]
        A = A if E is None else A + E
        if t == 1:
            new = torch.linalg.svd(A, full_matrices=False)[0][:, : Q.shape[1]]
            lost = torch.zeros_like(A)
        else:
            old = Q @ m
            B = self.rho / (1 - beta1 ** (t - 1)) * old + (1 - self.rho) * A
            new = orthonormalize(B @ (B.mT @ Q))
            C = new.mT @ Q
            self.rule.transport(state, C, t - 1)
            lost = old.sub_(new @ state["exp_avg"])
        R = new.mT @ A
        U = self.rule.update(R, state, state["step"])
        self.store.save(kept, state)
        if E is not None:
            self._keep_error(kept, A - new @ R + beta1 / (1 - beta1) * lost)
        Q.copy_(new)
        return new @ U

    def _error(self, state: dict[str, Tensor], k: int) -> Tensor | None:
        if "error.codes" not in state:
            return state.get("error")
        assert self.error_bits is not None
        codes, scale = state["error.codes"], state["error.scale"]
        return dequantize(codes, scale, self.error_bits, True, BLOCK_SIZE[self.error_bits], k)

    def _keep_error(self, state: dict[str, Tensor], E: Tensor) -> None:
        if self.error_bits is None:
            state["error"] = E
        else:
            state["error.codes"], state["error.scale"] = quantize(E, self.error_bits, True, BLOCK_SIZE[self.error_bits])
