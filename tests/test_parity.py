"""Pinned to the reference (galore_torch 1.0) and to torch: the same gradients give the same weights."""

from __future__ import annotations

import itertools

import galore_torch
import pytest
import torch

import subspan
from subspan import compat
from subspan.optim import presets

SHAPES = {"tall": (24, 16), "wide": (16, 24), "square": (16, 16)}
PROJ_TYPES = ("std", "reverse_std", "left", "right")
SEEDS = (0, 1, 2)
GAP, STEPS, RANK = 5, 18, 6  # refreshes at steps 0, 5, 10, 15


def gradients(shape, seed, steps=STEPS):
    """Full-rank gradients whose spectrum falls, so that singular vectors are well defined, and drifts."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    scale = torch.logspace(0, -1.5, min(m, n))
    for _ in range(steps):
        U = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator)).Q
        V = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator)).Q
        yield (U * scale) @ V.mT


def trajectory(make, shape, seed, proj_type="std", **group):
    """The weights after every step, (steps, m, n), of a projected parameter fed with `gradients`."""
    start = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))
    p = torch.nn.Parameter(start.clone())
    settings = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": proj_type}
    optimizer = make([{"params": [p], **settings, **group}])
    weights = []
    for G in gradients(shape, seed):
        p.grad = G.clone()
        optimizer.step()
        weights.append(p.detach().clone())
    return torch.stack(weights) - start


def assert_same(ours, theirs, tolerance=1e-5):
    assert theirs.norm() > 0
    assert (ours - theirs).norm() / theirs.norm() < tolerance


def reference_adamw(**kwargs):
    return lambda groups: galore_torch.GaLoreAdamW(groups, lr=0.01, no_deprecation_warning=True, **kwargs)


def reference_adafactor(**kwargs):
    return lambda groups: galore_torch.GaLoreAdafactor(
        groups, lr=0.01, scale_parameter=False, relative_step=False, warmup_init=False, **kwargs
    )


# The reference guesses the side of reverse_std from the compact shape and crashes when m < n and rank >= m only; at this
# rank it is right, so all twelve cases are compared.
CASES = list(itertools.product(SHAPES, PROJ_TYPES, SEEDS))


@pytest.mark.parametrize(("shape", "proj_type", "seed"), CASES)
def test_adamw_follows_the_reference(shape, proj_type, seed):
    shape = SHAPES[shape]
    theirs = trajectory(reference_adamw(eps=1e-12), shape, seed, proj_type)
    ours = trajectory(
        lambda groups: subspan.GaLoreAdamW(groups, lr=0.01, eps=1e-12, projector=subspan.SVD()), shape, seed, proj_type
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize(("shape", "proj_type", "seed"), CASES)
def test_adafactor_follows_the_reference(shape, proj_type, seed):
    shape = SHAPES[shape]
    theirs = trajectory(reference_adafactor(), shape, seed, proj_type)
    ours = trajectory(
        lambda groups: subspan.GaLoreAdafactor(groups, lr=0.01, projector=subspan.SVD()), shape, seed, proj_type
    )
    assert_same(ours, theirs)


COMPAT = {
    "adamw": (
        reference_adamw(),
        lambda groups: compat.GaLoreAdamW(groups, lr=0.01, no_deprecation_warning=True),
    ),
    "adamw, decay": (
        reference_adamw(weight_decay=0.1),
        lambda groups: compat.GaLoreAdamW(groups, lr=0.01, weight_decay=0.1),
    ),
    "adamw, no correction": (
        reference_adamw(correct_bias=False, betas=(0.8, 0.95)),
        lambda groups: compat.GaLoreAdamW(groups, lr=0.01, betas=(0.8, 0.95), correct_bias=False),
    ),
    "adafactor, decay": (
        reference_adafactor(weight_decay=0.1, clip_threshold=0.5),
        lambda groups: compat.GaLoreAdafactor(
            groups, lr=0.01, scale_parameter=False, relative_step=False, weight_decay=0.1, clip_threshold=0.5
        ),
    ),
    "paper preset": (reference_adamw(weight_decay=0.1), lambda groups: presets.paper(groups, 0.01, weight_decay=0.1)),
}


def test_adafactor_of_bf16_weights_keeps_its_moments_in_fp32_as_the_reference_does():
    """In bf16 they would stand still late in a training, where a step moves them by less than a 256th."""
    seen = []
    for make in (reference_adafactor(), lambda groups: compat.GaLoreAdafactor(groups, lr=0.01)):
        p = torch.nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
        optimizer = make(projected(p))
        for step in range(3):
            p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).bfloat16()
            optimizer.step()
        seen.append(optimizer.state[p]["exp_avg_sq_row"])
    assert [row.dtype for row in seen] == [torch.float32] * 2
    torch.testing.assert_close(seen[1], seen[0], rtol=0.02, atol=0)  # R of bf16 here


@pytest.mark.parametrize("case", COMPAT)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_compat_follows_the_reference_with_its_own_conventions(case, shape, proj_type):
    reference, ours = COMPAT[case]
    assert_same(trajectory(ours, SHAPES[shape], 0, proj_type), trajectory(reference, SHAPES[shape], 0, proj_type))


@pytest.mark.parametrize("dense", [True, False])
def test_the_8_bit_class_follows_its_rule_in_fp32(dense):
    """The reference's runs on CUDA alone. Its rule: eps after the bias correction, decay after the update; moments of 8 bits."""

    def move(make):
        p = torch.nn.Parameter(torch.randn(96, 160, generator=torch.Generator().manual_seed(0)))
        group = {"rank": 64, "update_proj_gap": 5, "scale": 1.0, "proj_type": "std"}
        optimizer = make([{"params": [p], **({} if dense else group)}])
        start = p.detach().clone()
        for step in range(12):
            p.grad = torch.randn(96, 160, generator=torch.Generator().manual_seed(step + 1))
            optimizer.step()
        return p.detach() - start, optimizer.state[p]

    exact, _ = move(
        lambda groups: subspan.GaLoreAdamW(
            groups, 0.01, weight_decay=0.1, projector=subspan.SVD(), decay_after_update=True, mask_null=False
        )
    )
    ours, state = move(lambda groups: compat.GaLoreAdamW8bit(groups, lr=0.01, weight_decay=0.1))
    assert state["exp_avg.codes"].dtype == state["exp_avg_sq.codes"].dtype == torch.uint8
    error = torch.linalg.norm(ours - exact) / torch.linalg.norm(exact)
    assert 0 < error < 0.03


