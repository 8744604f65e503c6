"""How to step: inner rules that turn a (low-rank) gradient into a direction.

A rule is a frozen dataclass of hyperparameters. It never sees the learning rate, the weight decay, the weight or the
basis, and it cannot tell a projected parameter from a dense one: R is (r, k) for the first and the gradient itself, of any
shape, for the second. All arithmetic is fp32 (fp64 for fp64 gradients), but for Muon's products of bf16 gradients; state keeps
the dtype it was created with.

References
    Adam        Kingma and Ba, arXiv 1412.6980; AdamW, arXiv 1711.05101
    Adafactor   Shazeer and Stern, arXiv 1804.04235, without its relative step sizes and without a first moment
    Lion        Chen et al., arXiv 2302.06675
    SGDMomentum torch.optim.SGD
    SignSGD     Bernstein et al., arXiv 1802.04434
    Muon        Jordan et al., https://kellerjordan.github.io/posts/muon; torch.optim.Muon
    ColumnNorm  SCALE, arXiv 2506.16659
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]


class Rule(Protocol):
    """One tensor in, one direction out.

    A rule with a class attribute `elementwise = True` says that what happens at one place of R depends on R and the state at
    that place alone. The optimizer then goes through a parameter part by part, with temporaries of a part, and can keep
    moments in 8 or 4 bits.

    A rule may have a method `at(step, dtype)`, whose result `update` then gets for `step`: what depends on the step alone, a
    number here, in the dtype of the arithmetic, computed once for all parts. It returns tensors: a number that changes from step
    to step would have a compiled sweep compiled again at every step.

    A rule may have methods `fuses(state)`, whether a kernel of torch's own makes one pass of `update` for such a state, and
    `update_(R, state, step, use)`, which then turns R into U in place. R and the moments are of the dtype of the arithmetic, and
    lie in memory in one piece and alike; `step` is the 0-d tensor.

    A rule may have `transport(state, C, step)`: moments after `step` steps (a number) in a basis that was Q are moved, in place,
    into the basis Q_new; C = Q_new^T Q (..., r, r), fp32.
    """

    def init(self, R: Tensor) -> State:
        """The state for a gradient like R: zeros, in R's dtype and on R's device (the meta device included)."""
        ...

    def update(self, R: Tensor, state: State, step: Any, use: Tensor | None = None) -> Tensor:
        """The direction U, of R's shape, fp32 (Muon: of its products); changes `state` in place, leaves R alone.

        `step`: 0-d float tensor, 1 at the first update, or what `at` made of it. The weight then moves by -lr * U.
        `use`: 0-d bool tensor on R's device. If it is False, `state` stays as it is and U means nothing: a gradient is left out
        without the host knowing. R is zero then.
        """
        ...


class Parts(Protocol):
    """How matrices lie on several processes, each of which has a part of them: `shards.Shards`."""

    def matrix(self, X: Tensor) -> tuple[int, int, int | None]: ...
    def turn(self, X: Tensor, dim: int, size: int) -> Tensor: ...
    def norm(self, norms: Tensor) -> Tensor: ...
    def sum(self, X: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Adam:
    """U = m_hat / (sqrt(v_hat) + eps), as in torch.optim.Adam.

    uncorrected_eps: U = m_hat sqrt(1 - beta2^t) / (sqrt(v) + eps), eps added before the bias correction of v. At step 1 an
    eps of 1e-6 then acts like one of 3e-5. It is what galore_torch and Hugging Face's former AdamW compute: for the
    `paper` preset and compat. bias_correction=False: no correction of either moment (BERT's).
    """

    elementwise: ClassVar[bool] = True

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    uncorrected_eps: bool = False
    bias_correction: bool = True

    def __post_init__(self) -> None:
        _check_betas(self.betas)
        _check_at_least_zero("eps", self.eps)

    def init(self, R: Tensor) -> State:
        return {"exp_avg": torch.zeros_like(R), "exp_avg_sq": torch.zeros_like(R)}

    def at(self, step: Tensor | int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """1 - beta1^t and sqrt(1 - beta2^t), 0-d."""
        t: Any = step.double() if isinstance(step, Tensor) else step  # in fp32, 1 - 0.999 would carry an error of 6e-5
        correction1, correction2 = 1 - self.betas[0] ** t, (1 - self.betas[1] ** t) ** 0.5
        return tuple(torch.as_tensor(c, dtype=dtype, device="cpu") for c in (correction1, correction2))  # type: ignore[return-value]

    def update(
        self, R: Tensor, state: State, step: Tensor | tuple[Tensor, Tensor], use: Tensor | None = None
    ) -> Tensor:
        beta1, beta2 = self.betas
        R = _compute(R)
        m, v = state["exp_avg"].to(R.dtype), state["exp_avg_sq"].to(R.dtype)
        m.lerp_(R, _if(use, 1 - beta1, 0.0, R))
        v.mul_(_if(use, beta2, 1.0, R))
        v.addcmul_(R, R, value=1 - beta2)
        state["exp_avg"].copy_(m)
        state["exp_avg_sq"].copy_(v)
        if not self.bias_correction:
            return m / v.sqrt().add_(self.eps)
        correction1, correction2 = step if isinstance(step, tuple) else self.at(step, R.dtype)
        if self.uncorrected_eps:
            return (m / v.sqrt().add_(self.eps)).mul_(correction2 / correction1)
        return (m / (v.sqrt() / correction2).add_(self.eps)).div_(correction1)

    def transport(self, state: State, C: Tensor, step: int) -> None:
        """LDAdam's (arXiv 2410.16103): m <- C m. E[R_i^2] of a turned R follows from variances and means: with m, v corrected for
        their bias, v <- |(C o C) (v - m^2) + (C m)^2|, as if coordinates did not correlate."""
        correction1, correction2 = (1 - beta**step if self.bias_correction else 1.0 for beta in self.betas)
        m, v = (_compute(state[key]) for key in ("exp_avg", "exp_avg_sq"))
        C = C.to(m.dtype)
        moved = C @ m
        spread = v / correction2 - (m / correction1).square_()
        v = (C.square() @ spread).add_((moved / correction1).square_()).abs_().mul_(correction2)
        state["exp_avg"].copy_(moved)
        state["exp_avg_sq"].copy_(v)

    def fuses(self, state: State) -> bool:
        return (
            self.bias_correction
            and not self.uncorrected_eps
            and all(
                X.device.type in ("cpu", "cuda") and X.dtype in (torch.float32, torch.float64) for X in state.values()
            )
        )

    def update_(self, R: Tensor, state: State, step: Tensor, use: Tensor | None = None) -> None:
        # torch's kernel for W <- (1 - lr decay) W - lr U, with R for W too, and lr = decay = -1.
        torch._fused_adamw_(
            [R],
            [R],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [step.to(R.device, torch.float32, non_blocking=True)],
            lr=-1.0,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=-1.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            found_inf=None if use is None else (~use).float(),  # 1: everything stays as it is
        )


@dataclass(frozen=True)
class Adafactor:
    """U = R / sqrt(V), clipped to a root mean square of `clip_threshold`; V is the rank-1 estimate of the second moment.

        beta_t = 1 - t^decay_rate
        row <- beta_t row + (1 - beta_t) mean_j(R^2 + eps),  col likewise over i;  V = row col^T / mean(row)

    State for (..., r, k): (..., r) + (..., k). Vectors keep their whole second moment. The setting that everybody uses: no first
    moment (beta1=None), scale_parameter=False, relative_step=False.
    """

    elementwise: ClassVar[bool] = False  # row and column means, and the clip, see all of R

    eps: float = 1e-30
    clip_threshold: float = 1.0
    decay_rate: float = -0.8

    def __post_init__(self) -> None:
        if not 0 < self.eps < math.inf:
            raise ValueError(
                f"eps={self.eps!r} must be positive, or a gradient of zeros divides by zero: 1e-30 is usual"
            )
        if not self.clip_threshold > 0:
            raise ValueError(f"clip_threshold={self.clip_threshold!r} must be positive: 1.0 is usual")
        if not self.decay_rate < 0:
            raise ValueError(f"decay_rate={self.decay_rate!r} must be negative: -0.8 is usual")

    def init(self, R: Tensor) -> State:
        if R.ndim < 2:
            return {"exp_avg_sq": torch.zeros_like(R)}
        return {"exp_avg_sq_row": R.new_zeros(R.shape[:-1]), "exp_avg_sq_col": R.new_zeros(R.shape[:-2] + R.shape[-1:])}

    def update(self, R: Tensor, state: State, step: Tensor, use: Tensor | None = None) -> Tensor:
        R = _compute(R)
        weight = step.double() ** self.decay_rate  # 1 - beta_t, a 0-d tensor: no host sync
        weight = weight if use is None else weight.to(use.device, R.dtype, non_blocking=True) * use
        square = R.square().add_(self.eps)
        if R.ndim < 2:
            v = state["exp_avg_sq"].to(R.dtype)
            v.mul_(1 - weight).add_(square.mul_(weight))
            state["exp_avg_sq"].copy_(v)
            U = square.copy_(v).rsqrt_().mul_(R)
        else:
            row, col = state["exp_avg_sq_row"].to(R.dtype), state["exp_avg_sq_col"].to(R.dtype)
            row.mul_(1 - weight).add_(square.mean(-1).mul_(weight))
            col.mul_(1 - weight).add_(square.mean(-2).mul_(weight))
            state["exp_avg_sq_row"].copy_(row)
            state["exp_avg_sq_col"].copy_(col)
            U = torch.mul(R, (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1), out=square)
            U.mul_(col.rsqrt().unsqueeze(-2))
        rms = torch.linalg.vector_norm(U) / math.sqrt(max(U.numel(), 1))
        return U.div_((rms / self.clip_threshold).clamp_min_(1.0))

    def transport(self, state: State, C: Tensor, step: int) -> None:
        """Second moments of rows as if they did not correlate: row <- (C o C) row; those of columns stay as they are."""
        if "exp_avg_sq_row" in state:
            row = state["exp_avg_sq_row"]
            row.copy_((C.to(_compute(row).dtype).square() @ _compute(row).unsqueeze(-1)).squeeze(-1))


@dataclass(frozen=True)
class Lion:
    """U = sign(beta1 m + (1 - beta1) R), then m <- beta2 m + (1 - beta2) R. One moment; lr about a tenth of Adam's."""

    elementwise: ClassVar[bool] = True

    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        _check_betas(self.betas)

    def init(self, R: Tensor) -> State:
        return {"exp_avg": torch.zeros_like(R)}

    def update(self, R: Tensor, state: State, step: Tensor, use: Tensor | None = None) -> Tensor:
        beta1, beta2 = self.betas
        R = _compute(R)
        m = state["exp_avg"].to(R.dtype)
        U = torch.lerp(m, R, 1 - beta1).sign_()
        state["exp_avg"].copy_(m.lerp_(R, _if(use, 1 - beta2, 0.0, R)))
        return U

    def transport(self, state: State, C: Tensor, step: int) -> None:
        """m <- C m."""
        _turn(state["exp_avg"], C)


@dataclass(frozen=True)
class SGDMomentum:
    """buf <- momentum buf + R; U = buf, or R + momentum buf with nesterov. momentum=0: no state, U = R."""

    elementwise: ClassVar[bool] = True

    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum!r} must be in [0, 1)")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True needs a momentum: set momentum=0.9 or nesterov=False")

    def init(self, R: Tensor) -> State:
        return {"momentum_buffer": torch.zeros_like(R)} if self.momentum else {}

    def update(self, R: Tensor, state: State, step: Tensor, use: Tensor | None = None) -> Tensor:
        R = _compute(R)
        if not self.momentum:
            return R
        buf = state["momentum_buffer"].to(R.dtype)
        buf.mul_(_if(use, self.momentum, 1.0, R)).add_(R)
        state["momentum_buffer"].copy_(buf)
        return torch.add(R, buf, alpha=self.momentum) if self.nesterov else buf

    def transport(self, state: State, C: Tensor, step: int) -> None:
        """buf <- C buf."""
        if self.momentum:
            _turn(state["momentum_buffer"], C)


