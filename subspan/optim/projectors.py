"""Where to look: the geometry of a projection, and four ways to find a basis.

Words and shapes (docs/theory.md). W and its gradient G are matrices (m, n), or batches of matrices (..., m, n):

    A = orient(G, side)      (d, k)    d is the length of the side that the basis lives on
    Q                        (d, r)    basis: orthonormal columns
    R = project(A, Q)        (r, k)    low-rank gradient, Q^T A
    D = project_back(U, Q)   (d, k)    Q U

The basis finders are frozen dataclasses without state: the basis itself lives in the optimizer's state.
Every one of them returns orthonormal, finite columns for every finite input: zero, rank-deficient, 1 x n, r = min(m, n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from subspan.checks import check_whole
from subspan.optim.dtensors import beside, summed, whole

Side = Literal["left", "right"]
ProjType = Literal["std", "reverse_std", "left", "right"]
PROJ_TYPES = get_args(ProjType)

NULL_TOLERANCE = {torch.float64: 4e-15, torch.float32: 4e-6, torch.bfloat16: 1e-3, torch.float16: 1.3e-4}
"""Per dtype of the arithmetic behind a gradient: rows of R shorter than this share of the longest row are rounding noise."""

TF32_NULL_TOLERANCE = 5e-4
"""The same of fp32 products that a GPU takes in TF32, whose noise is 6e-5 to 1.3e-4 (emulated)."""


# ---------------------------------------------------------------------------------------------------- geometry


def check_proj_type(proj_type: object) -> None:
    """Raise a ValueError unless `proj_type` is one that `pick_side` knows."""
    if proj_type == "full":
        raise ValueError("proj_type='full' (a basis on both sides) is not supported: use proj_type='std'")
    if proj_type not in PROJ_TYPES:
        raise ValueError(f"proj_type={proj_type!r} is unknown: use one of {', '.join(PROJ_TYPES)}")


def pick_side(shape: Sequence[int], proj_type: str = "std") -> Side:
    """The side of a (..., m, n) matrix that the basis multiplies from.

    `std` puts the basis on the short side (GaLore, arXiv 2403.03507, section 4.2), `reverse_std` on the long side, `left` and
    `right` where they say. A square matrix counts as tall, so `std` projects it on the right: the paper's text says
    left, the authors' code and therefore every published number says right.
    """
    check_proj_type(proj_type)
    if proj_type == "left" or proj_type == "right":
        return proj_type  # type: ignore[return-value]
    tall = shape[-2] >= shape[-1]
    return "right" if tall == (proj_type == "std") else "left"


def orient(X: Tensor, side: Side) -> Tensor:
    """X (..., m, n) as seen from `side`: itself for left, a transposed view for right. Its own inverse."""
    return X if side == "left" else X.mT


def effective_rank(rank: int, shape: Sequence[int]) -> int:
    """min(rank, m, n): a basis of a (..., m, n) matrix cannot be larger."""
    return min(rank, shape[-2], shape[-1])


def project(A: Tensor, Q: Tensor, turned: bool = False) -> Tensor:
    """Low-rank gradient R = Q^T A: (..., d, k), (..., d, r) -> (..., r, k); turned: it lies in memory as (..., k, r)."""
    return (A.mT @ Q).mT if turned else Q.mT @ A


def project_back(U: Tensor, Q: Tensor) -> Tensor:
    """Q U: (..., r, k), (..., d, r) -> (..., d, k)."""
    return Q @ U


def overlap(Q1: Tensor, Q2: Tensor) -> Tensor:
    """||Q1^T Q2||_F^2 / r in [0, 1]: 1 for one subspace, r/d in the mean for two random ones. 0-d, or one a batch."""
    return (Q1.mT.float() @ Q2.float()).square().sum((-2, -1)) / Q2.shape[-1]


def align(new: Tensor, old: Tensor) -> Tensor:
    """`new` (..., d, r) with the signs of columns changed so that none points away from the same column of `old`: what moments
    mean hangs on signs, and those of an SVD are arbitrary."""
    along = (new * old.to(new.dtype)).sum(-2, keepdim=True)
    return torch.where(along < 0, -new, new)


def captured_energy(A: Tensor, Q: Tensor) -> Tensor:
    """||Q^T A||_F^2 / ||A||_F^2 in [0, 1] (0 for A = 0): the share of the gradient that the basis sees."""
    total = A.float().square().sum((-2, -1))
    return project(A.float(), Q.float()).square().sum((-2, -1)) / total.clamp_min(torch.finfo(torch.float32).tiny)


def live_directions(row_norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Which rows of a low-rank gradient of `dtype` hold more than rounding noise, from the norms of its rows (..., r).

    With fewer tokens than r behind a gradient some rows of R are zero up to rounding, and Adam would turn that noise
    into steps of full size. Row i is live when ||R_i|| > tau max_j ||R_j||, tau of the gradient's dtype, or of that of the
    products behind it where it is narrower: 4e-6 for fp32, 1e-3 for bf16, above the rounding noise of each. None is, where a norm
    is nan or inf. No host sync.
    """
    tolerance = NULL_TOLERANCE[dtype]
    if dtype == torch.float32 and row_norms.device.type == "cuda" and _tf32():
        tolerance = TF32_NULL_TOLERANCE
    return row_norms > tolerance * row_norms.amax(-1, keepdim=True)