@pytest.mark.parametrize("setting", [{"amsgrad": True}, {"block_wise": False}, {"percentile_clipping": 5}])
def test_the_8_bit_class_refuses_what_it_does_not_do(setting):
    with pytest.raises(ValueError, match="is not supported: use"):
        compat.GaLoreAdamW8bit([torch.nn.Parameter(torch.randn(4, 4))], **setting)


def test_dense_parameters_beside_projected_ones_follow_the_reference():
    def run(make):
        torch.manual_seed(0)
        weight, bias = torch.nn.Parameter(torch.randn(12, 8)), torch.nn.Parameter(torch.randn(8))
        settings = {"rank": 4, "update_proj_gap": 3, "scale": 0.5, "proj_type": "std"}
        optimizer = make([{"params": [bias]}, {"params": [weight], **settings}])
        for _ in range(8):
            weight.grad, bias.grad = torch.randn(12, 8), torch.randn(8)
            optimizer.step()
        return torch.cat([weight.detach().flatten(), bias.detach()])

    assert_same(run(lambda g: compat.GaLoreAdamW(g, lr=0.01)), run(reference_adamw()))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("eps", [1e-8, 1e-4])
def test_a_dense_group_is_torch_adamw(weight_decay, eps):
    torch.manual_seed(0)
    start = torch.randn(6, 5)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    kwargs = {"lr": 0.01, "betas": (0.9, 0.99), "eps": eps, "weight_decay": weight_decay}
    a, b = subspan.GaLoreAdamW([ours], **kwargs), torch.optim.AdamW([theirs], **kwargs)
    for _ in range(50):
        ours.grad = torch.randn(6, 5)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    assert_same(ours.detach() - start, theirs.detach() - start, 1e-6)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_a_dense_group_is_torch_sgd(momentum, nesterov):
    torch.manual_seed(0)
    start = torch.randn(6, 5)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a = subspan.GaLoreSGD([ours], lr=0.01, momentum=momentum, nesterov=nesterov)
    b = torch.optim.SGD([theirs], lr=0.01, momentum=momentum, nesterov=nesterov)
    for _ in range(10):
        ours.grad = torch.randn(6, 5)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    assert_same(ours.detach() - start, theirs.detach() - start, 1e-6)


# ------------------------------------------------------------------ where the reference is wrong (its published defects)


