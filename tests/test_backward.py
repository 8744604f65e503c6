"""Gradient lifetime: `project` and `update` take the steps of `hold`, keep less, and refuse what they cannot do."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from galore_torch import GaLoreAdamW as ReferenceAdamW
from torch import nn

import subspan
from subspan.optim import quant
from subspan.optim.presets import paper

RULES = {
    "adam": subspan.Adam(),
    "adafactor": subspan.Adafactor(),
    "lion": subspan.Lion(),
    "sgd": subspan.SGDMomentum(),
}
GAP, RANK = 3, 3


class Net(nn.Module):
    """Embedding, two blocks of a wide and a tall matrix, and a head that may be tied to the embedding."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6)) for _ in range(2))
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.checkpointing = None  # use_reentrant, where activations are recomputed

    def forward(self, ids):
        X = self.embed(ids)
        for block in self.blocks:
            if self.checkpointing is None:
                X = X + block(X)
            else:
                X = X + torch.utils.checkpoint.checkpoint(block, X, use_reentrant=self.checkpointing)
        return nn.functional.cross_entropy(self.head(X).flatten(0, 1), ids.roll(-1, 1).flatten())


def build(gradients, *, rule="adam", tied=False, **kwargs):
    model = Net(tied)
    groups = subspan.param_groups(model, rank=RANK, update_proj_gap=GAP, verbose=False)
    kwargs = {"rule": RULES[rule], "refresh": subspan.Refresh(first="random"), "weight_decay": 0.1, **kwargs}
    return model, subspan.ProjectedOptimizer(groups, 0.02, gradients=gradients, **kwargs)


def batches(count, size=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(11, (size, 5), generator=generator) for _ in range(count)]


def train(model, optimizer, steps=3 * GAP + 2, micro_batches=1, before_step=None, size=4):
    """Losses and gradient norms; after it the model is trained."""
    seen = []
    for batch in batches(steps, size):
        loss = 0.0
        for part in batch.chunk(micro_batches):
            mean = model(part) / micro_batches
            mean.backward()
            loss += mean.item()
        if before_step:
            before_step()
        optimizer.step()
        optimizer.zero_grad()
        seen.append((loss, optimizer.grad_norm.item()))
    return torch.tensor(seen)


