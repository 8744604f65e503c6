"""ProjectedOptimizer: reduction theorems, refreshes, state, clipping, bad input."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import statistics

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils.flop_counter import FlopCounterMode

import subspan
from subspan.optim import presets, projectors, quant
from subspan.optim.norms import gauge
from subspan.optim.projectors import captured_energy, orient, random_basis
from subspan.optim.rules import Adafactor, Adam, ColumnNorm, Lion, SGDMomentum
from subspan.training.config import OptimConfig
from subspan.training.optimizers import make_optimizer


def group(*params, **settings):
    return {"params": list(params), "rank": 4, "update_proj_gap": 3, "scale": 1.0, **settings}


def feed(optimizer, params, steps, seed=0):
    """Steps with seeded gradients."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """The first r coordinates: at full rank, the identity."""

    def basis(self, G, side, rank, previous, seed):
        return torch.eye(orient(G, side).shape[-2], rank).expand(*G.shape[:-2], -1, -1)


@dataclasses.dataclass(frozen=True)
class Rotation:
    """A random orthonormal basis, fixed."""

    def basis(self, G, side, rank, previous, seed):
        return random_basis((*G.shape[:-2], orient(G, side).shape[-2], rank), seed=5)


RULES = {"adam": Adam(), "adafactor": Adafactor(), "lion": Lion(), "sgd": SGDMomentum(), "identity": SGDMomentum(0.0)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_full_rank_with_the_identity_as_basis_is_the_dense_step(rule, shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    a, b = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    kwargs = {"lr": 0.01, "rule": RULES[rule], "weight_decay": 0.1}
    projected = subspan.ProjectedOptimizer([group(a, rank=100)], projector=Coordinates(), **kwargs)
    dense = subspan.ProjectedOptimizer([b], **kwargs)
    for steps in (1, 6):
        feed(projected, [a], steps, seed=steps)
        feed(dense, [b], steps, seed=steps)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rule", ["sgd", "identity"])
@pytest.mark.parametrize("projector", [Rotation(), subspan.SVD(), subspan.SubspaceIteration(), subspan.Random()])
def test_at_full_rank_a_linear_rule_does_not_see_the_basis(rule, projector):
    """Q Q^T = I: with any orthonormal basis of full rank, plain SGD is plain SGD (arXiv 2403.03507, section 3)."""
    torch.manual_seed(0)
    start = torch.randn(6, 9)
    a, b = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    # a single refresh: momentum lives in one basis
    projected = subspan.ProjectedOptimizer(
        [group(a, rank=6, update_proj_gap=100)], 0.1, rule=RULES[rule], projector=projector
    )
    dense = subspan.ProjectedOptimizer([b], 0.1, rule=RULES[rule])
    feed(projected, [a], 5)
    feed(dense, [b], 5)
    torch.testing.assert_close(a, b)


def test_one_step_by_hand():
    """W <- (1 - lr decay) W - lr scale Q rule(Q^T G), with SGD: W - lr scale Q Q^T G."""
    torch.manual_seed(0)
    W, G = torch.randn(5, 9), torch.randn(5, 9)
    p = nn.Parameter(W.clone())
    optimizer = subspan.ProjectedOptimizer(
        [group(p, rank=2, scale=0.25)], 0.1, rule=SGDMomentum(0.0), projector=subspan.SVD(), weight_decay=0.5
    )
    p.grad = G.clone()
    optimizer.step()
    U = torch.linalg.svd(G)[0][:, :2]
    torch.testing.assert_close(p.detach(), (1 - 0.1 * 0.5) * W - 0.1 * 0.25 * U @ (U.T @ G))
    assert p.grad.equal(G)  # the gradient is still the gradient


def test_the_update_stays_in_the_subspace():
    torch.manual_seed(0)
    start = torch.randn(12, 30)
    p = nn.Parameter(start.clone())
    optimizer = subspan.GaLoreAdamW([group(p, rank=3, update_proj_gap=100)], lr=0.1)
    feed(optimizer, [p], 4)
    assert captured_energy(p.detach() - start, optimizer.state[p]["basis"]).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("projector", [subspan.SVD(), subspan.SubspaceIteration()])
def test_rounding_noise_is_not_stepped_on(projector):
    """Five tokens behind a gradient, rank 8: three rows of R are rounding noise, which Adam would turn into full steps.

    The same gradients, up to rounding, must give the same weights; without the mask they do not.
    """

    def run(mask_null, order):
        generator = torch.Generator().manual_seed(0)
        p, X = nn.Parameter(torch.zeros(12, 20)), torch.randn(12, 5, generator=generator)
        optimizer = subspan.ProjectedOptimizer(
            [group(p, rank=8, update_proj_gap=100)], 0.01, projector=projector, mask_null=mask_null
        )
        for _ in range(5):
            Y = torch.randn(5, 20, generator=generator)  # the same five directions at every step
            p.grad = sum(X[:, i : i + 1] @ Y[i : i + 1] for i in order)  # one sum in two orders
            optimizer.step()
        return p.detach()

    def difference(mask_null):
        a, b = run(mask_null, range(5)), run(mask_null, range(4, -1, -1))
        return ((a - b).norm() / a.norm()).item()

    assert difference(mask_null=True) < 1e-4
    assert difference(mask_null=False) > 1e-2


def test_noise_is_that_of_the_products_behind_a_gradient():
    """fp32 gradients of bf16 products, under autocast, and of TF32 ones."""
    R = torch.ones(3, 8) * torch.tensor([[1.0], [6e-4], [1e-6]])
    live = lambda mask: gauge(R, True, mask)[1].flatten().tolist()  # noqa: E731
    assert live(True) == [True, True, False]
    assert live(torch.bfloat16) == [True, False, False]
    found = [projectors._tf32()]
    torch.set_float32_matmul_precision("high")
    found.append(projectors._tf32())
    torch.set_float32_matmul_precision("highest")
    assert [*found, projectors._tf32()] == [False, True, False]
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8)])})
    for preset, mask in (("galore", torch.bfloat16), ("paper", False)):
        config = OptimConfig(preset=preset, rank=2)
        assert make_optimizer(model, config, seed=0, autocast=torch.bfloat16).mask_null == mask


# ------------------------------------------------------------------------------------------------------- refresh


class Counting:
    """Counts refreshes and hands out what the real projector finds."""

    def __init__(self):
        self.calls = []

    def basis(self, G, side, rank, previous, seed):
        self.calls.append((tuple(G.shape), previous is None, seed))
        return subspan.SubspaceIteration().basis(G, side, rank, previous, seed)


def test_refresh_at_step_zero_and_every_gap():
    p, projector = nn.Parameter(torch.randn(6, 8)), Counting()
    optimizer = subspan.ProjectedOptimizer([group(p, update_proj_gap=3)], projector=projector)
    seen = []
    for seed in range(8):
        feed(optimizer, [p], 1, seed)
        seen.append(len(projector.calls))
    assert seen == [1, 1, 1, 2, 2, 2, 3, 3]
    assert [cold for _, cold, _ in projector.calls] == [True, False, False]  # warm after the first
    assert optimizer.state[p]["refreshes"].item() == 3


def test_basis_changes_only_at_a_refresh():
    p = nn.Parameter(torch.randn(6, 8))
    optimizer = subspan.GaLoreAdamW([group(p, update_proj_gap=2)])
    bases = []
    for seed in range(4):
        feed(optimizer, [p], 1, seed)
        bases.append(optimizer.state[p]["basis"].clone())
    assert bases[0].equal(bases[1])
    assert bases[2].equal(bases[3])
    assert not bases[1].equal(bases[2])


def test_a_first_gradient_of_zero_defers_the_first_refresh():
    p, projector = nn.Parameter(torch.randn(6, 8)), Counting()
    optimizer = subspan.ProjectedOptimizer([group(p, update_proj_gap=100)], projector=projector)
    p.grad = torch.zeros(6, 8)
    optimizer.step()
    assert projector.calls == []
    feed(optimizer, [p], 3)
    assert [cold for _, cold, _ in projector.calls] == [True]


def test_random_first_basis_and_staggered_refreshes():
    params = [nn.Parameter(torch.randn(6, 8)) for _ in range(4)]
    refresh = subspan.Refresh(first="random", stagger=8, seed=3)
    optimizer = subspan.ProjectedOptimizer([group(*params, update_proj_gap=8)], refresh=refresh)
    bases = [optimizer.state[p]["basis"].clone() for p in params]
    for Q in bases:
        torch.testing.assert_close(Q.T @ Q, torch.eye(4), atol=1e-5, rtol=0)
    assert not bases[0].equal(bases[1])
    twin = subspan.ProjectedOptimizer([group(*params, update_proj_gap=8)], refresh=refresh)
    assert all(twin.state[p]["basis"].equal(Q) for p, Q in zip(params, bases, strict=True))
    history = []
    for seed in range(10):
        feed(optimizer, params, 1, seed)
        history.append([int(optimizer.state[p]["refreshes"]) for p in params])
    assert history[0] == [1, 0, 0, 0]  # parameter i of 4 first at step 2 i
    assert history[2] == [1, 1, 0, 0]
    assert history[7] == [1, 1, 1, 1]
    assert history[8] == [2, 1, 1, 1]


def gradients_of_rank_four(steps, turn_at=None):
    """(6, 8) gradients with one left subspace of four dimensions, and from `turn_at` on its complement with two more."""
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(6, 6)).Q
    for step in range(steps):
        columns = directions[:, :4] if turn_at is None or step < turn_at else directions[:, 2:]
        yield columns @ torch.randn(4, 8)


def refresh_steps(refresh, feed, save_at=None, **kwargs):
    """The steps at which a parameter's basis was refreshed; at `save_at` another optimizer takes over its state."""
    p = nn.Parameter(torch.zeros(6, 8))
    projector = subspan.SubspaceIteration(n_iter=2)  # one product finds half of a subspace that is new by half
    make = lambda: subspan.GaLoreAdamW(  # noqa: E731
        [group(p, update_proj_gap=3)], refresh=refresh, projector=projector, **kwargs
    )
    optimizer, seen = make(), []
    for step, G in enumerate(feed):
        if step == save_at:
            state = optimizer.state_dict()
            optimizer = make()
            optimizer.load_state_dict(state)
        before = int(optimizer.state[p]["refreshes"])
        (p * G).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if int(optimizer.state[p]["refreshes"]) > before:
            seen.append(step)
    return seen