def _if(use: Tensor | None, value: float, otherwise: float, R: Tensor) -> Any:
    """`value`, or `otherwise` if `use` is False: a number if there is no `use`, else a 0-d tensor of R's dtype."""
    return value if use is None else torch.where(use, R.new_full((), value), otherwise)


@dataclass(frozen=True)
class SignSGD:
    """U = sign(R). No state. FRUGAL with an empty subspace."""

    elementwise: ClassVar[bool] = True

    def init(self, R: Tensor) -> State:
        return {}

    def update(self, R: Tensor, state: State, step: Tensor, use: Tensor | None = None) -> Tensor:
        return _compute(R).sign()

    def transport(self, state: State, C: Tensor, step: int) -> None:
        """There is nothing to move."""


@dataclass(frozen=True)
class Muon:
    """U = the orthogonal matrix nearest to momentum, about: five steps of Newton and Schulz' iteration, as in torch.optim.Muon.

        buf <- momentum buf + (1 - momentum) R;  B = (1 - momentum) R + momentum buf with nesterov, or buf
        X = B / ||B||;  five times X <- a X + (b X X^T + c (X X^T)^2) X;  U = X max(1, m / n)^(1/2)

    match_adam: U = 0.2 max(m, n)^(1/2) X instead, of the length of Adam's steps, so that its learning rates fit (arXiv
        2502.16982).
    The products are in bf16 for bf16 gradients, as torch.optim.Muon's always are; in fp32 otherwise, where
    torch.set_float32_matmul_precision("high") lets a GPU take its fast ones.
    For matrices and batches of them (..., m, n), m outputs and n inputs; vectors need another rule. Of weights that are stored
    (inputs, outputs), as GPT-2's Conv1D, max(1, m / n) is that of the transposed matrix, in torch.optim.Muon too.
    """

    elementwise: ClassVar[bool] = False

    momentum: float = 0.95
    nesterov: bool = True
    match_adam: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum!r} must be in [0, 1)")

    def init(self, R: Tensor) -> State:
        if R.ndim < 2:
            raise ValueError(f"Muon cannot step a parameter of shape {tuple(R.shape)}: set dense_rule=Adam()")
        return {"momentum_buffer": torch.zeros_like(R)}

    def update(
        self, R: Tensor, state: State, step: Tensor, use: Tensor | None = None, shards: Parts | None = None
    ) -> Tensor:
        """`shards`: R and the momentum are parts of matrices that lie on several processes, and so is U (shards.py)."""
        fast = R.dtype == torch.bfloat16
        R = _compute(R)
        buf = state["momentum_buffer"].to(R.dtype)
        buf.lerp_(R, _if(use, 1 - self.momentum, 0.0, R))
        state["momentum_buffer"].copy_(buf)
        X = torch.lerp(R, buf, self.momentum) if self.nesterov else buf.clone()
        m, n = X.shape[-2:] if shards is None else shards.matrix(X)[:2]
        return orthogonalize(X.bfloat16() if fast else X, shards).mul_(
            0.2 * math.sqrt(max(m, n)) if self.match_adam else math.sqrt(max(1.0, m / n))
        )

    def transport(self, state: State, C: Tensor, step: int) -> None:
        """buf <- C buf."""
        _turn(state["momentum_buffer"], C)