def projected(p, **group):
    return [{"params": [p], "rank": 4, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std", **group}]


def test_state_loads_with_weights_only(tmp_path):
    """Defect 1: the reference keeps a Python object in its state, which a safe load refuses."""
    for make, loads in ((reference_adamw(), False), (lambda g: compat.GaLoreAdamW(g), True)):
        p = torch.nn.Parameter(torch.randn(8, 6))
        optimizer = make(projected(p))
        p.grad = torch.randn(8, 6)
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        if loads:
            torch.load(tmp_path / "optimizer.pt", weights_only=True)
        else:
            with pytest.raises(Exception, match="weights_only"):
                torch.load(tmp_path / "optimizer.pt", weights_only=True)


def test_reverse_std_works_where_the_reference_crashes():
    """Defect 3: m < n and rank >= m."""
    for make, works in ((reference_adamw(), False), (lambda g: compat.GaLoreAdamW(g), True)):
        p = torch.nn.Parameter(torch.randn(4, 9))
        p.grad = torch.randn(4, 9)
        optimizer = make(projected(p, proj_type="reverse_std", rank=4))
        if works:
            optimizer.step()
        else:
            with pytest.raises(RuntimeError):
                optimizer.step()


def test_nan_gradient_neither_raises_nor_spreads():
    """Defect 6: the reference dies in its SVD."""
    for make, works in ((reference_adamw(), False), (lambda g: compat.GaLoreAdamW(g), True)):
        p = torch.nn.Parameter(torch.ones(8, 6))
        optimizer = make(projected(p))
        p.grad = torch.full((8, 6), float("nan"))
        if not works:
            with pytest.raises(RuntimeError):
                optimizer.step()
            continue
        optimizer.step()
        assert p.equal(torch.ones(8, 6))
        p.grad = torch.randn(8, 6)
        optimizer.step()
        assert p.isfinite().all()
        assert all(value.isfinite().all() for value in optimizer.state[p].values())


def test_closure_may_call_backward():
    """Defect 11: the reference runs its closure without gradients."""
    for make, works in ((reference_adamw(), False), (lambda g: compat.GaLoreAdamW(g), True)):
        p = torch.nn.Parameter(torch.ones(8, 6))
        optimizer = make(projected(p))

        def closure(p=p):
            loss = p.square().sum()
            loss.backward()
            return loss

        if works:
            assert optimizer.step(closure).item() == 48
        else:
            with pytest.raises(RuntimeError):
                optimizer.step(closure)


def test_group_is_left_as_given():
    """Defect 12: the reference writes keys into the caller's groups."""
    p = torch.nn.Parameter(torch.randn(8, 6))
    group = projected(p)[0]
    before = {key: value for key, value in group.items() if key != "params"}
    p.grad = torch.randn(8, 6)
    optimizer = compat.GaLoreAdamW([group])
    keys = set(optimizer.param_groups[0])
    optimizer.step()
    assert set(optimizer.param_groups[0]) == keys
    assert {key: group[key] for key in before} == before


def test_fp32_moments_survive_bf16_weights_where_the_reference_loses_them():
    """Defect 8: with bf16 state and beta2 = 0.999 a second moment can never decay."""

    def second_moment(make):
        p = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
        optimizer = make(projected(p, update_proj_gap=10_000))
        p.grad = torch.eye(8, dtype=torch.bfloat16)
        optimizer.step()
        optimizer.state[p]["exp_avg_sq"].fill_(1.0)
        p.grad = torch.zeros(8, 8, dtype=torch.bfloat16)
        for _ in range(1000):
            optimizer.step()
        return optimizer.state[p]["exp_avg_sq"].float().mean().item()

    assert second_moment(reference_adamw()) == 1.0
    assert second_moment(lambda g: subspan.GaLoreAdamW(g)) == pytest.approx(0.999**1000, rel=1e-3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale_parameter": True, "relative_step": False, "lr": 0.1}, "scale_parameter=True"),
        ({"scale_parameter": False, "relative_step": True, "lr": 0.1}, "relative_step=True"),
        ({"scale_parameter": False, "relative_step": False, "lr": 0.1, "beta1": 0.9}, "beta1=0.9"),
        ({"scale_parameter": False, "relative_step": False}, "lr=None"),
        ({"scale_parameter": False, "relative_step": False, "lr": 0.1, "warmup_init": True}, "warmup_init=True"),
    ],
)
def test_adafactor_settings_that_are_not_built_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        compat.GaLoreAdafactor([torch.nn.Parameter(torch.randn(4, 4))], **kwargs)


def test_state_that_the_reference_saved_is_refused_with_what_differs():
    p = torch.nn.Parameter(torch.randn(4, 6))
    theirs = reference_adamw()(projected(p))
    p.grad = torch.randn(4, 6)
    theirs.step()
    with pytest.raises(ValueError, match=r"'step': 'int'.*same rank, proj_type, rule"):
        compat.GaLoreAdamW(projected(p)).load_state_dict(theirs.state_dict())


def test_compat_groups_need_the_reference_keys():
    p = torch.nn.Parameter(torch.randn(4, 4))
    with pytest.raises(ValueError, match="scale, proj_type"):
        compat.GaLoreAdamW([{"params": [p], "rank": 2, "update_proj_gap": 10}])
    with pytest.raises(ValueError, match="dim=3"):
        compat.GaLoreAdamW(projected(p, dim=3))