@pytest.mark.parametrize("gradients", ["hold", "project"])
@pytest.mark.parametrize(
    ("refresh", "turn_at", "expected"),
    [
        ({}, None, [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]),
        ({"adaptive": 0.9}, None, [0, 3, 9, 21]),  # T = 3, then 6, 12, and 24 at most
        ({"adaptive": 0.9, "max_gap": 6}, None, [0, 3, 9, 15, 21, 27]),
        ({"adaptive": 0.9, "max_gap": 11}, None, [0, 3, 9, 15, 21, 27]),  # 12 would be too long
        ({"adaptive": 0.9}, 5, [0, 3, 9, 15, 27]),  # at 9 the overlap is a half; at 15 nothing moves any more
        ({"adaptive": 0.9, "first": "random"}, None, [0, 3, 9, 21]),  # the random basis is no reason
    ],
)
def test_the_gap_doubles_while_the_subspace_rests(refresh, turn_at, expected, gradients):
    refresh = subspan.Refresh(**{"first": "gradient", **refresh})
    assert refresh_steps(refresh, gradients_of_rank_four(30, turn_at), gradients=gradients) == expected
    for save_at in (1, 4, 10, 22):  # between two refreshes: a resumed run keeps the same steps
        resumed = refresh_steps(refresh, gradients_of_rank_four(30, turn_at), save_at, gradients=gradients)
        assert resumed == expected


