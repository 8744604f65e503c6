"""What becomes of the part of a gradient that the subspace does not see: (A, Q, R, U) -> D, of which the weight takes a step.

    GaLore      D = Q U                                       combine=None: no class, and no full gradient needed
    Fira        D = Q U + (A - Q R) diag(phi),                phi_j = ||U_j|| / ||R_j||
    Frugal      D = Q U + c sign(A - Q R)
    Apollo      D = A diag(phi) sqrt(r / d)                   one phi for all columns: APOLLO-Mini

A (..., d, k) is the oriented gradient, Q (..., d, r) the basis, R = Q^T A and U (..., r, k) the low-rank gradient and the rule's
direction, X_j column j. The residual A - Q R is the true one, whatever `scale` is.

A combine is a frozen dataclass of hyperparameters. It remembers no more than a number a parameter, and never sees the whole of D:
`weights` says from norms of columns what each column is to be multiplied by, `direction` makes some columns of D.

References
    Fira        Chen et al., arXiv 2410.01623
    Frugal      Zmushko et al., arXiv 2411.07837
    Apollo      Zhu et al., arXiv 2412.05270
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from subspan.optim.projectors import project_back

State = dict[str, Tensor]

LIMITED = "limited_norm"
"""State of a limiter, 0-d fp32: the norm of what it let through last."""

_EPS = 1e-8
"""Added to the norm of a column of R, as in the references."""


class Combine(Protocol):
    """Norms of columns in, columns of D out."""

    def init(self, device: torch.device) -> State:
        """The state of one parameter: 0-d tensors."""
        ...

    def weights(
        self, a: Tensor, r: Tensor, u: Tensor, shape: tuple[int, int], state: State, use: Tensor | None = None
    ) -> Tensor | None:
        """The weight of each column, (..., k), fp32, or None if there is none; brings `state` forward by one step.

        a, r, u: norms of the columns of A, R and U, (..., k). shape: (d, r).
        use: 0-d bool tensor; if it is False, `state` stays as it is.
        """
        ...

    def direction(self, Q: Tensor, A: Tensor, R: Tensor, U: Tensor, weights: Tensor | None) -> Tensor:
        """Some columns of D, (..., d, c), fp32 or wider, from those columns of A, R, U and `weights`."""
        ...


@dataclass(frozen=True)
class Fira:
    """The residual takes part, each column scaled as the rule scaled the same column of the low-rank gradient.

    limit: the residual's part of D grows by no more than this factor from step to step (the norm-growth limiter); None: as it
        will. What it multiplies is the norm after limiting.
    """

    limit: float | None = 1.01

    def __post_init__(self) -> None:
        _check_limit(self.limit)

    def init(self, device: torch.device) -> State:
        return _init(self.limit, device)

    def weights(
        self, a: Tensor, r: Tensor, u: Tensor, shape: tuple[int, int], state: State, use: Tensor | None = None
    ) -> Tensor:
        phi = u / (r + _EPS)
        residual = (a.square() - r.square()).clamp_min_(0).sqrt_()  # Q is orthonormal
        return phi.mul_(_growth(phi * residual, self.limit, state, use))

    def direction(self, Q: Tensor, A: Tensor, R: Tensor, U: Tensor, weights: Tensor | None) -> Tensor:
        assert weights is not None
        w = weights.unsqueeze(-2)  # Q U + (A - Q R) diag(w), with one product instead of two
        return project_back((U - w * R).to(Q.dtype), Q).to(w.dtype).addcmul_(A.to(w.dtype), w)


@dataclass(frozen=True)
class Frugal:
    """The residual takes a step of its signs, without state.

    coefficient: length of that step in every element, beside the rule's: 1 for pre-training, 0.1 for fine-tuning. The paper
        resets the moments at every refresh (`Refresh(moments="reset")`) and has no scale: use scale=1.
    """

    coefficient: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.coefficient < math.inf:
            raise ValueError(f"coefficient={self.coefficient!r} must be a number of at least 0")

    def init(self, device: torch.device) -> State:
        return {}

    def weights(
        self, a: Tensor, r: Tensor, u: Tensor, shape: tuple[int, int], state: State, use: Tensor | None = None
    ) -> None:
        return None

    def direction(self, Q: Tensor, A: Tensor, R: Tensor, U: Tensor, weights: Tensor | None) -> Tensor:
        dtype = torch.promote_types(Q.dtype, torch.float32)
        S = A.to(dtype).sub(project_back(R.to(Q.dtype), Q)).sign_()
        return S.mul_(self.coefficient).add_(project_back(U.to(Q.dtype), Q))


@dataclass(frozen=True)
class Apollo:
    """The gradient itself, scaled as the rule scaled the low-rank gradient, which is used for nothing else.

    by: a scale for each channel, or one for the whole "tensor" (APOLLO-Mini, with rank 1).
    limit: the norm of D grows by no more than this factor from step to step; None: as it will.

    The paper projects by a Gaussian matrix that keeps norms, ours by orthonormal columns, which shorten them by sqrt(r / d) in
    the mean; hence the factor. Its sqrt(alpha) is `scale` here: 1, or sqrt(128) for Mini. Use projector=Random().
    """

    by: Literal["channel", "tensor"] = "channel"
    limit: float | None = 1.01

    def __post_init__(self) -> None:
        if self.by not in ("channel", "tensor"):
            raise ValueError(f"by={self.by!r} is unknown: use 'channel' or 'tensor'")
        _check_limit(self.limit)

    def init(self, device: torch.device) -> State:
        return _init(self.limit, device)

    def weights(
        self, a: Tensor, r: Tensor, u: Tensor, shape: tuple[int, int], state: State, use: Tensor | None = None
    ) -> Tensor:
        d, rank = shape
        if self.by == "tensor":
            r, u = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).expand_as(a) for x in (r, u))
        phi = u / (r + _EPS) * math.sqrt(rank / d)
        return phi.mul_(_growth(phi * a, self.limit, state, use))

    def direction(self, Q: Tensor, A: Tensor, R: Tensor, U: Tensor, weights: Tensor | None) -> Tensor:
        assert weights is not None
        return A.to(weights.dtype) * weights.unsqueeze(-2)


def _init(limit: float | None, device: torch.device) -> State:
    return {} if limit is None else {LIMITED: torch.zeros((), dtype=torch.float32, device=device)}


def _growth(norms: Tensor, limit: float | None, state: State, use: Tensor | None) -> Tensor | float:
    """What to multiply by so that the norm of all, given those of parts, is at most `limit` times what it was (Fira and APOLLO).

    Nothing is limited at first, and a norm of zero is not remembered: it would let nothing through ever after.
    """
    if limit is None:
        return 1.0
    norm, previous = torch.linalg.vector_norm(norms), state[LIMITED]
    most = limit * previous
    factor = torch.where((previous > 0) & (norm > most), most / norm, 1.0)
    new = norm * factor
    counts = (new > 0) & (new < math.inf)
    previous.copy_(torch.where(counts if use is None else counts & use, new, previous))
    return factor


def _check_limit(limit: float | None) -> None:
    if limit is not None and not 1 <= limit < math.inf:
        raise ValueError(f"limit={limit!r} must be a number of at least 1, such as 1.01, or None for no limit")
