"""Contracts of every combination: rules x projectors x combines x state and basis dtypes x weights. New rows inherit all."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import subspan
from subspan.optim import quant
from subspan.optim.projectors import effective_rank, orient, pick_side
from subspan.optim.sweep import OWN

RULES = {
    "adam": subspan.Adam(),
    "adam reference": subspan.Adam(eps=1e-6, uncorrected_eps=True),
    "adafactor": subspan.Adafactor(),
    "lion": subspan.Lion(),
    "sgd": subspan.SGDMomentum(),
    "sgd nesterov": subspan.SGDMomentum(nesterov=True),
    "muon": subspan.Muon(),
    "column norm": subspan.ColumnNorm(0.9),
}
PROJECTORS = {
    "svd": subspan.SVD(),
    "randomized_svd": subspan.RandomizedSVD(),
    "subspace_iteration": subspan.SubspaceIteration(),
    "random": subspan.Random(),
}
STATES = {  # dtype of moments, of bases
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "as weight": (None, None),
    "int8": (torch.int8, None),
    "int4, basis int4": (torch.int4, torch.int4),
}
LOW_BITS = (torch.int8, torch.int4)
WEIGHTS = {
    "wide": ((6, 10), torch.float32),
    "tall bf16": ((10, 6), torch.bfloat16),
    "square": ((6, 6), torch.float32),
    "row": ((1, 9), torch.float32),
    "column bf16": ((9, 1), torch.bfloat16),
    "fp64": ((5, 7), torch.float64),
}
COMBINES = {
    "fira": subspan.Fira(),
    "frugal": subspan.Frugal(),
    "apollo": subspan.Apollo(),
    "mini": subspan.Apollo("tensor"),
}
CASES = [
    (rule, projector, state, "none")
    for rule, projector, state in itertools.product(RULES, PROJECTORS, STATES)
    if not (rule == "adafactor" and STATES[state][0] in LOW_BITS)  # refused, see test_optimizer.py
] + [("adam", "random", state, combine) for state, combine in itertools.product(STATES, COMBINES)]


@pytest.fixture(autouse=True)
def _no_tensor_is_too_small_for_codes(monkeypatch):
    monkeypatch.setattr(quant, "MIN_ELEMENTS", 0)


def build(rule, projector, state, combine, shape, dtype):
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    optimizer = subspan.ProjectedOptimizer(
        [{"params": [p], "rank": 4, "update_proj_gap": 3}],
        0.05,
        rule=RULES[rule],
        projector=PROJECTORS[projector],
        combine=COMBINES.get(combine),
        state_dtype=STATES[state][0],
        basis_dtype=STATES[state][1],
        stochastic_rounding=True,
    )
    return p, optimizer


def gradients(shape, dtype, count):
    """Ordinary ones, and those that break naive code: zero, rank one, a single element."""
    generator = torch.Generator().manual_seed(2)
    for i in range(count):
        G = torch.randn(shape, generator=generator)
        if i % 4 == 1:
            G = torch.zeros(shape)
        elif i % 4 == 2:
            G = G[:, :1] * G[:1]
        elif i % 4 == 3:
            G = torch.zeros(shape)
            G[-1, 0] = 3.0
        yield G.to(dtype)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("rule", "projector", "dtypes", "combine"), CASES)
def test_contract(rule, projector, dtypes, combine, weight):
    shape, dtype = WEIGHTS[weight]
    p, optimizer = build(rule, projector, dtypes, combine, shape, dtype)
    rank = effective_rank(4, shape)
    d, k = orient(p, pick_side(shape)).shape
    state = optimizer.state[p]
    layout = {key: (tuple(value.shape), value.dtype) for key, value in state.items()}
    moments = {key: value for key, value in layout.items() if key not in OWN and "basis" not in key}
    state_dtype, basis_dtype = STATES[dtypes]
    if basis_dtype is None:
        assert layout["basis"] == ((d, rank), dtype)
    else:
        assert layout["basis.codes"] == ((d, -(-rank // 2)), torch.uint8)
        assert layout["basis.scale"] == ((d, 1), torch.float32)
    if state_dtype in LOW_BITS:
        codes = -(-rank // 2) if state_dtype == torch.int4 else rank
        assert set(moments.values()) <= {((k, codes), torch.uint8), ((k, 1), torch.float32)}
    else:
        assert all(dtype_ == (state_dtype or dtype) for _, dtype_ in moments.values())
        assert all(shape_ in ((rank, k), (rank,), (k,)) for shape_, _ in moments.values())

    start, previous = p.detach().clone(), p.detach().clone()
    for step, G in enumerate(gradients(shape, dtype, 8)):
        p.grad = G.clone()
        optimizer.step()
        assert p.grad.equal(G)
        assert p.isfinite().all()
        assert {key: (tuple(v.shape), v.dtype) for key, v in state.items()} == layout
        assert all(value.isfinite().all() for value in state.values())
        Q = optimizer.basis(p, torch.float64)
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
        tolerance = (
            0.4 if basis_dtype == torch.int4 else tolerance
        )  # rounding errors of these few rows do not average out
        assert (Q.mT @ Q - torch.eye(rank)).abs().max() < tolerance
        assert state["step"].item() == step + 1
        previous = p.detach().clone()
    assert not p.equal(start)

    # saved, loaded into a fresh optimizer, and continued: bit for bit
    twin, other = build(rule, projector, dtypes, combine, shape, dtype)
    twin.data.copy_(previous)
    other.load_state_dict(optimizer.state_dict())
    for G in gradients(shape, dtype, 5):
        for parameter, o in ((p, optimizer), (twin, other)):
            parameter.grad = G.clone()
            o.step()
    assert p.equal(twin)
