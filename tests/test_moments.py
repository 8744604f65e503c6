"""What becomes of moments when the basis changes: kept, reset, transported, gated; and the signs of a basis."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import subspan
from subspan.optim import quant
from subspan.optim.projectors import align, orient, random_basis
from subspan.optim.rules import Adafactor, Adam, ColumnNorm, Lion, Muon, SGDMomentum

RULES = {
    "adam": Adam(),
    "lion": Lion(),
    "sgd": SGDMomentum(),
    "adafactor": Adafactor(),
    "muon": Muon(),
    "column norm": ColumnNorm(0.9),
}


def drawn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass(frozen=True)
class Turning:
    """Another basis of one and the same subspace at every refresh; `turn`: how, from the number of the refresh."""

    turn: str = "rotated"

    def basis(self, G, side, rank, previous, seed):
        Q = random_basis((*G.shape[:-2], orient(G, side).shape[-2], rank), seed=5)
        if self.turn == "rotated":
            return Q @ random_basis((rank, rank), seed)
        return Q * torch.where(drawn((rank,), seed) < 0, -1.0, 1.0) if self.turn == "flipped" else Q


def trained(turn, moments, rule=None, gap=2, steps=7, shape=(8, 12), **options):
    p = nn.Parameter(drawn(shape, 0))
    group = {"params": [p], "rank": 4, "update_proj_gap": gap, "scale": 1.0}
    group["view"] = "batch" if len(shape) == 3 else "matrix"
    refresh = subspan.Refresh(moments=moments, **{k: options.pop(k) for k in ("gate", "align") if k in options})
    optimizer = subspan.ProjectedOptimizer(
        [group], 0.1, rule=rule or Adam(), projector=Turning(turn), refresh=refresh, **options
    )
    for step in range(steps):
        p.grad = drawn(shape, step + 1)
        optimizer.step()
    return p.detach(), optimizer


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (3, 6, 9)])
def test_momentum_does_not_see_a_basis_of_the_same_subspace_when_it_is_transported(shape):
    sgd = SGDMomentum()
    still, _ = trained("still", "keep", sgd, shape=shape)
    transported, _ = trained("rotated", "transport", sgd, shape=shape)
    kept, _ = trained("rotated", "keep", sgd, shape=shape)
    torch.testing.assert_close(transported, still, rtol=1e-4, atol=1e-5)
    assert (kept - still).abs().max() > 0.01


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int4], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_moments_do_not_change_with_a_basis_that_does_not(monkeypatch, rule, state_dtype):
    if rule == "adafactor":
        state_dtype = torch.float32
    monkeypatch.setattr(quant, "MIN_ELEMENTS", 0)
    kept, expected = trained("still", "keep", RULES[rule], state_dtype=state_dtype)
    transported, optimizer = trained("still", "transport", RULES[rule], state_dtype=state_dtype)
    low = state_dtype != torch.float32  # what is stored again is rounded again
    torch.testing.assert_close(transported, kept, rtol=0, atol=0.2 if low else 1e-5)
    if not low:
        (ours,), (theirs,) = optimizer.state.values(), expected.state.values()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["adam", "lion", "sgd", "muon", "column norm"])
def test_signs_that_change_are_undone_by_transport_or_alignment(rule):
    still, _ = trained("still", "keep", RULES[rule])
    for moments, options in (("transport", {}), ("keep", {"align": True})):
        turned, _ = trained("flipped", moments, RULES[rule], **options)
        torch.testing.assert_close(turned, still, rtol=1e-4, atol=1e-5)
    kept, _ = trained("flipped", "keep", RULES[rule])
    assert (kept - still).abs().max() > 0.01


def test_adafactors_rows_are_those_of_turned_gradients():
    """R of independent rows with variances of their own, seen often: in another basis, Adafactor that ran there."""
    generator = torch.Generator().manual_seed(0)
    rule, C = Adafactor(), random_basis((4, 4), seed=1)
    deviation = torch.tensor([0.1, 1.0, 2.0, 0.5])
    here, there = (rule.init(torch.empty(4, 4000)) for _ in range(2))
    for t in range(1, 6):
        R = deviation[:, None] * torch.randn(4, 4000, generator=generator)
        rule.update(R, here, torch.tensor(float(t)))
        rule.update(C @ R, there, torch.tensor(float(t)))
    rule.transport(here, C, 5)
    torch.testing.assert_close(here["exp_avg_sq_row"], there["exp_avg_sq_row"], rtol=0.05, atol=0)


def test_transported_second_moments_are_those_of_turned_gradients():
    """R of independent rows with means and variances of their own, seen long enough: in another basis, Adam that ran there."""
    generator = torch.Generator().manual_seed(0)
    rule, C = Adam((0.99, 0.999)), random_basis((4, 4), seed=1)
    mean, deviation = torch.tensor([1.0, -0.5, 0.0, 2.0]), torch.tensor([0.1, 1.0, 2.0, 0.5])
    here, there = (rule.init(torch.empty(4, 1000)) for _ in range(2))
    for t in range(1, 1001):
        R = mean[:, None] + deviation[:, None] * torch.randn(4, 1000, generator=generator)
        rule.update(R, here, torch.tensor(float(t)))
        rule.update(C @ R, there, torch.tensor(float(t)))
    rule.transport(here, C, 1000)
    torch.testing.assert_close(here["exp_avg"], there["exp_avg"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(here["exp_avg_sq"].mean(-1), there["exp_avg_sq"].mean(-1), rtol=0.02, atol=0)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_reset_moments_begin_anew(monkeypatch, rule, state_dtype):
    """After a refresh at step 4, weights move as those of an optimizer that was made there, bias correction included."""
    if rule == "adafactor":
        state_dtype = torch.float32
    monkeypatch.setattr(quant, "MIN_ELEMENTS", 0)
    (p, optimizer), (q, new) = (
        trained("still", "reset", RULES[rule], gap=4, steps=steps, state_dtype=state_dtype) for steps in (4, 0)
    )
    before = p.clone(), q.clone()
    for step in range(3):
        for o in (optimizer, new):
            (parameter,) = o.state
            parameter.grad = drawn((8, 12), 10 + step)
            o.step()
    torch.testing.assert_close(p - before[0], q - before[1], rtol=1e-4, atol=1e-5)


def test_a_gate_keeps_moments_where_the_subspace_has_moved():
    rotated = "rotated"  # the same subspace: an overlap of 1
    assert trained(rotated, "transport", gate=0.9)[0].equal(trained(rotated, "transport")[0])

    def moved(**options):
        p = nn.Parameter(drawn((8, 12), 0))
        optimizer = subspan.ProjectedOptimizer(
            [{"params": [p], "rank": 2, "update_proj_gap": 1}],
            0.1,
            projector=subspan.Random(),  # 2 of 8 dimensions: overlaps of a quarter
            refresh=subspan.Refresh(first="gradient", **options),
        )
        for step in range(4):
            p.grad = drawn((8, 12), step + 1)
            optimizer.step()
        return p.detach()

    assert moved(moments="transport", gate=0.9).equal(moved())
    assert not moved(moments="transport").equal(moved())


def test_align():
    Q = random_basis((3, 8, 4), seed=0)
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert align(Q * flips, Q).equal(Q)
    assert align(Q, Q * flips).equal(Q * flips)


@dataclasses.dataclass(frozen=True)
class WithoutTransport:
    elementwise = True

    def init(self, R):
        return {}

    def update(self, R, state, step, use=None):
        return R.float()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moments": "rotate"}, "moments='rotate' is unknown"),
        ({"moments": "reset", "gate": 1.0}, "gate=1.0 must be an overlap"),
        ({"gate": 0.5}, "gate=0.5 says when moments are not kept"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        subspan.Refresh(**options)


def test_a_rule_that_cannot_transport_is_refused():
    p = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match="moments='transport' needs a method `transport` of WithoutTransport"):
        subspan.ProjectedOptimizer(
            [{"params": [p], "rank": 2}], rule=WithoutTransport(), refresh=subspan.Refresh(moments="transport")
        )
