"""A compiled sweep steps as an eager one does, needs few graphs, and is done without where there is no compiler."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import subspan
from subspan.optim import quant, sweep
from subspan.optim.norms import parts_of


@dataclass(frozen=True)
class Formula(subspan.Adam):
    """Adam without torch's fused kernel: what every faster way to take a step is compared with."""

    def fuses(self, state):
        return False


ADAM = subspan.Adam()
RULES = [ADAM, subspan.Lion(), subspan.SGDMomentum(nesterov=True), subspan.SGDMomentum(momentum=0.0)]
CASES = [(rule, dtype) for rule in RULES for dtype in (torch.float32, torch.int8, torch.int4)]
CASES.append((subspan.Adam(uncorrected_eps=True), torch.float32))  # which torch has no kernel for
# Rank 8 makes rows of one block; rank 24 and blocks of 16 a short last one.
SHAPES = {
    "tall": (80, 48),
    "wide": (48, 80),
    "dense": (64, 48),
    "ragged": (40, 24),
    "batch": (3, 24, 40),
    "vector": (50,),
    "0-d": (),
}


@pytest.fixture
def graphs(monkeypatch):
    """What is compiled, each graph as it is handed to a backend that runs it as it is."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(sweep, "_backend", backend)
    monkeypatch.setattr(sweep, "_works", True)
    torch._dynamo.reset()
    sweep._compile.cache_clear()
    yield seen
    torch._dynamo.reset()
    sweep._compile.cache_clear()


def drawn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(shape, kind="", rank=8, **options):
    p = nn.Parameter(drawn(shape))
    group = {"params": [p], "weight_decay": 0.1}
    if len(shape) > 1 and kind != "dense":
        group |= {
            "rank": 24 if kind == "ragged" else rank,
            "update_proj_gap": 2,
            "view": "batch" if len(shape) == 3 else "matrix",
        }
    return p, subspan.ProjectedOptimizer([group], 0.01, **options)


def trained(shape, kind="", steps=3, **options):
    p, optimizer = make(shape, kind, **options)
    for step in range(steps):
        p.grad = drawn(shape, step + 1)
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize(
    ("rule", "state_dtype", "kind"),
    # Every shape with Adam; a graph takes seconds to make, and what shapes change is the same for all rules.
    [(*case, kind) for case in CASES for kind in SHAPES if case[0] == ADAM or kind in ("tall", "ragged", "0-d")],
    ids=str,
)
def test_the_same_step(monkeypatch, graphs, kind, rule, state_dtype):
    monkeypatch.setattr(quant, "MIN_ELEMENTS", 0)
    monkeypatch.setitem(quant.BLOCK_SIZE, 8, 16)
    reference, expected = trained(SHAPES[kind], kind, rule=Formula() if rule == ADAM else rule, state_dtype=state_dtype)
    for compile, devices in ((False, {"cpu"}), (True, {"cpu"}), (True, set())):  # codes outside and inside of the graph
        monkeypatch.setattr(sweep, "DECODED", devices)
        p, optimizer = trained(SHAPES[kind], kind, rule=rule, state_dtype=state_dtype, compile=compile)
        coded = any(key.endswith(".codes") for key in optimizer.state[p])
        fused = rule == ADAM and not coded  # by torch's own kernel
        assert bool(graphs) == (compile and kind != "0-d" and not fused)
        torch.testing.assert_close(p, reference, rtol=1e-5, atol=1e-6)
        for key, value in expected.state[reference].items():
            torch.testing.assert_close(optimizer.state[p][key], value, rtol=1e-5, atol=1e-6)


GRADIENTS = {
    "zero": torch.zeros(96, 64),
    "rank one": drawn((96, 1)) @ drawn((1, 64)),
    "a row alone": torch.zeros(96, 64).index_fill(0, torch.tensor([3]), 1.0),
    "tiny": 1e-30 * drawn((96, 64)),
}


@pytest.mark.parametrize("gradients", ["hold", "project", "update"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.int8], ids=str)
def test_the_same_step_for_gradients_without_full_rank(graphs, state_dtype, gradient, gradients):
    made = []
    for rule, compile in ((Formula(), False), (ADAM, False), (ADAM, True)):
        p, optimizer = make((96, 64), rank=64, rule=rule, state_dtype=state_dtype, gradients=gradients, compile=compile)
        for _ in range(3):  # a refresh among them
            (p * GRADIENTS[gradient]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        made.append((p, optimizer.state[p]))
    (reference, expected), *faster = made
    assert bool(graphs) == (state_dtype == torch.int8)
    assert reference.isfinite().all()
    for p, state in faster:
        torch.testing.assert_close(p, reference, rtol=1e-5, atol=1e-6)
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.int8], ids=str)
def test_few_graphs(graphs, state_dtype):
    """Shapes, learning rates and steps differ; what is compiled does not."""
    shapes = [(96, 64), (64, 160), (128, 64), (64, 64), (224, 64), (64, 96)]
    for shape in shapes:
        trained(shape, rank=64, rule=Formula(), state_dtype=state_dtype, compile=True)
    assert 1 <= len(graphs) <= 2  # fp32: the first is of one shape, the second of all


def test_more_kinds_than_torch_allows_graphs_for_one_function(monkeypatch, graphs):
    monkeypatch.setattr(quant, "MIN_ELEMENTS", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rank in range(2, 12):
            trained((32, 48), rank=rank, steps=1, rule=subspan.Lion(), state_dtype=torch.int8, compile=True)
    assert len(graphs) == 10


def test_left_out_gradients(graphs):
    """`use`, with which update mode leaves out a gradient that is not finite, works compiled as well."""
    p, optimizer = make((96, 64), rank=64, state_dtype=torch.int8, gradients="update", compile=True)
    before = {key: value.clone() for key, value in optimizer.state[p].items() if key != "step"}
    weight = p.detach().clone()
    (p * torch.nan).sum().backward()
    optimizer.step()
    assert p.equal(weight)
    assert all(optimizer.state[p][key].equal(value) for key, value in before.items())
    (p * drawn(p.shape)).sum().backward()
    optimizer.step()
    assert not p.equal(weight)
    assert graphs


@pytest.mark.parametrize("smallest", [0, quant.MIN_ELEMENTS], ids=["in codes", "too small for codes"])
def test_no_compiler(monkeypatch, graphs, smallest):
    monkeypatch.setattr(quant, "MIN_ELEMENTS", smallest)

    def broken(graph, inputs):
        raise RuntimeError("no compiler found")

    eager, _ = trained((96, 64), state_dtype=torch.int8)
    monkeypatch.setattr(sweep, "_backend", broken)
    with pytest.warns(UserWarning, match="taken eagerly, and slower.*no compiler found"):
        p, _ = trained((96, 64), state_dtype=torch.int8, steps=3, compile=True)
    assert p.equal(eager)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        trained((48, 64), compile=True)


@torch._dynamo.config.patch(recompile_limit=1)
def test_more_graphs_of_one_kind_than_torch_allows(graphs):
    """A step must not end for it: torch then raises what is no error of a compiler."""
    eager, _ = trained((96, 64), rank=64, state_dtype=torch.int8)
    trained((96, 64), rank=64, state_dtype=torch.int8, compile=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)  # a graph is made for a number of threads
        with pytest.warns(UserWarning, match="taken eagerly, and slower"):
            p, _ = trained((96, 64), rank=64, state_dtype=torch.int8, compile=True)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(p, eager)


@torch._dynamo.config.patch(recompile_limit=1)
def test_gradients_of_several_dtypes_have_graphs_of_their_own(graphs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16):
            p = nn.Parameter(drawn((96, 64)).to(dtype))
            optimizer = subspan.GaLoreAdamW8bit([{"params": [p], "rank": 64}], compile=True)
            for _ in range(2):
                p.grad = drawn((96, 64), 1).to(dtype)
                optimizer.step()
    assert len(graphs) == 2


def test_parts_are_large_only_where_nothing_but_the_result_is_made(monkeypatch, graphs):
    p, optimizer = make((96, 64), rank=64, state_dtype=torch.int8, compile=True)
    q, plain = make((96, 64), rank=64, compile=True)
    assert sweep.compiles(optimizer.state[p])
    assert not sweep.compiles(plain.state[q])
    pieces = {key: X[:, ::2] if key.endswith(".codes") else X for key, X in optimizer.state[p].items()}
    assert not sweep.compiles(pieces)
    monkeypatch.setattr(sweep, "_works", False)
    assert not sweep.compiles(optimizer.state[p])
    on_gpu = torch.empty(2**12, 2**14, device="meta")
    assert [len(list(parts_of(on_gpu, -1, compiled=compiled))) for compiled in (False, True)] == [16, 4]


@dataclass
class Own:
    elementwise = True


@pytest.mark.parametrize("rule", [Own(), subspan.Adam(betas=[0.9, 0.95])], ids=["no hash", "a list"])
def test_a_rule_without_a_hash_is_refused_or_not_compiled(rule):
    p = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"compile=True.*lacks: make it a frozen dataclass"):
        subspan.ProjectedOptimizer([p], rule=rule, compile=True)
    if isinstance(rule, subspan.Adam):
        assert subspan.ProjectedOptimizer([p], rule=rule).compile is False
        assert subspan.ProjectedOptimizer([p]).compile is None


def test_inductor():
    """The real one, on the case it is for."""
    torch._dynamo.reset()
    sweep._compile.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*taken eagerly")
        compiled, optimizer = trained((256, 320), rank=64, state_dtype=torch.int8, compile=True)
    eager, expected = trained((256, 320), rank=64, state_dtype=torch.int8)
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)
    for name in ("exp_avg", "exp_avg_sq"):
        key = f"{name}.codes"
        off = (optimizer.state[compiled][key].int() - expected.state[eager][key].int()).abs()
        assert off.max() <= 1  # fused arithmetic rounds once where eager rounds twice
        assert off.count_nonzero() <= off.numel() // 1000