def operations(refresh, steps, gap=40, layers=8):
    """Operations of each step over the matrices of a LLaMA of `layers` layers: products, and QR by its formula."""
    shapes = [(16, 16)] * 4 + [(40, 16)] * 2 + [(16, 40)]
    params = [nn.Parameter(torch.randn(shape)) for _ in range(layers) for shape in shapes]
    optimizer = subspan.GaLoreAdamW([group(*params, update_proj_gap=gap)], refresh=refresh)

    def qr(shape, *_, **__):
        return 4 * shape[0] * shape[1] ** 2  # R, then Q: 2 d r^2 each, to leading order

    counts = []
    for step in range(steps):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.linalg_qr: qr}) as counter:
            feed(optimizer, params, 1, step)
        counts.append(counter.get_total_flops())
    return counts


def test_no_step_stalls():
    """Step 0 included, no step does much more than another; with the paper's refresh, one in T does many times the work."""
    counts = operations(subspan.Refresh(first="random"), 85)
    assert max(counts) <= 1.5 * statistics.median(counts)
    counts = operations(subspan.Refresh(first="gradient"), 41)
    assert max(counts) == counts[0] > 4 * statistics.median(counts)


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_gradient_without_a_basis_leaves_the_refresh_to_the_next(bad):
    feed = list(gradients_of_rank_four(12))
    feed[3] = feed[3] * bad
    assert refresh_steps(subspan.Refresh(first="random"), feed) == [
        0,
        4,
        6,
        9,
    ]  # T = 3: later ones come when they would have


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"adaptive": 1.0}, "adaptive=1.0 must be an overlap"),
        ({"adaptive": -0.1}, "adaptive=-0.1 must be an overlap"),
        ({"max_gap": 100}, "set adaptive=0.6"),
        ({"adaptive": 0.5, "max_gap": 0}, "max_gap"),
    ],
)
def test_refresh_refuses_bounds_that_mean_nothing(wrong, message):
    with pytest.raises(ValueError, match=message):
        subspan.Refresh(**wrong)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_non_finite_gradients_reach_neither_basis_nor_moments_nor_weights(bad, max_grad_norm):
    torch.manual_seed(0)
    p, bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))
    optimizer = subspan.GaLoreAdamW([group(p, update_proj_gap=2), {"params": [bias]}], max_grad_norm=max_grad_norm)
    for step in range(6):  # bad gradients on refresh steps and between
        p.grad, bias.grad = torch.randn(6, 8), torch.randn(8)
        if step in (0, 2, 3):
            p.grad[1, 2] = bad
            bias.grad[0] = bad
        optimizer.step()
        assert optimizer.grad_norm.isfinite().item() == (step not in (0, 2, 3))
        for parameter in (p, bias):
            assert parameter.isfinite().all()
            assert all(value.isfinite().all() for value in optimizer.state[parameter].values())


# ---------------------------------------------------------------------------------------------- norm and clipping