def assert_equal_training(one, other, tolerance=1e-6):
    """Of two (model, optimizer, what train returned)."""
    torch.testing.assert_close(one[2], other[2], rtol=tolerance, atol=tolerance)
    for (name, p), q in zip(one[0].named_parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=name)
    theirs = other[1].state_dict()["state"]  # a basis turns more than a weight when rounding differs
    for index, state in one[1].state_dict()["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(value, theirs[index][key], rtol=1e-4, atol=20 * tolerance, msg=f"{index} {key}")


def run(gradients, micro_batches=1, before_step=None, **kwargs):
    model, optimizer = build(gradients, **kwargs)
    return model, optimizer, train(model, optimizer, micro_batches=micro_batches, before_step=before_step)


# ------------------------------------------------------------------------------------------------ equality of modes


@pytest.mark.parametrize("first", ["random", "gradient"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gradients", ["project", "update"])
def test_every_mode_takes_the_steps_of_hold(gradients, rule, first):
    settings = {"rule": rule, "refresh": subspan.Refresh(first=first)}
    assert_equal_training(run("hold", **settings), run(gradients, **settings))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gradients", ["hold", "project"])
def test_micro_batches_add_up(gradients, rule):
    # Signs of rounding noise are no property of an implementation: Lion is compared where nothing is near zero.
    tolerance = 1e-6 if rule != "lion" else 5e-3
    assert_equal_training(run("hold", rule=rule), run(gradients, micro_batches=4, rule=rule), tolerance)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_clipping_is_the_same(micro_batches):
    held = run("hold", max_grad_norm=0.05)
    assert (held[2][:, 1] > 0.05).all()  # it did clip
    assert_equal_training(held, run("project", micro_batches, max_grad_norm=0.05))


@pytest.mark.parametrize("gradients", ["project", "update"])
def test_preparing_first_changes_nothing(gradients):
    model, optimizer = build(gradients)
    seen = train(model, optimizer, before_step=optimizer.prepare)
    assert_equal_training(run("hold"), (model, optimizer, seen))


@pytest.mark.parametrize("gradients", ["hold", "project", "update"])
def test_preparing_twice_is_preparing_once(gradients):
    """As Accelerate's clip_grad_norm_ does, once for each group of parameters that it is asked for."""
    (model, optimizer), norms = build(gradients), []

    def twice():
        norms.append((float(optimizer.prepare()), float(optimizer.prepare())))

    losses = train(model, optimizer, before_step=twice)
    assert_equal_training((model, optimizer, losses), run(gradients))
    assert all(first == second > 0 for first, second in norms)


@pytest.mark.parametrize("gradients", ["project", "update"])
def test_a_scheduler_works_as_usual(gradients):
    runs = []
    for mode in ("hold", gradients):
        model, optimizer = build(mode)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        optimizer.register_step_post_hook(lambda *_, scheduler=scheduler: scheduler.step())
        runs.append((model, optimizer, train(model, optimizer)))
        assert scheduler.get_last_lr()[0] < 0.001
    assert_equal_training(*runs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gradients", ["project", "update"])
def test_activation_checkpointing(gradients, reentrant):
    model, optimizer = build(gradients)
    model.checkpointing = reentrant
    assert_equal_training(run("hold"), (model, optimizer, train(model, optimizer)))


@pytest.mark.parametrize("gradients", ["project", "update"])
def test_tied_weights(gradients):
    assert_equal_training(run("hold", tied=True), run(gradients, tied=True))


@pytest.mark.parametrize("gradients", ["project", "update"])
@pytest.mark.parametrize(("view", "shape"), [("conv", (6, 2, 3, 2)), ("batch", (3, 6, 8)), ("batch", (2, 2, 6, 8))])
def test_weights_of_more_than_two_dimensions(gradients, view, shape):
    """Two backward passes a step where the mode can."""
    weights = []
    for mode in ("hold", gradients):
        p = nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape))
        group = {"params": [p], "rank": 3, "update_proj_gap": GAP, "view": view}
        optimizer = subspan.GaLoreAdamW([group], 0.02, gradients=mode, refresh=subspan.Refresh(first="random"))
        generator = torch.Generator().manual_seed(1)
        for _ in range(3 * GAP):
            for _ in range(1 if gradients == "update" else 2):
                (p.tanh() * torch.randn(shape, generator=generator)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(p)
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradients", ["project", "update"])
def test_compiled_blocks(gradients):
    model, optimizer = build(gradients)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    assert_equal_training(run("hold"), (model, optimizer, train(model, optimizer)))


@pytest.mark.parametrize("gradients", ["hold", "project"])
def test_the_papers_refresh_equals_the_reference(gradients):
    """SVD of the current gradient for every matrix at once, through the preset, against galore_torch."""
    theirs = Net()
    groups = subspan.param_groups(theirs, rank=RANK, update_proj_gap=GAP, verbose=False)
    plain = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
    reference = ReferenceAdamW(plain, lr=0.02, no_deprecation_warning=True)
    ours = Net()
    optimizer = paper(
        subspan.param_groups(ours, rank=RANK, update_proj_gap=GAP, verbose=False), 0.02, gradients=gradients
    )
    for batch in batches(3 * GAP + 2):
        for model, o in ((theirs, reference), (ours, optimizer)):
            model(batch).backward()
            o.step()
            o.zero_grad()
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", ["hold", "project", "update"])
@pytest.mark.parametrize("gradients", ["hold", "project", "update"])
def test_one_state_dict_for_all_modes(gradients, change):
    """A run saved in one mode and loaded in another goes on as if nothing had happened."""
    straight = build("hold")
    train(*straight, steps=8)
    model, optimizer = build(gradients)
    data = batches(8)
    for batch in data[:4]:
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    twin, other = build(change)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for batch in data[4:]:
        twin(batch).backward()
        other.step()
        other.zero_grad()
    for p, q in zip(straight[0].parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------- what is kept


def test_project_keeps_low_rank_gradients_only():
    """After the backward pass: R of every matrix, full gradients of those refreshed in this step and of dense parameters."""
    model, optimizer = build("project")
    matrices = [p for block in model.blocks for p in (block[0].weight, block[2].weight)]
    refreshed = []
    for batch in batches(2 * GAP):
        due = {p for p in matrices if optimizer.refresh_due(p)}
        model(batch).backward()
        kept = optimizer._backward.low_rank
        assert [p.grad is not None for p in matrices] == [p in due for p in matrices]
        assert {tuple(R.shape) for R in kept.values()} == {(RANK, 10)}
        assert set(kept) == set(matrices) - due
        assert all(p.grad is not None for p in model.parameters() if p not in set(matrices))
        optimizer.step()
        assert not kept
        assert all(p.grad is None for p in matrices)
        optimizer.zero_grad()
        refreshed.append(len(due))
    assert refreshed == [2, 1, 1] * 2  # ceil(4 matrices / 3 steps) at most


def test_update_keeps_no_gradient():
    model, optimizer = build("update")
    before = [p.detach().clone() for p in model.parameters()]
    model(batches(1)[0]).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(not p.equal(q) for p, q in zip(model.parameters(), before, strict=True))
    after = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(p.equal(q) for p, q in zip(model.parameters(), after, strict=True))


@pytest.mark.parametrize("gradients", ["project", "update"])
def test_hooks_cost_no_host_sync(gradients, monkeypatch):
    """No value of a tensor is read from Python in a backward pass and a step, refreshes aside."""
    model, optimizer = build(gradients)
    optimizer.param_groups[0]["update_proj_gap"] = 100
    train(model, optimizer, steps=GAP)  # behind all first refreshes
    refreshes = [state["refreshes"].item() for state in optimizer.state.values() if "refreshes" in state]

    def forbidden(self, *args, **kwargs):
        raise AssertionError("host sync")

    loss = model(batches(1)[0])
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, forbidden)
        loss.backward()
        optimizer.step()
    assert refreshes == [state["refreshes"].item() for state in optimizer.state.values() if "refreshes" in state]
    assert optimizer.state[model.embed.weight]["step"] == GAP + 1


@pytest.mark.parametrize("gradients", ["project", "update"])
def test_bf16_gradients_keep_their_dtype(gradients):
    model = Net().bfloat16()
    groups = subspan.param_groups(model, rank=RANK, update_proj_gap=GAP, verbose=False)
    optimizer = subspan.GaLoreAdamW(groups, gradients=gradients)
    model(batches(1)[0]).backward()
    assert all(R.dtype == torch.bfloat16 for R in optimizer._backward.low_rank.values())
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_zero_grad_forgets_low_rank_gradients():
    model, optimizer = build("project")
    first, second = batches(2)
    model(first).backward()
    optimizer.zero_grad()
    model(second).backward()
    optimizer.step()
    twin, other = build("hold")
    twin(second).backward()
    other.step()
    assert_equal_training((model, optimizer, torch.zeros(1)), (twin, other, torch.zeros(1)))


@pytest.mark.parametrize("gradients", ["project", "update"])
def test_a_closure_is_run_once(gradients):
    runs = []
    for mode in ("hold", gradients):
        model, optimizer = build(mode)
        losses = []
        for batch in batches(4):

            def closure(model=model, optimizer=optimizer, batch=batch):
                optimizer.zero_grad()
                loss = model(batch)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
        runs.append((model, optimizer, torch.tensor(losses)))
    assert_equal_training(*runs)


@pytest.mark.parametrize("gradients", ["project", "update"])
def test_frozen_unused_and_later_unfrozen_parameters(gradients):
    """A parameter without a gradient in a step does not take part in it, whatever the reason."""
    runs = []
    for mode in ("hold", gradients):
        model, optimizer = build(mode)
        frozen = model.blocks[1][0].weight.requires_grad_(False)
        start = frozen.detach().clone()
        blocks = model.blocks
        for i, batch in enumerate(batches(9)):
            model.blocks = blocks[:1] if i == 2 else blocks  # the second block is not used in step 2
            if i == 5:
                assert frozen.equal(start)
                frozen.requires_grad_(True)
            model(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.blocks = blocks
        assert optimizer.state[frozen]["step"] == 4
        assert optimizer.state[blocks[1][2].weight]["step"] == 8
        runs.append((model, optimizer, torch.zeros(1)))
    assert_equal_training(*runs)
    model, optimizer, _ = runs[1]
    assert model.blocks[1][0].weight in optimizer._backward.handles  # hooked since it was unfrozen


@pytest.mark.parametrize("gradients", ["project", "update"])
def test_a_group_added_later(gradients):
    runs = []
    for mode in ("hold", gradients):
        model = Net()
        refresh = subspan.Refresh(first="random")
        named = [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
        group = {"rank": RANK, "update_proj_gap": GAP}
        optimizer = subspan.GaLoreAdamW([{"params": named[:2], **group}], 0.02, refresh=refresh, gradients=mode)
        rest = [(name, p) for name, p in model.named_parameters() if "blocks" not in name]
        first = train(model, optimizer, steps=4)
        due = [optimizer.first_refresh(p) for _, p in named[:2]]
        optimizer.add_param_group({"params": named[2:], **group})
        optimizer.add_param_group({"params": rest, "lr": 0.01})
        assert [optimizer.first_refresh(p) for _, p in named] == due * 2  # those before keep their steps
        runs.append((model, optimizer, torch.cat([first, train(model, optimizer, steps=8)])))
    assert_equal_training(*runs)


def test_a_group_added_later_to_dense_ones():
    weight, other = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
    optimizer = subspan.GaLoreAdamW([weight], gradients="project")
    optimizer.add_param_group({"params": [other], "rank": 2})
    (weight * other).sum().backward()
    optimizer.step()
    assert optimizer.state[other]["refreshes"] == 1


def test_hooks_leave_with_their_optimizer():
    model, optimizer = build("project")
    del optimizer
    gc.collect()
    model(batches(1)[0]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_deep_copy_has_hooks_of_its_own():
    pair = build("project")
    train(*pair, steps=2)
    model, optimizer = copy.deepcopy(pair)
    data = batches(4)
    for batch in data:
        for m, o in (pair, (model, optimizer)):
            m(batch).backward()
            o.step()
            o.zero_grad()
    assert_equal_training((*pair, torch.zeros(1)), (model, optimizer, torch.zeros(1)))


# ---------------------------------------------------------------------------------------------- not finite numbers


def snapshot(model, optimizer):
    tensors = [p.detach().clone() for p in model.parameters()]
    return tensors + [value.clone() for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("what", ["loss", "dense gradient", "projected gradient"])
@pytest.mark.parametrize("gradients", ["hold", "project"])
def test_a_step_that_is_not_finite_can_be_skipped_whole(gradients, what):
    """prepare() says so before weights, moments or bases changed, although bases were due; the next step refreshes them."""
    model, optimizer = build(gradients)
    train(model, optimizer, steps=GAP)
    before = snapshot(model, optimizer)
    target = model.embed.weight if what == "dense gradient" else model.blocks[0][2].weight
    handle = None
    if what != "loss":
        handle = target.register_hook(lambda grad: torch.full_like(grad, float("nan")))
    loss = model(batches(1)[0])
    loss.backward()
    norm = optimizer.prepare(loss * (float("inf") if what == "loss" else 1))
    assert norm.isfinite() == (what == "loss")
    optimizer.zero_grad()
    assert all(a.equal(b) for a, b in zip(before, snapshot(model, optimizer), strict=True))
    if handle:
        handle.remove()
    twin, other = build("hold")
    train(twin, other, steps=GAP)
    for m, o in ((model, optimizer), (twin, other)):
        m(batches(1)[0]).backward()
        o.step()
    assert_equal_training((model, optimizer, torch.zeros(1)), (twin, other, torch.zeros(1)))


@pytest.mark.parametrize("kind", ["dense", "projected"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rule", RULES)
def test_update_leaves_out_a_gradient_that_is_not_finite(rule, state_dtype, kind, monkeypatch):
    """Weight, basis and moments of that parameter stay, bit for bit, in a step with a refresh and in one without; others move."""
    if state_dtype == torch.int8 and rule == "adafactor":
        state_dtype = torch.float32  # it refuses int8
    monkeypatch.setattr(quant, "MIN_ELEMENTS", 0)
    model, optimizer = build("update", rule=rule, state_dtype=state_dtype)
    train(model, optimizer, steps=GAP)
    target = model.embed.weight if kind == "dense" else model.blocks[0][2].weight
    target.register_hook(lambda grad: torch.full_like(grad, float("nan")))
    other = model.blocks[1][0].weight
    for batch in batches(GAP):
        kept = [target, *(value for key, value in optimizer.state[target].items() if key != "step")]
        before, moving = [X.detach().clone() for X in kept], other.detach().clone()
        model(batch).backward()
        optimizer.step()
        assert optimizer.grad_norm.isnan()
        assert all(a.equal(b) for a, b in zip(before, kept, strict=True))
        assert not other.equal(moving)


@pytest.mark.parametrize("gradients", ["hold", "project"])
def test_without_prepare_a_gradient_that_is_not_finite_counts_as_zero(gradients):
    runs = []
    for fill in (0.0, float("nan")):
        model, optimizer = build(gradients)
        train(model, optimizer, steps=GAP)
        model.blocks[0][2].weight.register_hook(lambda grad, fill=fill: torch.full_like(grad, fill))
        model(batches(1)[0]).backward()
        optimizer.step()
        assert optimizer.grad_norm.isfinite() == (fill == 0)
        runs.append(snapshot(model, optimizer))
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))


# --------------------------------------------------------------------------------------------- what is refused


def test_update_refuses_a_second_backward_pass():
    model, optimizer = build("update")
    first, second = batches(2)
    model(first).backward()
    with pytest.raises(ValueError, match=r"second gradient .* before step\(\).*gradients='project'"):
        model(second).backward()
    optimizer.zero_grad()
    model(second).backward()


@pytest.mark.filterwarnings("ignore")
def test_update_refuses_a_shared_weight_under_reentrant_checkpointing():
    model, optimizer = build("update")
    model.blocks[1][0].weight = model.blocks[0][0].weight
    model.checkpointing = True
    with pytest.raises(ValueError, match="reentrant"):
        train(model, optimizer, steps=1)


def test_project_accumulates_a_shared_weight_under_reentrant_checkpointing():
    runs = []
    for mode in ("hold", "project"):
        model = Net()
        model.blocks[1][0].weight = model.blocks[0][0].weight
        model.checkpointing = mode == "project" or None
        groups = subspan.param_groups(model, rank=RANK, update_proj_gap=GAP, verbose=False)
        optimizer = subspan.GaLoreAdamW(groups, 0.02, gradients=mode, refresh=subspan.Refresh("random"))
        runs.append((model, optimizer, train(model, optimizer)))
    assert_equal_training(*runs)


@pytest.mark.parametrize("gradients", ["project", "update"])
def test_grad_scaler_is_refused(gradients):
    model, optimizer = build(gradients)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(batches(1)[0])).backward()
    with pytest.raises(ValueError, match=r"GradScaler .*gradients='hold'"):
        scaler.step(optimizer)


def test_grad_scaler_works_with_hold():
    model, optimizer = build("hold")
    before = model.head.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(batches(1)[0])).backward()
    scaler.step(optimizer)
    assert not model.head.weight.equal(before)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gradients", ["project", "update"])
def test_distributed_data_parallel_is_refused(gradients, process_group):
    model, optimizer = build(gradients)
    parallel = nn.parallel.DistributedDataParallel(model)
    before = [p.detach().clone() for p in model.parameters()]
    parallel(batches(1)[0]).backward()
    with pytest.raises(ValueError, match=r"DistributedDataParallel.*gradients='hold'"):
        optimizer.step()
    if gradients == "project":
        assert all(p.equal(q) for p, q in zip(before, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_distributed_data_parallel_works_with_hold(process_group):
    model, optimizer = build("hold")
    seen = train(nn.parallel.DistributedDataParallel(model), optimizer)
    assert_equal_training(run("hold"), (model, optimizer, seen))


def test_two_optimizers_over_one_model_are_refused():
    model, first = build("update")
    groups = subspan.param_groups(model, rank=RANK, verbose=False)
    second = subspan.GaLoreAdamW(groups, gradients="project")
    with pytest.raises(ValueError, match="another optimizer"):
        model(batches(1)[0]).backward()
    del first
    gc.collect()
    model(batches(1)[0]).backward()
    second.step()


@pytest.mark.parametrize("gradients", ["project", "update"])
def test_another_optimizer_trains_the_model_after_release(gradients):
    model, first = build(gradients)
    second = torch.optim.SGD(model.parameters(), lr=0.1)
    unrelated = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    one, two, three = batches(3)
    model(one).backward()
    unrelated.step()
    with pytest.raises(ValueError, match=r"SGD steps parameters whose gradients an earlier .* release\(\)"):
        second.step()
    first.release()
    model.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    model(two).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    second.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    second.zero_grad()
    first.zero_grad()  # it goes on
    before = [p.detach().clone() for p in model.parameters()]
    model(three).backward()
    first.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("gradients", ["project", "update"])
def test_a_backward_pass_after_prepare_is_refused(gradients):
    model, optimizer = build(gradients)
    first, second = batches(2)
    model(first).backward()
    optimizer.prepare()
    with pytest.raises(ValueError, match=r"between prepare\(\) and step\(\)"):
        model(second).backward()


def test_loading_state_while_gradients_wait_is_refused():
    model, optimizer = build("project")
    saved = copy.deepcopy(optimizer.state_dict())
    model(batches(1)[0]).backward()
    with pytest.raises(ValueError, match=r"zero_grad\(\)"):
        optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    optimizer.load_state_dict(saved)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="gradients='drop' is unknown"):
        build("drop")
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 .*gradients='update'.*gradients='project'"):
        build("update", max_grad_norm=1.0)
