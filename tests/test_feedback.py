"""Error feedback: LDAdam's steps, whatever the modes and shapes, and what it does not go with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import subspan
from subspan.optim import feedback as module
from subspan.optim.feedback import Feedback
from subspan.optim.refresh import Refresh
from subspan.optim.rules import Lion

TRANSPORT = Refresh(moments="transport", first="gradient")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(
    *params: Tensor, bits: int | None = None, gap: int = 1, view: str = "matrix", **options: object
) -> subspan.ProjectedOptimizer:
    group = {"params": list(params), "rank": 4, "update_proj_gap": gap, "scale": 1.0, "view": view}
    options = {"projector": subspan.SVD(), "refresh": TRANSPORT, "mask_null": False, **options}
    return subspan.GaLoreAdamW([group], 0.01, feedback=Feedback(bits), **options)  # type: ignore[arg-type]


def feed(optimizer: subspan.ProjectedOptimizer, W: Tensor, steps: int) -> None:
    for i in range(steps):
        (W * drawn(12, 20, seed=i)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def by_the_paper(W: Tensor, gradients: list[Tensor], lr: float = 0.01, rho: float = 0.908) -> Tensor:
    """LDAdam (arXiv 2410.16103) of a matrix W (m, n), m <= n, rank 4, in fp64, written out."""
    b1, b2, eps = 0.9, 0.999, 1e-8
    W, E = W.double().clone(), torch.zeros_like(W, dtype=torch.float64)
    Q, m, v = W.new_zeros(W.shape[0], 4), W.new_zeros(4, W.shape[1]), W.new_zeros(4, W.shape[1])
    for t, G in enumerate(gradients, start=1):
        A, lost = G.double() + E, torch.zeros_like(E)
        if t == 1:
            Q = torch.linalg.svd(A, full_matrices=False)[0][:, :4]
        else:
            B = rho * Q @ m / (1 - b1 ** (t - 1)) + (1 - rho) * A
            new, T = torch.linalg.qr(B @ (B.T @ Q))
            new = new * T.diagonal().sign()
            C, c1, c2 = new.T @ Q, 1 - b1 ** (t - 1), 1 - b2 ** (t - 1)
            lost = Q @ m - new @ (C @ m)
            v = c2 * ((C**2) @ (v / c2 - (m / c1) ** 2) + (C @ m / c1) ** 2).abs()
            m, Q = C @ m, new
        R = Q.T @ A
        m, v = b1 * m + (1 - b1) * R, b2 * v + (1 - b2) * R**2
        E = A - Q @ R + b1 / (1 - b1) * lost
        W = W - lr * Q @ (m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps))
    return W


@pytest.mark.parametrize(
    ("bits", "state_dtype", "far"), [(None, None, 1e-4), (8, torch.int8, 0.05), (4, torch.int8, 0.15)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_steps_are_those_of_the_paper(bits, state_dtype, far, transposed, monkeypatch):
    monkeypatch.setattr("subspan.optim.quant.MIN_ELEMENTS", 0)
    monkeypatch.setattr(module, "parts_of", lambda X, dim: ((start, 5) for start in range(0, X.shape[dim], 5)))
    before = drawn(12, 20)
    gradients = [drawn(12, 6, seed=i) @ drawn(6, 20, seed=100) + 0.1 * drawn(12, 20, seed=200 + i) for i in range(8)]
    expected = by_the_paper(before, gradients)
    W = nn.Parameter(before.T.contiguous() if transposed else before.clone())
    optimizer = build(W, bits=bits, **({} if state_dtype is None else {"state_dtype": state_dtype}))
    for G in gradients:
        W.grad = G.T.contiguous() if transposed else G.clone()
        optimizer.step()
    after = W.detach().T if transposed else W.detach()
    moved = torch.linalg.norm(expected - before.double())
    assert torch.linalg.norm(after.double() - expected) < far * moved


def test_nothing_of_a_gradient_is_lost():
    """What has gone into the subspace and what is still kept are all gradients, with a basis that stays."""
    W = nn.Parameter(drawn(12, 20))
    optimizer = build(W, gap=1000)
    total, taken = torch.zeros(12, 20), torch.zeros(12, 20)
    for i in range(4):
        W.grad = drawn(12, 20, seed=i)
        total += W.grad
        optimizer.prepare()
        ((_, _, R, _, _),) = optimizer.prepared
        taken += optimizer.basis(W) @ R
        optimizer.step()
    torch.testing.assert_close(taken + optimizer.state[W]["error"].mT, total, atol=1e-4, rtol=1e-4)


def test_hold_and_update_take_the_same_steps():
    weights = []
    for gradients in ("hold", "update"):
        W = nn.Parameter(drawn(12, 20))
        optimizer = build(W, bits=8, gradients=gradients)
        feed(optimizer, W, 5)
        weights.append(W.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("gradients", ["hold", "update"])
def test_a_gradient_of_nan_leaves_basis_and_error_alone(gradients):
    W = nn.Parameter(drawn(12, 20))
    optimizer = build(W, bits=8, gradients=gradients)
    feed(optimizer, W, 3)
    before, kept = W.detach().clone(), {key: X.clone() for key, X in optimizer.state[W].items()}
    (W * float("nan")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    for key in ("basis", "error.codes", "error.scale"):
        torch.testing.assert_close(optimizer.state[W][key], kept[key])
    if gradients == "update":
        assert W.equal(before)
    assert bool(W.isfinite().all())


def test_stacked_matrices_step_as_alone():
    stacked = nn.Parameter(drawn(3, 12, 20))
    single = [nn.Parameter(X.clone()) for X in stacked.detach()]
    a, b = build(stacked, view="batch"), build(*single)
    for i in range(4):
        stacked.grad = drawn(3, 12, 20, seed=i)
        for p, G in zip(single, stacked.grad, strict=True):
            p.grad = G.clone()
        a.step()
        b.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in single]), atol=1e-4, rtol=1e-4)


def test_a_saved_state_goes_on_bit_for_bit():
    W = nn.Parameter(drawn(12, 20))
    optimizer = build(W, bits=8)
    for i in range(6):
        if i == 3:
            other = nn.Parameter(W.detach().clone())
            resumed = build(other, bits=8)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        W.grad = drawn(12, 20, seed=i)
        optimizer.step()
        if i >= 3:
            other.grad = drawn(12, 20, seed=i)
            resumed.step()
    assert other.equal(W)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": Lion()}, "rule=Lion: use Adam"),
        ({"refresh": Refresh()}, "moments=None at a refresh: use Refresh"),
        ({"refresh": Refresh(moments="transport", adaptive=0.5)}, "adaptive, gate or align"),
        ({"combine": subspan.Fira()}, "drop one"),
        ({"gradients": "project"}, "keeps no full gradient"),
    ],
)
def test_what_does_not_go_with_it(options, said):
    options = {"refresh": TRANSPORT, **options}
    with pytest.raises(ValueError, match=said):
        subspan.ProjectedOptimizer(
            [{"params": [nn.Parameter(drawn(4, 6))], "rank": 2}], 0.1, feedback=Feedback(), **options
        )


def test_wrong_settings():
    with pytest.raises(ValueError, match="bits=16 is not supported"):
        Feedback(16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rho=1 must be in \[0, 1\)"):
        Feedback(rho=1)
    with pytest.raises(ValueError, match="feedback=Feedback would do nothing"):
        subspan.GaLoreAdamW([nn.Parameter(drawn(4, 6))], feedback=Feedback(), refresh=TRANSPORT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis_dtype", [None, torch.int4])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (1, 20), (12, 12)])
def test_every_kind_of_state_trains(dtype, basis_dtype, shape, monkeypatch):
    """A quadratic falls, also in few bits and with less directions than the rank."""
    monkeypatch.setattr("subspan.optim.quant.MIN_ELEMENTS", 0)
    target = drawn(*shape, seed=1)
    W = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = build(
        W,
        bits=8,
        state_dtype=torch.int8,
        basis_dtype=basis_dtype,
        projector=subspan.SubspaceIteration(),
        mask_null=True,
    )
    losses = []
    for _ in range(60):
        loss = (W.float() - target).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]