def test_grad_norm_is_that_of_the_low_rank_gradient():
    torch.manual_seed(0)
    p, bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))
    optimizer = subspan.GaLoreAdamW([group(p), {"params": [bias]}])
    p.grad, bias.grad = torch.randn(6, 8), torch.randn(8)
    optimizer.step()
    R = optimizer.state[p]["basis"].T @ p.grad
    torch.testing.assert_close(optimizer.grad_norm, (R.square().sum() + bias.grad.square().sum()).sqrt())


def test_clipping_scales_projected_and_dense_gradients_alike():
    """With SGD a clipped step is the unclipped one times max_grad_norm / norm."""
    torch.manual_seed(0)
    starts = torch.randn(6, 8), torch.randn(8)
    moves = []
    for max_grad_norm in (None, 0.5, 1e6):
        p, bias = (nn.Parameter(start.clone()) for start in starts)
        groups = [group(p), {"params": [bias]}]
        optimizer = subspan.ProjectedOptimizer(groups, 1.0, rule=SGDMomentum(0.0), max_grad_norm=max_grad_norm)
        feed(optimizer, [p, bias], 1)
        moves.append(torch.cat([(p - starts[0]).flatten(), bias - starts[1]]).detach())
    free, clipped, loose = moves
    torch.testing.assert_close(clipped, free * 0.5 / optimizer.grad_norm, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loose, free)


# ------------------------------------------------------------------------------------------------------- state


def two_optimizers(dtype=torch.bfloat16, **kwargs):
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6)).to(dtype)
        groups = [group(model[0].weight, model[1].weight), {"params": [model[0].bias, model[1].bias]}]
        made.append((model, subspan.GaLoreAdamW(groups, lr=0.01, **kwargs)))
    return made


def load_plain(source, target, path):
    torch.save(source[1].state_dict(), path)
    target[1].load_state_dict(torch.load(path, weights_only=True))


def load_distributed(source, target, path):
    torch.save(get_optimizer_state_dict(*source), path)
    set_optimizer_state_dict(*target, torch.load(path, weights_only=True))


@pytest.mark.parametrize("load", [load_plain, load_distributed])
@pytest.mark.parametrize("state_dtype", [torch.float32, None, torch.int8, torch.int4])
def test_a_resumed_optimizer_continues_bit_for_bit(load, state_dtype, tmp_path, monkeypatch):
    """fp32 moments of bf16 weights too, and codes: torch alone would cast them to bf16."""
    monkeypatch.setattr(quant, "MIN_ELEMENTS", 0)
    low = {"basis_dtype": torch.int4, "stochastic_rounding": True} if state_dtype == torch.int4 else {}
    source, target = two_optimizers(state_dtype=state_dtype, **low)
    feed(source[1], list(source[0].parameters()), 5)
    target[0].load_state_dict(source[0].state_dict())
    load(source, target, tmp_path / "optimizer.pt")
    for a, b in zip(source[0].parameters(), target[0].parameters(), strict=True):
        for key, value in source[1].state[a].items():
            other = target[1].state[b][key]
            assert value.dtype == other.dtype
            assert value.equal(other)
            assert value.data_ptr() != other.data_ptr()
    for model, optimizer in (source, target):
        feed(optimizer, list(model.parameters()), 5, seed=9)
    for a, b in zip(source[0].parameters(), target[0].parameters(), strict=True):
        assert a.equal(b)


def test_quantize_weights_takes_what_param_groups_projects():
    model = nn.Module()
    model.embed = nn.Embedding(20, 8)
    model.layers = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8)])
    subspan.quantize_weights(model)
    quantized = [name for name, p in model.named_parameters() if type(p.data).__name__ == "Int8Weight"]
    assert quantized == ["layers.0.weight", "layers.1.weight"]
    subspan.quantize_weights(model, ["embed.weight"])
    assert type(model.embed.weight.data).__name__ == "Int8Weight"


def test_state_exists_from_construction_and_its_keys_never_change():
    (model, optimizer), _ = two_optimizers()
    before = {p: set(state) for p, state in optimizer.state.items()}
    assert len(before) == 4
    assert all(isinstance(v, torch.Tensor) for state in optimizer.state.values() for v in state.values())
    feed(optimizer, list(model.parameters()), 4)
    assert {p: set(state) for p, state in optimizer.state.items()} == before


def test_state_can_be_planned_on_the_meta_device():
    p = nn.Parameter(torch.empty(64, 32, device="meta"))
    for first in ("gradient", "random"):
        optimizer = subspan.GaLoreAdamW([group(p, rank=8)], refresh=subspan.Refresh(first=first))
        shapes = {key: tuple(value.shape) for key, value in optimizer.state[p].items()}
        assert shapes == {
            "step": (),
            "refreshes": (),
            "last_refresh": (),
            "stretch": (),
            "basis": (32, 8),
            "exp_avg": (8, 64),
            "exp_avg_sq": (8, 64),
        }


