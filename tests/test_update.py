"""A weight is updated part by part: the same step as in one piece, with temporaries of a part; and what weights are stored in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import subspan
from subspan.optim import quant, update
from subspan.optim.int8 import Int8Weight
from subspan.optim.norms import gauge, norm_of, row_norms

RULES = [subspan.Adam(), subspan.Lion(), subspan.SGDMomentum(nesterov=True), subspan.Adafactor()]
SHAPES = {"tall": (80, 24), "wide": (24, 80), "batch": (3, 24, 40), "vector": (50,), "0-d": ()}


def drawn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(shape, steps=4, rank=8, dtype=torch.float32, **options):
    """A weight after some steps, and its optimizer."""
    p = nn.Parameter(drawn(shape).to(dtype))
    group = {"params": [p], "weight_decay": 0.1}
    if len(shape) > 1:
        group |= {"rank": rank, "update_proj_gap": 3, "view": "batch" if len(shape) == 3 else "matrix"}
    optimizer = subspan.ProjectedOptimizer([group], 0.01, **options)
    for step in range(steps):
        p.grad = drawn(shape, step + 1).to(dtype)
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.int8, torch.int4], ids=str)
def test_parts_make_the_same_step(monkeypatch, shape, rule, state_dtype):
    if isinstance(rule, subspan.Adafactor):
        state_dtype = torch.float32
    monkeypatch.setattr(quant, "MIN_ELEMENTS", 0)
    whole, _ = trained(shape, rule=rule, state_dtype=state_dtype)
    monkeypatch.setattr(
        update, "parts_of", lambda X, dim, multiple=1, compiled=False: [(i, 1) for i in range(X.shape[dim])]
    )
    by_parts, optimizer = trained(shape, rule=rule, state_dtype=state_dtype)
    torch.testing.assert_close(by_parts, whole, rtol=1e-5, atol=1e-6)
    if len(shape) == 2 and state_dtype != torch.float32:
        assert any(key.endswith(".codes") for key in optimizer.state[by_parts])


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("option", ["fp32", "int8", "rounded"])
def test_temporaries_are_those_of_a_part(dense, option):
    """2 M values: a full fp32 temporary would be 8 MiB, a part of 2^18 values is 1 MiB."""
    p = nn.Parameter(torch.zeros(2048, 1024, dtype=torch.bfloat16))
    group = {"params": [p]} if dense else {"params": [p], "rank": 256}
    optimizer = subspan.ProjectedOptimizer(
        [group],
        0.01,
        state_dtype=torch.int8 if option == "int8" else torch.float32,
        stochastic_rounding=option == "rounded",
        refresh=subspan.Refresh(first="random"),
    )
    R = torch.ones((2048, 1024) if dense else (256, 2048), dtype=torch.bfloat16)
    with torch.no_grad(), LargestResult() as seen:
        optimizer.apply(optimizer.param_groups[0], p, R, torch.tensor(True))
    assert p.count_nonzero()
    # 256 KiB x 4 bytes; of a projected weight, (d, c) beside R's (r, c) is four times as much
    assert seen.bytes <= 2**20 * (4 if not dense else 1) + 2**16


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from Linux's /proc")
def test_a_norm_leaves_no_holes_in_the_heap():
    """In a process of its own, whose heap has no holes yet. 64 parts of 1 MiB once each left their place in it unusable."""
    code = """
import torch
from pathlib import Path
from subspan.optim.norms import norm_of
X = torch.ones(2**12, 2**12, dtype=torch.bfloat16)
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
norm_of(X[:64])
before = resident()
assert norm_of(X) == 2**12
print(resident() - before)
"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 2**24


class LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {X.untyped_storage().data_ptr() for X in tree_leaves((args, kwargs)) if isinstance(X, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for X in tree_leaves(result):
            if isinstance(X, torch.Tensor) and X.untyped_storage().data_ptr() not in before:
                self.bytes = max(self.bytes, X.untyped_storage().nbytes())
        return result


def test_the_norm_of_a_bf16_gradient_makes_no_fp32_copy_of_it():
    from torch.profiler import profile

    X = torch.ones(4096, 2048, dtype=torch.bfloat16)
    with profile(profile_memory=True) as record:
        norm = norm_of(X)
    assert norm.item() == pytest.approx(X.numel() ** 0.5)
    assert max(event.cpu_memory_usage for event in record.events()) < 2**22


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 700), (512, 2048), (3, 4, 30)], ids=str)  # the second is more than one part
@pytest.mark.parametrize("turned", [False, True])
def test_a_gauge_leaves_noise_out_and_sees_nan(shape, dtype, turned):
    R = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    R[..., 1, :] *= 1e-7
    R = R.mT.contiguous().mT if turned else R
    rows = torch.linalg.vector_norm(R.double(), dim=-1).float()
    torch.testing.assert_close(row_norms(R), rows, rtol=1e-5, atol=0)
    norm, live = gauge(R, projected=True, mask_null=True)
    assert not live.expand(R.shape)[..., 1, :].any()
    assert live.expand(R.shape)[..., 0, :].all()
    torch.testing.assert_close(norm, R.double().norm().float(), rtol=1e-4, atol=0)
    for projected, mask_null in ((False, True), (True, False)):
        norm, live = gauge(R, projected, mask_null)
        torch.testing.assert_close(norm, R.double().norm().float(), rtol=1e-4, atol=0)
        assert live.all()
    for bad in (torch.nan, torch.inf, 1e38):  # the square of the last is inf
        R[..., 0, 3:7] = bad
        for projected in (True, False):
            norm, live = gauge(R, projected, True)
            assert not norm.isfinite()
            assert not live.any()