@dataclass(frozen=True)
class ColumnNorm:
    """U = B / rms(B) along the inputs, for each output alone: SCALE's step.

        B = buf <- momentum buf + (1 - momentum) R;  momentum=0: B = R, no state

    dim: the dimension of the inputs. -1: of weights (out, in), torch's Linear; -2: of those that are stored (in, out), Embedding
        and Conv1D.
    A column of the paper's matrices (in, out) is an output. Its formula divides by the norm, its published learning rates (1e-3)
    are for the root mean square, which gives steps of the length of Adam's. An output without a gradient stays where it is.
    For matrices and batches of them (..., m, n); vectors need another rule.
    """

    elementwise: ClassVar[bool] = False

    momentum: float = 0.0
    dim: int = -1

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum!r} must be in [0, 1)")
        if self.dim not in (-1, -2):
            raise ValueError(f"dim={self.dim!r} must be -1, inputs are the last dimension, or -2")

    def init(self, R: Tensor) -> State:
        if R.ndim < 2:
            raise ValueError(f"ColumnNorm cannot step a parameter of shape {tuple(R.shape)}: set dense_rule=Adam()")
        return {"momentum_buffer": torch.zeros_like(R)} if self.momentum else {}

    def update(self, R: Tensor, state: State, step: Tensor, use: Tensor | None = None) -> Tensor:
        B = _compute(R)
        if self.momentum:
            buf = state["momentum_buffer"].to(B.dtype)
            B = buf.lerp_(B, _if(use, 1 - self.momentum, 0.0, B))
            state["momentum_buffer"].copy_(buf)
        rms = torch.linalg.vector_norm(B, dim=self.dim, keepdim=True) / math.sqrt(max(B.shape[self.dim], 1))
        U: Tensor = B / rms.clamp_min_(1e-12)
        return U

    def transport(self, state: State, C: Tensor, step: int) -> None:
        """buf <- C buf."""
        if self.momentum:
            _turn(state["momentum_buffer"], C)


