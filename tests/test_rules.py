"""Rules: formulas checked against plain scalar arithmetic, and against torch where torch has them."""

from __future__ import annotations

import math

import pytest
import torch

import subspan
from subspan.optim.rules import Adafactor, Adam, ColumnNorm, Lion, Muon, SGDMomentum, SignSGD


def run(rule, gradients, dtype=torch.float32):
    """The direction after each gradient."""
    state = rule.init(torch.empty_like(gradients[0], dtype=dtype))
    directions = []
    for t, g in enumerate(gradients, start=1):
        before = g.clone()
        directions.append(rule.update(g, state, torch.tensor(float(t))).clone())
        assert g.equal(before)  # a rule leaves its input alone
    return directions, state


GRADIENTS = [torch.tensor([[0.5, -2.0], [1e-3, 0.0]]), torch.tensor([[0.1, 1.0], [2.0, -1.0]]), torch.full((2, 2), 0.3)]


def test_adam_by_hand():
    beta1, beta2, eps = 0.9, 0.99, 1e-3
    plain, _ = run(Adam((beta1, beta2), eps), GRADIENTS)
    reference, _ = run(Adam((beta1, beta2), eps, uncorrected_eps=True), GRADIENTS)
    uncorrected, _ = run(Adam((beta1, beta2), eps, bias_correction=False), GRADIENTS)
    for i in range(2):
        for j in range(2):
            m = v = 0.0
            for t, g in enumerate(GRADIENTS, start=1):
                x = g[i, j].item()
                m, v = beta1 * m + (1 - beta1) * x, beta2 * v + (1 - beta2) * x * x
                c1, c2 = 1 - beta1**t, 1 - beta2**t
                assert plain[t - 1][i, j].item() == pytest.approx((m / c1) / (math.sqrt(v / c2) + eps), rel=1e-5)
                assert reference[t - 1][i, j].item() == pytest.approx(
                    m * math.sqrt(c2) / c1 / (math.sqrt(v) + eps), rel=1e-5
                )
                assert uncorrected[t - 1][i, j].item() == pytest.approx(m / (math.sqrt(v) + eps), rel=1e-5)


def test_corrections_stay_on_the_cpu():
    """Made on a GPU they would be two copies to it, and waits, in every step."""
    with torch.device("meta"):
        assert all(x.device.type == "cpu" for x in subspan.Adam().at(3, torch.float32))


def test_lion_by_hand():
    directions, state = run(Lion((0.9, 0.99)), GRADIENTS)
    m = torch.zeros(2, 2)
    for g, U in zip(GRADIENTS, directions, strict=True):
        assert U.equal(torch.sign(0.9 * m + 0.1 * g))
        m = 0.99 * m + 0.01 * g
    torch.testing.assert_close(state["exp_avg"], m)


def test_adafactor_by_hand():
    directions, state = run(Adafactor(clip_threshold=0.7), GRADIENTS)
    row, col = torch.zeros(2), torch.zeros(2)
    for t, (g, U) in enumerate(zip(GRADIENTS, directions, strict=True), start=1):
        weight = t**-0.8
        square = g**2 + 1e-30
        row, col = row + weight * (square.mean(1) - row), col + weight * (square.mean(0) - col)
        expected = g / torch.sqrt(torch.outer(row, col) / row.mean())
        expected /= max(1.0, (expected.square().mean().sqrt() / 0.7).item())
        torch.testing.assert_close(U, expected)
    assert {key: tuple(value.shape) for key, value in state.items()} == {"exp_avg_sq_row": (2,), "exp_avg_sq_col": (2,)}


def test_adafactor_of_a_transposed_gradient_is_transposed():
    """So the orientation of a projected gradient does not matter."""
    torch.manual_seed(0)
    gradients = [torch.randn(3, 7) for _ in range(4)]
    straight, _ = run(Adafactor(), gradients)
    turned, _ = run(Adafactor(), [g.mT for g in gradients])
    for a, b in zip(straight, turned, strict=True):
        torch.testing.assert_close(a, b.mT)


