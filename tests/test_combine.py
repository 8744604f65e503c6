"""Combines: their formulas, reductions to what is known, the limiter, and every way a step can be taken."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import subspan
from subspan.optim import norms, update
from subspan.optim.combine import LIMITED
from subspan.optim.int8 import Int8Weight
from subspan.optim.projectors import orient, pick_side, random_basis

COMBINES = {
    "fira": subspan.Fira(limit=None),
    "fira limited": subspan.Fira(),
    "frugal": subspan.Frugal(0.3),
    "apollo": subspan.Apollo(limit=None),
    "apollo limited": subspan.Apollo(),
    "apollo mini": subspan.Apollo(by="tensor", limit=None),
}
SHAPES = {"tall": (12, 7), "wide": (7, 12), "square": (8, 8), "batch": (3, 6, 9)}


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A random orthonormal basis that never changes."""

    def basis(self, G, side, rank, previous, seed):
        return random_basis((*G.shape[:-2], orient(G, side).shape[-2], rank), seed=5)


def drawn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(shape, combine, dtype=torch.float32, rank=3, start=None, lr=0.1, **options):
    p = nn.Parameter(drawn(shape, 0).to(dtype) if start is None else start)
    group = {"params": [p], "rank": rank, "scale": 0.5, "view": "batch" if len(shape) == 3 else "matrix"}
    options = {"projector": Fixed(), **options}
    return p, subspan.ProjectedOptimizer([group], lr, combine=combine, **options)


def expected(combine, A, Q, R, U):
    """D by the formulas, as they stand in combine.py, without a limit."""
    r, d = Q.shape[-1], Q.shape[-2]
    S, by_column = A - Q @ R, {"dim": -2, "keepdim": True}
    phi = U.norm(**by_column) / (R.norm(**by_column) + 1e-8)
    if isinstance(combine, subspan.Fira):
        return Q @ U + S * phi
    if isinstance(combine, subspan.Frugal):
        return Q @ U + combine.coefficient * S.sign()
    if combine.by == "tensor":
        phi = U.norm(dim=(-2, -1), keepdim=True) / (R.norm(dim=(-2, -1), keepdim=True) + 1e-8)
    return A * phi * math.sqrt(r / d)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", [name for name in COMBINES if "limited" not in name])