def test_a_state_dict_of_another_rank_is_refused_and_loads_nothing():
    (model, optimizer), _ = two_optimizers()
    other = subspan.GaLoreAdamW(
        [group(model[0].weight, model[1].weight, rank=2), {"params": [model[0].bias, model[1].bias]}]
    )
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="same rank"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="has 4 parameters, the optimizer 1"):
        subspan.GaLoreAdamW([group(model[0].weight)]).load_state_dict(optimizer.state_dict())
    assert str(before) == str(other.state_dict())


def test_a_deep_copy_steps_like_the_original():
    model = nn.Linear(8, 6)
    optimizer = subspan.GaLoreAdamW([group(model.weight), {"params": [model.bias]}])
    feed(optimizer, list(model.parameters()), 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin_model, twin)):
        feed(o, list(m.parameters()), 4, seed=3)
    assert model.weight.equal(twin_model.weight)
    assert twin.param_groups[0]["params"][0] is twin_model.weight


def test_a_deep_copy_beside_a_scheduler_steps_itself():
    """A scheduler puts a step of its own before the class's, which holds on to the original."""
    model = nn.Linear(8, 6)
    optimizer = subspan.GaLoreAdamW([group(model.weight), {"params": [model.bias]}])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    before = model.weight.detach().clone()
    twin_model, twin = copy.deepcopy((model, optimizer))
    feed(twin, list(twin_model.parameters()), 1)
    assert model.weight.equal(before)
    assert not twin_model.weight.equal(before)
    pickle.dumps(optimizer)


def test_torch_defaults_do_not_reach_state():
    """Counters are fp32 on the CPU, or a step beyond 256 would be rounded, whatever new tensors are by default."""
    p = nn.Parameter(torch.randn(6, 8))
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        optimizer = subspan.GaLoreAdamW([group(p)], gradients="hold", refresh=subspan.Refresh(first="random"))
        counters = [optimizer.state[p][key] for key in ("step", "refreshes", "last_refresh", "stretch")]
        p.grad = torch.ones(6, 8, dtype=torch.float32, device="cpu")
        optimizer.step()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)
    assert {(X.dtype, X.device.type) for X in (*counters, optimizer.grad_norm)} == {(torch.float32, "cpu")}


def test_torch_schedulers_work():
    model = nn.Linear(8, 6)
    optimizer = subspan.GaLoreAdamW([group(model.weight, lr=0.1), {"params": [model.bias]}], lr=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    feed(optimizer, list(model.parameters()), 1)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.1]


def test_a_parameter_without_gradient_is_left_alone():
    p, q = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6, 8))
    optimizer = subspan.GaLoreAdamW([group(p, q)], weight_decay=0.1)
    before = q.detach().clone()
    feed(optimizer, [p], 3)
    assert q.equal(before)
    assert optimizer.state[q]["step"].item() == 0
    assert optimizer.state[p]["step"].item() == 3


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.int8, torch.int4])
def test_a_normal_step_never_asks_the_device(monkeypatch, state_dtype):
    """No host sync outside refreshes: every way to read a tensor's value from Python is forbidden."""
    monkeypatch.setattr(quant, "MIN_ELEMENTS", 0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
    model = model.to(torch.bfloat16)
    weights, biases = [m.weight for m in model], [m.bias for m in model]
    for rule in RULES.values():
        low = {"state_dtype": state_dtype, "basis_dtype": torch.int4, "stochastic_rounding": True}
        low = {} if state_dtype == torch.float32 or isinstance(rule, subspan.Adafactor) else low
        optimizer = subspan.ProjectedOptimizer(
            [group(*weights), {"params": biases}], rule=rule, max_grad_norm=1.0, **low
        )
        feed(optimizer, weights + biases, 1)

        def forbidden(self, *args, **kwargs):
            raise AssertionError("host sync")

        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
                patch.setattr(torch.Tensor, name, forbidden)
            feed(optimizer, weights + biases, 2)  # steps 1 and 2 of a gap of 3
            with pytest.raises(AssertionError, match="host sync"):
                feed(optimizer, weights + biases, 1)  # the refresh may: so the test can fail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1024, 512), (512, 1024)])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_a_projected_step_makes_no_full_size_temporary(dtype, shape, proj_type):
    """Peak of the allocations of one step, as torch's profiler records them, at a rank of 16 of 512."""
    p = nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = subspan.GaLoreAdamW([group(p, rank=16, proj_type=proj_type)], weight_decay=0.1)
    feed(optimizer, [p], 1)
    p.grad = torch.randn(shape).to(dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert 0 < peak < 0.5 * p.numel() * p.element_size()


# ------------------------------------------------------------------------------------------- more than two dimensions


def test_a_convolution_is_projected_as_a_matrix():
    torch.manual_seed(0)
    conv = nn.Parameter(torch.randn(6, 4, 3, 3))
    flat = nn.Parameter(conv.detach().clone().view(6, 36))
    a = subspan.GaLoreAdamW([group(conv, view="conv")], lr=0.1)
    b = subspan.GaLoreAdamW([group(flat)], lr=0.1)
    for _ in range(4):
        conv.grad = torch.randn(6, 4, 3, 3)
        flat.grad = conv.grad.view(6, 36).clone()
        a.step()
        b.step()
    assert conv.view(6, 36).equal(flat)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_stacked_experts_are_projected_one_by_one(proj_type):
    torch.manual_seed(0)
    stacked = nn.Parameter(torch.randn(3, 6, 10))
    single = [nn.Parameter(w.clone()) for w in stacked.detach()]
    settings = {"proj_type": proj_type, "update_proj_gap": 2}
    a = subspan.GaLoreAdamW([group(stacked, view="batch", **settings)], lr=0.1, projector=subspan.SVD())
    b = subspan.GaLoreAdamW([group(*single, **settings)], lr=0.1, projector=subspan.SVD())
    for _ in range(5):
        stacked.grad = torch.randn(3, 6, 10)
        for p, g in zip(single, stacked.grad, strict=True):
            p.grad = g.clone()
        a.step()
        b.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in single]))