def test_sgd_without_momentum_is_the_identity():
    directions, state = run(SGDMomentum(momentum=0.0), GRADIENTS)
    assert state == {}
    for g, U in zip(GRADIENTS, directions, strict=True):
        assert U.equal(g)


@pytest.mark.parametrize("rule", [Adam(), Adafactor(), Lion(), SGDMomentum()], ids=lambda rule: type(rule).__name__)
class TestEveryRule:
    def test_state_is_zeros_like_the_gradient(self, rule):
        for device in ("cpu", "meta"):
            for dtype in (torch.float32, torch.bfloat16):
                state = rule.init(torch.empty(3, 5, dtype=dtype, device=device))
                assert state
                for value in state.values():
                    assert (value.dtype, value.device.type) == (dtype, device)
                    assert device == "meta" or not value.any()

    def test_state_keeps_its_dtype_and_the_arithmetic_is_fp32(self, rule):
        torch.manual_seed(0)
        gradients = [torch.randn(3, 5).bfloat16() for _ in range(3)]
        low, state = run(rule, gradients, torch.bfloat16)
        high, _ = run(rule, [g.float() for g in gradients])
        assert all(value.dtype == torch.bfloat16 for value in state.values())
        for a, b in zip(low, high, strict=True):
            assert a.dtype == torch.float32
            assert (a - b).norm() <= 0.02 * b.norm()  # only the stored state was rounded

    def test_a_zero_gradient_from_the_start_moves_nothing(self, rule):
        directions, _ = run(rule, [torch.zeros(3, 5)] * 3)
        assert all(not U.any() for U in directions)

    def test_an_update_without_direction_depends_on_scale_only_through_the_rule(self, rule):
        """Adaptive rules do not see the gradient's scale; SGD is linear in it."""
        torch.manual_seed(0)
        gradients = [torch.randn(4, 6) for _ in range(3)]
        plain, _ = run(rule, gradients)
        scaled, _ = run(rule, [g * 1024 for g in gradients])
        factor = 1024 if isinstance(rule, SGDMomentum) else 1
        for a, b in zip(plain, scaled, strict=True):
            torch.testing.assert_close(a * factor, b, rtol=1e-4, atol=1e-5)

    def test_vectors_scalars_and_batches(self, rule):
        for shape in ((7,), (), (2, 3, 4)):
            directions, _ = run(rule, [torch.ones(shape)] * 2)
            assert all(U.shape == shape and U.isfinite().all() for U in directions)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adam(betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\)"),
        (lambda: Adam(eps=-1.0), "eps=-1.0"),
        (lambda: Lion(betas=(1.5, 0.9)), r"betas=\(1.5, 0.9\)"),
        (lambda: Adafactor(clip_threshold=0.0), "clip_threshold=0.0"),
        (lambda: Adafactor(decay_rate=0.8), "decay_rate=0.8"),
        (lambda: SGDMomentum(momentum=1.0), "momentum=1.0"),
        (lambda: SGDMomentum(momentum=0.0, nesterov=True), "nesterov=True"),
    ],
)
def test_bad_hyperparameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sign_sgd():
    directions, state = run(SignSGD(), GRADIENTS)
    assert all(U.equal(g.sign()) for U, g in zip(directions, GRADIENTS, strict=True))
    assert state == {}


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 12, 20), (2, 2, 20, 12)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_makes_momentum_nearly_orthogonal(shape, nesterov):
    gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    (*_, U), state = run(Muon(nesterov=nesterov), gradients)
    factor = math.sqrt(max(1.0, shape[-2] / shape[-1]))
    values = torch.linalg.svdvals(U / factor)
    assert values.min() > 0.5  # the iteration is made for speed: singular values come near 1, not to it
    assert values.max() < 1.3
    buf = torch.zeros(shape)
    for g in gradients:
        buf = 0.95 * buf + 0.05 * g
    torch.testing.assert_close(state["momentum_buffer"], buf)
    # The singular vectors are those of the momentum: U^T B is symmetric and positive.
    B = 0.05 * gradients[-1] + 0.95 * buf if nesterov else buf
    polar = U.mT @ B if shape[-2] >= shape[-1] else U @ B.mT
    torch.testing.assert_close(polar, polar.mT, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("match_adam", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_is_torchs_up_to_its_bfloat16(shape, match_adam, dtype):
    p = torch.nn.Parameter(torch.zeros(shape))
    theirs = torch.optim.Muon(
        [p], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw" if match_adam else "original"
    )
    rule = Muon(match_adam=match_adam)
    state, ours = rule.init(p.detach()), torch.zeros(shape)
    for seed in range(3):
        R = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        p.grad = R.float()
        theirs.step()
        U = rule.update(R, state, torch.tensor(seed + 1.0))
        assert U.dtype == dtype
        ours -= U
    assert (ours - p.detach()).norm() < 0.02 * p.detach().norm()


def test_muon_is_for_matrices():
    with pytest.raises(ValueError, match=r"Muon cannot step a parameter of shape \(5,\): set dense_rule=Adam"):
        Muon().init(torch.zeros(5))
    with pytest.raises(ValueError, match=r"momentum=1.0"):
        Muon(momentum=1.0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_column_norm_by_hand(momentum):
    directions, state = run(ColumnNorm(momentum), GRADIENTS)
    stored, _ = run(ColumnNorm(momentum, dim=-2), [g.mT for g in GRADIENTS])
    buf = torch.zeros(2, 2)
    for g, U, turned in zip(GRADIENTS, directions, stored, strict=True):
        buf = momentum * buf + (1 - momentum) * g
        for row, u in zip(buf, U, strict=True):  # an output
            torch.testing.assert_close(u, row / (row.square().mean().sqrt()))
        torch.testing.assert_close(turned, U.mT)
    assert state.keys() == ({"momentum_buffer"} if momentum else set())


def test_column_norm_leaves_an_output_without_a_gradient_alone():
    G = torch.tensor([[0.0, 0.0], [1e-6, 0.0]])
    torch.testing.assert_close(run(ColumnNorm(), [G])[0][0], torch.tensor([[0.0, 0.0], [math.sqrt(2), 0.0]]))


@pytest.mark.parametrize("rule", [ColumnNorm(0.9), Muon()], ids=lambda rule: type(rule).__name__)
def test_a_gradient_that_is_left_out_leaves_momentum_as_it_is(rule):
    _, state = run(rule, GRADIENTS)
    before = state["momentum_buffer"].clone()
    rule.update(torch.zeros(2, 2), state, torch.tensor(4.0), use=torch.tensor(False))
    assert state["momentum_buffer"].equal(before)


def test_column_norm_is_for_matrices():
    with pytest.raises(ValueError, match=r"ColumnNorm cannot step a parameter of shape \(5,\): set dense_rule=Adam"):
        ColumnNorm().init(torch.zeros(5))
    with pytest.raises(ValueError, match=r"momentum=1.0"):
        ColumnNorm(momentum=1.0)
    with pytest.raises(ValueError, match=r"dim=0 must be -1"):
        ColumnNorm(dim=0)


def test_matrices_of_full_rank_have_the_rule_and_the_rest_the_dense_rule():
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    groups = subspan.param_groups(model, rank=None, targets=["0.weight"], verbose=False)
    assert [group.get("full_rank") for group in groups] == [True, None, None]
    optimizer = subspan.ProjectedOptimizer(groups, 0.1, rule=Muon(), dense_rule=Adam())
    assert set(optimizer.state[model[0].weight]) == {"step", "momentum_buffer"}
    assert set(optimizer.state[model[1].weight]) == {"step", "exp_avg", "exp_avg_sq"}