def _tf32() -> bool:
    """Whether a GPU may multiply fp32 matrices in TF32, by torch.set_float32_matmul_precision or torch.backends."""
    chosen = torch.backends.cuda.matmul.fp32_precision
    usual: str = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" in (chosen, usual if chosen == "none" else chosen)


def orthonormalize(Y: Tensor) -> Tensor:
    """Orthonormal columns with the span of Y (..., d, r), d >= r: Householder QR in fp32, returned in fp32.

    Householder vectors give orthonormal columns whatever the rank of Y (Gram-Schmidt and Cholesky do not). Column j is
    turned to point along Y_j (diag of the triangular factor >= 0), so a basis that hardly moved keeps its signs, and with
    them the meaning of moments kept across a refresh.
    """
    Q: Tensor
    Q, T = torch.linalg.qr(Y if Y.dtype == torch.float64 else Y.float())
    signs = torch.where(T.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
    return Q.mul_(signs.unsqueeze(-2))


def random_basis(shape: Sequence[int], seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Orthonormal columns (..., d, r), fp32, uniform over subspaces; a function of (shape, seed) alone.

    Drawn by a generator of its own on the CPU, so that it is the same on every device and process and never touches
    the global random state. Matrix i of a batch is what `seed_of(seed, i)` gives alone.
    """
    *batch, d, r = shape
    Y = torch.empty((math.prod(batch), d, r), dtype=torch.float32, device="cpu")
    for i, y in enumerate(Y):
        y.normal_(generator=torch.Generator(device="cpu").manual_seed(seed_of(seed, i)))
    return orthonormalize(Y.view(*batch, d, r).to(device))


def seed_of(seed: int, i: int) -> int:
    """The seed of matrix i of a batch; of matrices i + j, if it is given for `seed` again."""
    return (seed + i * 6_700_417_000_003) % 2**63


# ------------------------------------------------------------------------------------------------ basis finders


class Projector(Protocol):
    """Finds a basis. Implementations are frozen dataclasses of hyperparameters; they keep nothing between calls."""

    def basis(self, G: Tensor, side: Side, rank: int, previous: Tensor | None, seed: int) -> Tensor:
        """An orthonormal basis of the gradient's subspace.

        G: (..., m, n), finite, any floating dtype. `rank` is at most min(m, n) (`effective_rank`). `previous`: the basis
        (..., d, r) in use until now, None when it carries no information yet. `seed`: for those that draw; the optimizer
        gives every parameter and refresh its own. Returns (..., d, rank), fp32 (fp64 for an fp64 G).
        """
        ...


@dataclass(frozen=True)
class SVD:
    """The paper's choice: the r leading singular vectors of G (arXiv 2403.03507, Algorithm 2).

    Exact, and slow: O(m n min(m, n)) operations that parallelise badly. On a GPU the vectors are made orthonormal: Jacobi's, as
    cuSOLVER leaves them, were off by 1e-3 for matrices of 7B (benchmarks/refresh).
    """

    def basis(self, G: Tensor, side: Side, rank: int, previous: Tensor | None, seed: int) -> Tensor:
        # Of G itself, never of its transpose: LAPACK's choice of signs differs between the two, and kept moments feel it.
        G = whole(G)
        G = G if G.dtype == torch.float64 else G.float()
        U: Tensor
        Vh: Tensor
        try:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # fp32 divide and conquer rarely fails to converge; fp64 then does
            U, _, Vh = (X.to(G.dtype) for X in torch.linalg.svd(G.double(), full_matrices=False))
        Q = (U[..., :rank] if side == "left" else Vh[..., :rank, :].mT).contiguous()
        return Q if Q.device.type == "cpu" else orthonormalize(Q)


@dataclass(frozen=True)
class RandomizedSVD:
    """Leading singular vectors by randomized range finding (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1).

    oversample: extra columns of the sketch; n_iter: products with A A^T, each orthonormalised. Ignores the previous basis.
    """

    oversample: int = 8
    n_iter: int = 2

    def __post_init__(self) -> None:
        check_whole("oversample", self.oversample, minimum=0)
        check_whole("n_iter", self.n_iter, minimum=1)

    def basis(self, G: Tensor, side: Side, rank: int, previous: Tensor | None, seed: int) -> Tensor:
        A = orient(G, side)
        width = min(rank + self.oversample, *A.shape[-2:])
        Y = random_basis((*A.shape[:-2], A.shape[-2], width), seed, A.device)
        for _ in range(self.n_iter):
            Y = orthonormalize(_half_power(A, Y))
        U: Tensor
        U, _, _ = torch.linalg.svd(whole(beside(Y.to(A.dtype), A).mT @ A).to(Y.dtype), full_matrices=False)
        Q = U[..., :rank]
        return Y @ (Q if Q.device.type == "cpu" else orthonormalize(Q))


@dataclass(frozen=True)
class SubspaceIteration:
    """Warm-started subspace iteration: Q <- qr(A (A^T Q)), matrix products and one thin QR.

    The subspace of one refresh starts the next, so one or two products with A A^T follow the leading singular subspace
    (Golub and Van Loan, Matrix Computations, 8.2.4). Unlike singular vectors, its columns do not jump when singular values
    cross, so moments kept across a refresh keep most of their meaning.

    n_iter: products with A A^T at a refresh; None: one, and two for ranks below d/8, whose bases are cheap and whose leading
        directions one product does not always catch up with (reproductions/subspace_iteration: at worst 0.996 of the energy that
        the SVD captures with one product at d/8 and above, 0.991 at d/16).
    cold_iter: products at the first refresh, which starts from a random basis.
    """

    n_iter: int | None = None
    cold_iter: int = 4

    def __post_init__(self) -> None:
        if self.n_iter is not None:
            check_whole("n_iter", self.n_iter, minimum=1)
        check_whole("cold_iter", self.cold_iter, minimum=1)

    def basis(self, G: Tensor, side: Side, rank: int, previous: Tensor | None, seed: int) -> Tensor:
        A = orient(G, side)
        if previous is None:
            Q, rounds = random_basis((*A.shape[:-2], A.shape[-2], rank), seed, A.device), self.cold_iter
        else:
            Q, rounds = previous, self.n_iter or (1 if 8 * rank >= A.shape[-2] else 2)
        for _ in range(rounds):
            Q = orthonormalize(_half_power(A, Q))
        return Q


@dataclass(frozen=True)
class Random:
    """A new random orthonormal basis at every refresh: costs no look at the gradient (GoLore, arXiv 2410.11289)."""

    def basis(self, G: Tensor, side: Side, rank: int, previous: Tensor | None, seed: int) -> Tensor:
        A = orient(G, side)
        return random_basis((*A.shape[:-2], A.shape[-2], rank), seed, A.device)


def _half_power(A: Tensor, Q: Tensor) -> Tensor:
    """A (A^T Q), (..., d, r), in A's dtype. The inner factor is scaled to unit norm: gradients of 1e-6, squared, would
    leave fp16's range, and the span does not depend on scale."""
    Z = summed(A.mT @ beside(Q.to(A.dtype), A))
    norm: Tensor = torch.linalg.vector_norm(
        Z, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(A.dtype, torch.float32)
    )
    return whole(A @ (Z / norm.clamp_min(torch.finfo(torch.float32).tiny)).to(A.dtype))