# -------------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("dense", [True, False])
def test_steps_too_small_for_bf16_add_up_when_rounded_at_random(dense):
    """A step of 1e-4 beside a weight of 1: bf16 has 1 and 1 - 0.0039, so that rounding to nearest never moves it."""
    moved = {}
    for rounding in (False, True):
        p = nn.Parameter(torch.ones(64, 96, dtype=torch.bfloat16))
        group = {"params": [p]} if dense else {"params": [p], "rank": 64, "scale": 1.0}
        optimizer = subspan.ProjectedOptimizer(
            [group], 1e-4, rule=subspan.SGDMomentum(momentum=0.0), stochastic_rounding=rounding, mask_null=False
        )
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[rounding] = 1 - p.float().mean().item()
    assert moved[False] == 0
    assert moved[True] == pytest.approx(0.01, rel=0.1)  # 6144 coins of 100 tosses: 0.5 % is one deviation


def test_rounding_follows_the_seed_and_the_step_alone():
    """So that a resumed run rounds like the one that was not stopped, whatever else draws random numbers."""
    first, _ = trained((24, 80), dtype=torch.bfloat16, stochastic_rounding=True)
    torch.randn(7)
    again, _ = trained((24, 80), dtype=torch.bfloat16, stochastic_rounding=True)
    other, _ = trained(
        (24, 80), dtype=torch.bfloat16, stochastic_rounding=True, refresh=subspan.Refresh(first="gradient", seed=1)
    )
    assert first.equal(again)
    assert not first.equal(other)


def test_equal_weights_round_each_by_bits_of_its_own():
    params = [nn.Parameter(drawn((24, 80)).bfloat16()) for _ in range(2)]
    optimizer = subspan.ProjectedOptimizer(params, 0.01, stochastic_rounding=True)
    for p in params:
        p.grad = drawn((24, 80), 1).bfloat16()
    optimizer.step()
    assert not params[0].equal(params[1])


@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_int8_weights_are_moved_in_whole_groups(monkeypatch, proj_type):
    """Whatever the size of a part, which reads and writes some columns."""
    moved = []
    for parts in (False, True):
        if parts:
            few = lambda X, dim, multiple=1, compiled=False: [  # noqa: E731
                (i, min(multiple, X.shape[dim] - i)) for i in range(0, X.shape[dim], multiple)
            ]
            monkeypatch.setattr(update, "parts_of", few)
        p = nn.Parameter(Int8Weight.from_float(drawn((32, 512)), group_size=128))
        optimizer = subspan.GaLoreAdamW([{"params": [p], "rank": 4, "proj_type": proj_type, "scale": 1.0}], lr=0.1)
        p.grad = drawn((32, 512), 1)
        optimizer.step()
        moved.append(p.dequantize())
    scale = p.scale.float().max()
    assert (moved[0] - moved[1]).abs().max() < 3 * scale  # rounded at random, by other bits


@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_int8_weights_follow_the_floating_ones(proj_type):
    """Ten steps of GaLore: INT8 weights end near where their dequantized twins do, and each step moves them."""
    weights = {}
    for int8 in (True, False):
        W = Int8Weight.from_float(drawn((64, 512)), group_size=256)
        p = nn.Parameter(W if int8 else W.dequantize())
        optimizer = subspan.QGaLoreAdamW(
            [{"params": [p], "rank": 16, "proj_type": proj_type, "scale": 1.0, "weight_decay": 0.1}], lr=0.1
        )
        start = W.dequantize()
        for step in range(10):
            p.grad = drawn((64, 512), step + 1)
            optimizer.step()
        weights[int8] = p.dequantize() if int8 else p.detach()
    scale = W.scale.float().max()
    error, moved = weights[True] - weights[False], weights[False] - start
    assert error.abs().max() < 8 * scale  # a walk of ten roundings
    assert error.norm() < 0.5 * moved.norm()
    assert abs(error.mean()) < 0.02 * scale


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.int8, torch.int4], ids=str)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("kind", ["fp32", "bf16 rounded", "int8"])
def test_a_gradient_left_out_changes_nothing(monkeypatch, state_dtype, dense, kind):
    """`use` False: what happens to a parameter of `update` mode whose gradient has a nan."""
    monkeypatch.setattr(quant, "MIN_ELEMENTS", 0)
    W = drawn((32, 512)).to(torch.float32 if kind == "fp32" else torch.bfloat16)
    p = nn.Parameter(Int8Weight.from_float(W) if kind == "int8" else W)
    group = {"params": [p], "weight_decay": 0.1, **({} if dense else {"rank": 8})}
    optimizer = subspan.ProjectedOptimizer(
        [group],
        0.01,
        state_dtype=state_dtype,
        basis_dtype=torch.int4,
        gradients="update",
        stochastic_rounding=kind != "fp32",
    )
    for step in range(3):
        p.grad = drawn((32, 512), step).to(p.dtype)
        optimizer._backward._update(p)
        optimizer.step()

    def everything():
        state = {key: value.clone() for key, value in optimizer.state[p].items() if key != "step"}
        return state | ({"codes": p.codes.clone()} if kind == "int8" else {"weight": p.detach().clone()})

    before = everything()
    p.grad = torch.full((32, 512), torch.nan, dtype=p.dtype)
    optimizer._backward._update(p)
    after = everything()
    assert {key: value.equal(after[key]) for key, value in before.items()} == dict.fromkeys(before, True)