@pytest.mark.parametrize("parts", [False, True])
def test_the_formula(monkeypatch, name, shape, parts):
    if parts:
        for module in (norms, update):
            monkeypatch.setattr(
                module, "parts_of", lambda X, dim, multiple=1, compiled=False: [(i, 1) for i in range(X.shape[dim])]
            )
    combine, side = COMBINES[name], pick_side(shape[-2:])
    p, optimizer = make(shape, combine, weight_decay=0.2)
    W, rule = p.detach().double(), subspan.Adam()
    Q = random_basis((*shape[:-2], min(shape[-2:]), 3), seed=5).double()
    moments = None
    for step in range(4):
        G = drawn(shape, step + 1)
        p.grad = G.clone()
        optimizer.step()
        assert p.grad.equal(G)
        A = orient(G.double(), side)
        R = Q.mT @ A
        moments = rule.init(R) if moments is None else moments
        U = rule.update(R, moments, torch.tensor(float(step + 1)))
        W = (1 - 0.1 * 0.2) * W - 0.1 * 0.5 * orient(expected(combine, A, Q, R, U), side)
        torch.testing.assert_close(p.detach().double(), W, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_with_the_gradient_as_direction_fira_is_sgd_and_apollo_a_fraction_of_it(shape, rank):
    """U = R: every scale is 1, and the parts inside and outside the subspace add up to the gradient, whatever the basis."""
    identity = subspan.SGDMomentum(momentum=0.0)
    factors = {
        "fira": 1.0,
        "apollo": math.sqrt(rank / min(shape[-2:])),
        "apollo mini": math.sqrt(rank / min(shape[-2:])),
    }
    for name, factor in factors.items():
        p, optimizer = make(shape, COMBINES[name], rank=rank, rule=identity)
        before = p.detach().clone()
        p.grad = drawn(shape, 1)
        optimizer.step()
        torch.testing.assert_close(before - p.detach(), 0.05 * factor * p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combine", [subspan.Fira(), subspan.Frugal(0.0)])
def test_without_a_rest_all_is_galore(combine):
    """At full rank there is no residual; a coefficient of 0 leaves it out."""
    rank = 7 if combine == subspan.Fira() else 3
    (p, with_rest), (q, without) = (make((12, 7), c, rank=rank) for c in (combine, None))
    for step in range(3):
        for parameter, optimizer in ((p, with_rest), (q, without)):
            parameter.grad = drawn((12, 7), step + 1)
            optimizer.step()
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("combine", [subspan.Fira(limit=1.5), subspan.Apollo(limit=1.5)])
def test_a_limiter_lets_norms_grow_slowly_and_fall_at_once(combine):
    """With the gradient as direction the limited part has its norm, times a constant: 1, 10, 10, 0, 1, 2 grow by 1.5 at most."""
    p, optimizer = make((8, 12), combine, rule=subspan.SGDMomentum(momentum=0.0))
    G, limited = drawn((8, 12), 1), []
    for size in (1.0, 10.0, 10.0, 0.0, 1.0, 2.0):
        p.grad = size * G
        optimizer.step()
        limited.append(optimizer.state[p][LIMITED].item())
    assert [x / limited[0] for x in limited] == pytest.approx([1.0, 1.5, 2.25, 2.25, 1.0, 1.5], rel=1e-4)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16 rounded", "int8"])
@pytest.mark.parametrize("name", COMBINES)
def test_update_mode_takes_the_same_steps(name, kind):
    start = drawn((32, 64), 0).to(torch.float32 if kind == "fp32" else torch.bfloat16)
    made = []
    for gradients in ("hold", "update"):
        W = Int8Weight.from_float(start) if kind == "int8" else start.clone()
        refresh = subspan.Refresh(first="random", stagger=1)
        p, optimizer = make(
            start.shape,
            COMBINES[name],
            start=W,
            lr=0.01,
            gradients=gradients,
            refresh=refresh,
            stochastic_rounding=kind == "bf16 rounded",
        )
        for step in range(4):
            X = drawn((5, 64), step + 1).to(start.dtype)
            nn.functional.linear(X, p).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        made.append((p.dequantize() if kind == "int8" else p.detach()).float())
    torch.testing.assert_close(made[0], made[1], rtol=1e-5, atol=1e-6)
    assert not made[0].equal(start.float())


@pytest.mark.parametrize("name", COMBINES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("gradients", ["hold", "update"])
def test_a_gradient_that_is_not_finite_enters_nothing(name, bad, gradients):
    p, optimizer = make((32, 48), COMBINES[name], gradients=gradients)

    def backward(G):
        (p * G).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    backward(drawn((32, 48), 1))
    before = p.detach().clone(), {key: x.clone() for key, x in optimizer.state[p].items() if key != "step"}
    G = drawn((32, 48), 2)
    G[3, 5] = bad
    backward(G)
    assert p.isfinite().all()
    if gradients == "update":
        assert p.equal(before[0])
        assert all(optimizer.state[p][key].equal(x) for key, x in before[1].items())
    elif LIMITED in before[1]:
        assert optimizer.state[p][LIMITED].equal(before[1][LIMITED])


def test_the_norm_is_that_of_the_whole_gradient_and_clips_it():
    p, optimizer = make((8, 12), subspan.Fira(limit=None), rule=subspan.SGDMomentum(momentum=0.0), max_grad_norm=1.0)
    before = p.detach().clone()
    p.grad = 10 * drawn((8, 12), 1)
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, p.grad.norm())
    torch.testing.assert_close((before - p.detach()).norm(), torch.tensor(0.05), rtol=1e-4, atol=0)  # lr scale 1


def test_gradients_that_are_projected_at_once_are_refused():
    with pytest.raises(ValueError, match=r"combine=Fira\(limit=1.01\).*gradients='project'.*use gradients='hold'"):
        make((8, 12), subspan.Fira(), gradients="project")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: subspan.Fira(limit=0.9), "limit=0.9"),
        (lambda: subspan.Apollo(limit=math.inf), "limit=inf"),
        (lambda: subspan.Apollo(by="row"), "by='row'"),
        (lambda: subspan.Frugal(-1.0), "coefficient=-1.0"),
    ],
)
def test_bad_values_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", COMBINES)
def test_a_clipped_step_survives_a_gradient_that_is_not_finite(name, value):
    """In another parameter: the norm that clips is that of all."""
    p, optimizer = make(SHAPES["wide"], COMBINES[name], max_grad_norm=1.0)
    other = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [other]})
    for broken in (False, True, False):
        p.grad, other.grad = drawn(p.shape, 1), torch.full_like(other, value if broken else 1.0)
        optimizer.step()
    assert p.isfinite().all()
    assert other.isfinite().all()
    assert all(X.isfinite().all() for X in optimizer.state[p].values())