def orthogonalize(X: Tensor, shards: Parts | None = None) -> Tensor:
    """U V^T of X = U S V^T (..., m, n), with singular values only near 1 (0.7 to 1.2, unless they are tiny beside the largest).

    Newton and Schulz' iteration as in `Muon`, in X's dtype, no decomposition. A zero matrix stays zero.

    shards: X is one part of a matrix, and so is what is returned. Parts along the longer dimension share out the products that
        have it, and sum X X^T; others become such parts, and are turned back at the end.
    """
    if X.ndim > 3:
        return orthogonalize(X.flatten(0, -3), shards).reshape(X.shape)
    m, n, cut = (*X.shape[-2:], None) if shards is None else shards.matrix(X)
    shards, wide = shards if cut is not None else None, m < n or (m == n and cut != 0)
    turned = shards is not None and cut != wide
    if shards is not None and turned:
        X = shards.turn(X, int(not wide), m if wide else n)
    product = torch.addmm if X.ndim == 2 else torch.baddbmm  # with a sum: one matrix of X's size is made, not three
    X = X if wide else X.mT
    norm = torch.linalg.matrix_norm(X, keepdim=True)
    X = X / (norm if shards is None else shards.norm(norm)).clamp_min(1e-7)
    for _ in range(5):
        A = X @ X.mT
        A = A if shards is None else shards.sum(A)
        X = product(X, product(A, A, A, beta=-4.775, alpha=2.0315), X, beta=3.4445)
    X = X if wide else X.mT
    return shards.turn(X, int(wide), n if wide else m) if shards is not None and turned else X


def _turn(moment: Tensor, C: Tensor) -> None:
    X = _compute(moment)
    moment.copy_(C.to(X.dtype) @ X)


def _compute(X: Tensor) -> Tensor:
    """X in the dtype of the arithmetic: itself in fp32 and fp64, an fp32 copy otherwise."""
    return X if X.dtype == torch.float64 else X.float()


def _check_betas(betas: tuple[float, float]) -> None:
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas={betas!r} must be two numbers in [0, 1), as in betas=(0.9, 0.999)")


def _check_at_least_zero(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name}={value!r} must be a number of at least 0")