@pytest.mark.parametrize("projector", [subspan.SVD(), subspan.SubspaceIteration()])
def test_an_expert_without_tokens_keeps_its_basis(projector):
    torch.manual_seed(0)
    stacked = nn.Parameter(torch.randn(2, 6, 10))
    optimizer = subspan.GaLoreAdamW([group(stacked, view="batch", update_proj_gap=2)], projector=projector)
    feed(optimizer, [stacked], 2)
    before = optimizer.basis(stacked).clone()
    stacked.grad = torch.randn(2, 6, 10)
    stacked.grad[1] = 0
    optimizer.step()
    after = optimizer.basis(stacked)
    assert after[1].equal(before[1])
    assert not after[0].equal(before[0])


def test_an_expert_without_tokens_says_nothing_of_how_far_bases_turn():
    """Its overlap is 1; T would grow while those of the others turn."""
    torch.manual_seed(0)
    stacked = nn.Parameter(torch.randn(4, 24, 40))
    settings = group(stacked, view="batch", update_proj_gap=1, rank=4)
    optimizer = subspan.GaLoreAdamW([settings], projector=subspan.SVD(), refresh=subspan.Refresh(adaptive=0.5))
    for _ in range(4):
        stacked.grad = torch.randn(4, 24, 40)
        stacked.grad[1:] = 0
        optimizer.step()
    assert optimizer.state[stacked]["stretch"] == 1
    assert optimizer.state[stacked]["refreshes"] == 4


def test_moments_of_fp64_are_transported():
    p = nn.Parameter(torch.randn(6, 8, dtype=torch.float64))
    optimizer = subspan.GaLoreAdamW([group(p, update_proj_gap=1)], refresh=subspan.Refresh(moments="transport"))
    feed(optimizer, [p], 3)
    assert bool(p.isfinite().all())


@pytest.mark.parametrize("rule", [Adafactor(), Adam(), Lion(), SGDMomentum()])
@pytest.mark.parametrize("combine", [None, subspan.Fira(), subspan.Frugal(), subspan.Apollo()])
def test_in_update_a_first_gradient_of_nan_leaves_weights_alone(rule, combine):
    """Even of a rule that divides zeros by zeros."""
    W, b = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))
    before = [W.detach().clone(), b.detach().clone()]
    groups = [group(W), {"params": [b]}]
    optimizer = subspan.ProjectedOptimizer(groups, 0.1, rule=rule, combine=combine, gradients="update")
    ((W.sum() + b.sum()) * float("nan")).backward()
    optimizer.step()
    assert W.equal(before[0])
    assert b.equal(before[1])


@pytest.mark.parametrize("how", ["backward", "clip", "zero_grad"])
def test_in_hold_a_step_takes_the_gradients_of_now(how):
    """Not those that prepare() saw: a backward pass, torch's clipping, a zero_grad() of the model come between as they like."""
    moved = []
    for prepared in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(8, 6)
        optimizer = subspan.GaLoreAdamW([group(model.weight), {"params": [model.bias]}], lr=0.1, max_grad_norm=1.0)
        feed(optimizer, list(model.parameters()), 2)
        model(torch.ones(2, 8)).square().sum().backward()
        if prepared:
            optimizer.prepare()
        if how == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        else:
            if how == "zero_grad":
                model.zero_grad()
            model(torch.full((2, 8), -3.0)).sum().backward()
        optimizer.step()
        moved.append((model.weight.detach().clone(), float(optimizer.grad_norm)))
    assert moved[0][0].equal(moved[1][0])
    assert moved[0][1] == moved[1][1]


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((6, 8), {"rank": 0}, "rank=0"),
        ((6, 8), {"rank": "128"}, "rank='128'"),
        ((6, 8), {"rank": True}, "rank=True"),
        ((6, 8), {"update_proj_gap": 0}, "update_proj_gap=0"),
        ((6, 8), {"proj_type": "full"}, "use proj_type='std'"),
        ((6, 8), {"proj_type": "both"}, "proj_type='both' is unknown"),
        ((6, 8), {"scale": "big"}, "scale='big'"),
        ((6, 8), {"lr": -1.0}, "lr=-1.0"),
        ((6, 8), {"weight_decay": -0.1}, "weight_decay=-0.1"),
        ((6, 8), {"betas": (0.9, 0.99)}, "betas in a parameter group"),
        ((6, 8), {"view": "rows"}, "view='rows'"),
        ((6, 8), {"view": "batch"}, "drop view='batch'"),
        ((8,), {}, "put it in a group without rank"),
        ((2, 6, 8), {}, "view='conv'"),
        ((0, 8), {}, "is empty"),
        ((6, 8), {"maximize": True}, "maximize=True"),
    ],
)
def test_a_bad_group_is_refused(shape, settings, message):
    p = nn.Parameter(torch.randn(shape))
    with pytest.raises(ValueError, match=message) as error:
        subspan.GaLoreAdamW([group(p, **settings)])
    assert "\n" not in str(error.value)


def test_a_bad_group_added_later_leaves_the_optimizer_as_it_was():
    p, q = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))
    optimizer = subspan.GaLoreAdamW([group(p)])
    with pytest.raises(ValueError, match="group without rank"):
        optimizer.add_param_group(group(q))
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [q]})
    feed(optimizer, [p, q], 2)
    assert optimizer.state[q]["step"].item() == 2


def test_a_group_whose_rule_refuses_a_parameter_leaves_nothing_behind():
    p, q, v = (nn.Parameter(torch.randn(shape)) for shape in ((6, 8), (4, 8), (8,)))
    optimizer = presets.muon([{"params": [p], "full_rank": True}])
    with pytest.raises(ValueError, match="Muon"):
        optimizer.add_param_group({"params": [q, v], "full_rank": True})
    optimizer.add_param_group({"params": [q], "full_rank": True})
    optimizer.add_param_group({"params": [v]})
    feed(optimizer, [p, q, v], 2)
    assert [optimizer.state[x]["step"].item() for x in (p, q, v)] == [2, 2, 2]


@pytest.mark.parametrize("settings", [{"full_rank": True}, {"rank": 2}])
def test_a_weight_in_another_memory_format_is_refused(settings):
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    groups = [{"params": [conv.weight], "view": "conv", **settings}]
    with pytest.raises(ValueError, match="not contiguous: call"):
        subspan.GaLoreAdamW(groups)
    conv.to(memory_format=torch.contiguous_format)
    optimizer = subspan.GaLoreAdamW(groups)
    conv.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="not contiguous any more"):
        feed(optimizer, [conv.weight], 1)


def test_a_rule_that_would_step_nothing_is_refused():
    """muon(model.parameters()) would be AdamW with Muon's learning rate."""
    with pytest.raises(ValueError, match="rule=Muon would step nothing"):
        presets.muon(nn.Linear(8, 6).parameters())


@pytest.mark.parametrize("preset", ["fira", "frugal", "apollo", "apollo_mini"])
def test_a_combine_that_would_do_nothing_is_refused(preset):
    with pytest.raises(ValueError, match=r"no group has a rank, so combine=\w+ would do nothing"):
        presets.PRESETS[preset](nn.Linear(8, 6).parameters())


def test_names_in_another_order_are_refused():
    def build(*names):
        return subspan.GaLoreAdamW([{"params": [(name, nn.Parameter(torch.randn(4, 4))) for name in names]}])

    with pytest.raises(ValueError, match="another order, b where a is here"):
        build("a", "b").load_state_dict(build("b", "a").state_dict())
    build("a", "b").load_state_dict(build("x", "y").state_dict())  # of a model under another name


def test_a_group_with_a_name_may_have_a_rule_of_its_own():
    """It is stepped as by an optimizer with that rule alone, and a saved state goes on bit for bit."""

    def build():
        torch.manual_seed(0)
        p, q, x = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))
        groups = [
            {"params": [p], "name": "matrices", "full_rank": True},
            {"params": [q], "name": "head"},
            {"params": [x], "name": "vectors"},
        ]
        rules = {"head": ColumnNorm(0.9)}
        return (p, q, x), subspan.ProjectedOptimizer(groups, 0.1, rule=ColumnNorm(), dense_rule=Adam(), rules=rules)

    params, optimizer = build()
    feed(optimizer, params, 3)
    assert [optimizer.state[p].keys() - {"step"} for p in params] == [
        set(),
        {"momentum_buffer"},
        {"exp_avg", "exp_avg_sq"},
    ]
    alone = [p.detach().clone() for p in build()[0]]
    for i, rule in enumerate((ColumnNorm(), ColumnNorm(0.9), Adam())):
        twin = nn.Parameter(alone[i])
        single = subspan.ProjectedOptimizer([twin], 0.1, rule=rule)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            drawn = [torch.randn(p.shape, generator=generator) for p in params]
            twin.grad = drawn[i]
            single.step()
        assert twin.equal(params[i])
    others, other = build()
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(optimizer.state_dict())
    feed(optimizer, params, 2, seed=1)
    feed(other, others, 2, seed=1)
    assert all(p.equal(q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rules": {"head": Adam()}}, "rules: no group without a rank is named 'head'"),
        ({"rules": {"head": Adafactor()}, "dense_state_dtype": torch.int8}, "no moment to store with Adafactor"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"state_dtype": torch.int16}, "state_dtype=torch.int16"),
        ({"state_dtype": torch.float8_e4m3fn}, "state_dtype=torch.float8_e4m3fn"),
        ({"dense_state_dtype": torch.uint8}, "dense_state_dtype=torch.uint8"),
        ({"basis_dtype": torch.int8}, "basis_dtype=torch.int8"),
        ({"dense_rule": subspan.Adafactor(), "dense_state_dtype": torch.int8}, "no moment to store with Adafactor"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        subspan.GaLoreAdamW([nn.Parameter(torch.randn(6, 8))], **kwargs)


def test_clipping_may_be_set_later_and_is_checked():
    optimizer = subspan.GaLoreAdamW([nn.Parameter(torch.randn(6, 8))])
    optimizer.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="max_grad_norm=0 must be positive: use None"):
        optimizer.max_grad_norm = 0
    assert optimizer.max_grad_norm == 1.0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"first": "zero"}, "first='zero'"),
        ({"first": "gradient", "stagger": 5}, "first='random'"),
        ({"stagger": 5}, "first='random'"),  # gradients="hold": the first basis is the gradient's
        ({"stagger": 0}, "stagger=0"),
    ],
)
def test_bad_refresh_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        subspan.GaLoreAdamW([nn.Parameter(torch.randn(6, 8))], refresh=subspan.Refresh(**kwargs))


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match=r"complex64 cannot be trained"):
        subspan.GaLoreAdamW([nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))])


def test_a_gradient_of_another_memory_layout_is_read_right():
    torch.manual_seed(0)
    start, G = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(start.clone())
        optimizer = subspan.GaLoreAdamW([group(p, view="conv")], lr=0.1)
        p.grad = G.to(memory_format=layout)
        optimizer.step()
        moved.append(p.detach())
    assert moved[0].equal(moved[1])


@pytest.mark.parametrize("gradients", ["hold", "project", "update"])
def test_sparse_gradients_are_refused(gradients):
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = subspan.GaLoreAdamW([group(embedding.weight)], gradients=gradients)

    def step():
        embedding(torch.tensor([1, 2])).sum().backward()
        optimizer.step()

    with pytest.raises(ValueError, match="sparse=False"):
        step()


@pytest.mark.parametrize("how", ["step", "load_state_dict"])
def test_state_follows_a_model_that_moves(how):
    """To the meta device, which every machine has. Accelerate moves the model and then loads the optimizer's state."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3))
    groups = [{"params": [model[0].weight], "rank": 2}, {"params": [*model[1].parameters()]}]
    optimizer = subspan.GaLoreAdamW(groups, lr=0.1)
    saved = optimizer.state_dict()
    for p in model.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(torch.empty(p.shape, device="meta")))
    if how == "load_state_dict":
        optimizer.load_state_dict(saved)
    else:
        for p in model.parameters():
            group, p.grad = optimizer.group_of(p), torch.empty_like(p)
            with torch.no_grad():
                R = optimizer.project(
                    group, p, refresh=False
                )  # a refresh looks at the gradient, of which there is none
                optimizer.apply(group, p, R, torch.ones((), dtype=torch.bool, device="meta"))
    for p in model.parameters():
        on_host = {"step", "refreshes", "last_refresh", "stretch", "reset"}
        assert {key for key, X in optimizer.state[p].items() if not X.is_meta} == on_host & optimizer.state[p].keys()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("gradients", ["hold", "update"])
def test_muon_sees_a_convolution_as_one_matrix(gradients, state_dtype):
    model = nn.ModuleList([nn.Conv2d(8, 72, 3, bias=False)])
    groups = subspan.param_groups(model, rank=None, targets=["weight"], views={"weight": "conv"}, verbose=False)
    optimizer = subspan.ProjectedOptimizer(
        groups, 1.0, rule=subspan.Muon(), dense_rule=subspan.Adam(), gradients=gradients, state_dtype=state_dtype
    )
    before = model[0].weight.detach().clone()
    model[0](torch.randn(3, 8, 12, 12)).square().mean().backward()
    optimizer.step()
    values = torch.linalg.svdvals((before - model[0].weight.detach()).view(72, 72))
    assert values.max() < 1.3
    assert (values > 0.5).sum() >= 70  # of 72; the smallest hardly grow
    copied = subspan.ProjectedOptimizer(
        groups, 1.0, rule=subspan.Muon(), dense_rule=subspan.Adam(), state_dtype=state_dtype
    )
    copied.load_state_dict(optimizer.state_dict())
