"""INT8 weights: a layer computes what it would with the floating weight, an update keeps its mean, nothing grows to full size."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from tiny import SIZES
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.pytorch_utils import Conv1D

import subspan
from subspan.optim.groups import default_targets
from subspan.optim.int8 import Int8Weight, quantize_weights, stored_tensors
from subspan.training.checkpoint import Checkpointer, load
from subspan.training.models import build_model, save_pretrained

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def matrix(m: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.02 * torch.randn(m, n)).to(dtype)


def int8(m: int, n: int, dtype: torch.dtype = torch.float32, group_size: int = 256) -> nn.Parameter:
    return nn.Parameter(Int8Weight.from_float(matrix(m, n, dtype), group_size))


def same(a: Tensor, b: Tensor) -> bool:
    assert isinstance(a, Int8Weight)
    assert isinstance(b, Int8Weight)
    return a.codes.equal(b.codes) and a.scale.equal(b.scale) and (a.group_size, a.dtype) == (b.group_size, b.dtype)


def spread(W: Int8Weight) -> Tensor:
    """The scale of every value."""
    return W.scale.repeat_interleave(W.group_size, 1)[:, : W.shape[1]].float()


# ------------------------------------------------------------------------------------------------ what is stored


@every_dtype
@pytest.mark.parametrize("shape", [(5, 700), (3, 100), (40, 512), (1, 1), (2, 257)], ids=str)
def test_the_nearest_code_within_half_a_scale(shape, dtype):
    X = matrix(*shape, dtype=dtype)
    X[0, 0] = 0
    W = Int8Weight.from_float(X)
    assert (W.shape, W.dtype, W.codes.dtype, W.scale.dtype) == (shape, dtype, torch.int8, torch.bfloat16)
    assert W.scale.shape == (shape[0], -(-shape[1] // 256))
    read = W.read_block(0, 0, shape[0])
    assert read.equal(W.codes * spread(W))  # exact: 7 bits times 8
    assert ((read - X.float()).abs() <= spread(W) / 2 * (1 + 1e-6)).all()
    assert read[0, 0] == 0
    assert W.codes.abs().max() <= 127
    assert W.dequantize().equal(read.to(dtype))
    assert W.dequantize(torch.float32).equal(read)


def test_a_scale_is_the_least_that_bfloat16_has():
    X = matrix(50, 512)
    scale = Int8Weight.from_float(X).scale.double()
    need = X.view(50, 2, 256).abs().amax(-1).double() / 127
    assert (scale >= need * (1 - 1e-7)).all()
    assert (scale <= need * (1 + 2**-7)).all()


def test_zeros_tiny_and_huge_groups():
    X = torch.stack([torch.linspace(-1, 1, 64) * factor for factor in (0.0, 1e-44, 1e-30, 1.0, 1e30)])
    W = Int8Weight.from_float(X, group_size=64)
    assert (W.dequantize()[0] == 0).all()
    assert W.dequantize()[1].isfinite().all()
    for row in (2, 3, 4):
        torch.testing.assert_close(W.dequantize()[row], X[row], rtol=0, atol=float(X[row].max()) / 250)
    W.write_block(0, 0, X)
    assert (W.dequantize()[0] == 0).all()
    assert W.dequantize().isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_stay_in_their_group(bad):
    X = matrix(3, 130)
    expected = Int8Weight.from_float(X, 64).dequantize()
    X[1, 70] = bad
    W = Int8Weight.from_float(X, 64)
    W.write_block(0, 1, X[1:2])
    read = W.dequantize()
    assert not read[1, 64:128].isfinite().any()
    assert read[[0, 2]].equal(expected[[0, 2]])
    assert read[1, :64].isfinite().all()


@every_dtype
def test_to_everything_else_it_is_a_floating_tensor(dtype):
    W = int8(30, 300, dtype)
    assert isinstance(W, nn.Parameter)
    assert isinstance(W, Int8Weight)
    assert W.is_leaf
    assert W.requires_grad
    assert (W.shape, W.dtype, W.ndim, W.is_contiguous()) == ((30, 300), dtype, 2, True)
    assert W.is_floating_point()
    assert "group_size=256" in repr(W)
    assert [X.nbytes for X in stored_tensors(W)] == [30 * 300, 30 * 2 * 2]
    plain = nn.Parameter(torch.ones(2))
    assert stored_tensors(plain)[0] is plain
    zeros = torch.zeros_like(W)
    assert type(zeros) is Tensor
    assert (zeros.shape, zeros.dtype) == (W.shape, dtype)
    assert type(W.new_full((3,), 7.0)) is Tensor


# ----------------------------------------------------------------------------------------------- as a layer's weight


def results(call, W, *inputs):
    """Value and gradients of call(*inputs, W), for an upstream gradient that is the same each time."""
    W.grad = None
    inputs = [X.detach().clone().requires_grad_(X.is_floating_point()) for X in inputs]
    Y = call(*inputs, W)
    (Y * torch.linspace(-1, 1, Y.shape[-1]).to(Y.dtype)).sum().backward()
    assert type(W.grad) is Tensor
    assert W.grad.dtype == W.dtype
    return [Y.detach(), W.grad, *(X.grad for X in inputs if X.grad is not None)]


def assert_same(call, W, *inputs):
    """As with the floating weight, up to the order in which a product adds up."""
    for ours, theirs in zip(
        results(call, W, *inputs), results(call, nn.Parameter(W.dequantize()), *inputs), strict=True
    ):
        assert ours.dtype == theirs.dtype
        tolerance = 1e-5 if ours.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@every_dtype
@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (2, 1, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("group_size", [256, 48])
def test_linear(lead, group_size, dtype):
    if lead == (0, 3):  # no tokens, no largest value
        assert linear(torch.randn(0, 3, 300), int8(20, 300)).shape == (0, 3, 20)
        return
    W, X, bias = int8(20, 300, dtype, group_size), torch.randn(*lead, 300).to(dtype), torch.randn(20).to(dtype)
    assert_same(lambda X, W: linear(X, W), W, X)
    assert_same(lambda X, bias, W: linear(X, W, bias), W, X, bias)
    assert_same(lambda X, W: linear(X.mT.contiguous().mT, W), W, X.expand(2, *X.shape))


@every_dtype
def test_in_blocks(dtype, monkeypatch):
    W = int8(70, 600, dtype, 64)
    whole = W.dequantize()
    blocks = lambda self, dim: iter([(0, 64), (64, 6)] if dim == 0 else [(0, 128), (128, 448), (576, 24)])  # noqa: E731
    monkeypatch.setattr(Int8Weight, "blocks", blocks)
    assert W.dequantize().equal(whole)
    assert_same(lambda X, bias, W: linear(X, W, bias), W, torch.randn(4, 600).to(dtype), torch.randn(70).to(dtype))
    assert_same(lambda X, b, W: torch.addmm(b, X, W), W, torch.randn(4, 70).to(dtype), torch.randn(600).to(dtype))


def test_blocks_cover_everything_in_whole_groups():
    W = torch.empty_like(Int8Weight.from_float(torch.empty(5461, 3000, device="meta")), device="cpu")
    for dim in (0, 1):
        blocks = list(W.blocks(dim))
        assert len(blocks) > 3
        assert [start for start, _ in blocks] == [sum(length for _, length in blocks[:i]) for i in range(len(blocks))]
        assert sum(length for _, length in blocks) == W.shape[dim]
        assert all(start % (256 if dim else 16) == 0 for start, _ in blocks)


@every_dtype
def test_autocast(dtype):
    W, X, bias = int8(20, 300, dtype), torch.randn(5, 300), torch.randn(20)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(X, W, bias).dtype == torch.bfloat16
        call = lambda X, bias, W: linear(X, W, bias)  # noqa: E731
        ours, theirs = results(call, W, X, bias), results(call, nn.Parameter(W.dequantize()), X, bias)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * float(b.abs().max()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 40, bias=False))
    quantize_weights(model, ["0.weight", "2.weight"])
    X = torch.randn(3, 40, requires_grad=True)
    gradients = []
    for call in (model, lambda X: checkpoint(model, X, use_reentrant=reentrant)):
        model.zero_grad()
        X.grad = None
        call(X).square().sum().backward()
        gradients.append([X.grad, *(p.grad for p in model.parameters())])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


def test_compiled():
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 40))
    quantize_weights(model, ["0.weight", "2.weight"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        gradients = []
        for call in (model, compiled):
            model.zero_grad()
            X = torch.linspace(-1, 1, 120).view(3, 40).requires_grad_()
            call(X).square().sum().backward()
            gradients.append([X.grad, *(p.grad for p in model.parameters())])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():  # what was compiled sees a changed weight
            model[0].weight.write_block(0, 0, torch.randn(60, 40))


@every_dtype
def test_embedding(dtype):
    W, tokens = int8(30, 300, dtype), torch.tensor([[1, 5, 1], [29, 0, 5]])
    for settings in ({}, {"padding_idx": 5}, {"padding_idx": -1, "scale_grad_by_freq": True}):
        assert_same(lambda tokens, W, settings=settings: embedding(tokens, W, **settings), W, tokens)


def test_conv1d_of_gpt2():
    layer = Conv1D(600, 70)
    expected = layer(X := torch.randn(2, 3, 70)).detach()
    quantize_weights(layer, ["weight"])
    torch.testing.assert_close(layer(X), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_a_tied_weight_gets_one_gradient():
    W, tokens = int8(30, 300), torch.tensor([1, 5, 29])
    call = lambda tokens, W: linear(embedding(tokens, W), W)  # noqa: E731
    assert_same(call, W, tokens)


def test_the_hook_of_an_optimizer_gets_a_plain_gradient_and_may_write():
    W, seen = int8(20, 300), []

    def hook(p):
        seen.append(p.grad)
        p.write_block(0, 0, p.read_block(0, 0, 20) - p.grad)
        p.grad = None

    W.register_post_accumulate_grad_hook(hook)
    before = W.dequantize()
    linear(torch.ones(1, 300), W).sum().backward()
    assert type(seen[0]) is Tensor
    assert W.grad is None
    assert ((W.dequantize() - (before - 1)).abs() <= spread(W)).all()


def test_a_weight_changed_before_the_backward_pass_needs_it_is_noticed():
    W = int8(20, 300)
    Y = linear(torch.ones(1, 300, requires_grad=True), W).sum()
    W.write_block(0, 0, torch.zeros(20, 300))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Y.backward()


class Allocations(TorchDispatchMode):
    """Sizes, in elements, of the floating tensors that operations made, also inside an Int8Weight."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(cls, Int8Weight) for cls in types):
            return NotImplemented  # then its plain operations come here
        old = {X.untyped_storage().data_ptr() for X in args if isinstance(X, Tensor)}
        out = func(*args, **(kwargs or {}))
        new = isinstance(out, Tensor) and not out.is_meta and out.untyped_storage().data_ptr() not in old
        if new and out.is_floating_point():
            self.sizes.append(out.numel())
        return out


def test_only_the_gradient_is_of_full_size():
    W, X = int8(4096, 1024, torch.bfloat16), torch.randn(4, 1024).bfloat16().requires_grad_()
    with Allocations() as seen:
        Y = linear(X, W)
    assert max(seen.sizes) == 2**20
    with Allocations() as seen:
        Y.sum().backward()
    assert sorted(seen.sizes)[-2:] == [2**20, W.numel()]
    with Allocations() as seen:
        for dim in (0, 1):
            for start, length in W.blocks(dim):
                W.write_block(dim, start, W.read_block(dim, start, length))
        W.detach().normal_()
        torch.empty_like(W).copy_(W)
    assert max(seen.sizes) == 2**20
    plain = torch.empty(W.shape)
    with Allocations() as seen, torch.no_grad():
        plain.copy_(W)
        W.copy_(plain)
    assert max(seen.sizes) == 2**20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda W: W * 2, "aten.mul.Tensor is not supported .* dequantize"),
        (lambda W: W.T, "is not supported"),
        (lambda W: torch.randn(2, 30) @ W, "is not supported"),
        (lambda W: W.detach().add_(1), "aten.add_.Tensor is not supported .* write_block"),
        (lambda W: W.view(-1), "is not supported"),
        (lambda W: linear(W, torch.randn(4, 300)), "product with it on the left"),
        (lambda W: torch.addmm(torch.zeros(300), torch.ones(2, 30), W, alpha=2), "other than bias"),
        (lambda W: embedding(torch.tensor([1]), W, max_norm=1.0), "max_norm"),
        (lambda W: linear(torch.randn(2, 300).bfloat16(), W), "cast the input, or use torch.autocast"),
        (lambda W: W.to(torch.int8), "dtype=torch.int8 is not floating"),
        (lambda W: setattr(W, "data", torch.zeros(30, 300)), r"use copy_\(\)"),
        (lambda W: W.detach().copy_(torch.zeros(300)), "make them equal"),
        (lambda W: W.read_block(0, 20, 11), r"start=20 and length=11 are not inside \(30, 300\)"),
        (lambda W: W.read_block(2, 0, 1), "dim=2"),
        (lambda W: W.read_block(1, 10, 246), "columns 10 to 256 of 300 cut a group"),
        (lambda W: W.read_block(1, 0, 299), "columns 0 to 299 of 300 cut a group"),
        (lambda W: W.write_block(0, 0, torch.zeros(30, 299)), r"pass float32 of shape \('length', 300\)"),
        (lambda W: W.write_block(1, 256, torch.zeros(30, 44).bfloat16()), r"pass float32 of shape \(30, 'length'\)"),
        (lambda W: W.write_block(0, 0, torch.zeros(300)), "is not inside|are not inside"),
        (lambda W: Int8Weight.from_float(torch.ones(3)), "no floating matrix"),
        (lambda W: Int8Weight.from_float(torch.ones(3, 3), 0), "group_size=0"),
        (lambda W: Int8Weight.from_float(torch.ones(3, 3), dtype=torch.int8), "not floating"),
        (lambda W: quantize_weights(nn.Linear(3, 3), ["wight"]), "'wight' is no parameter"),
        (lambda W: quantize_weights(nn.Linear(3, 3), ["no.weight"]), "'no.weight' is no parameter"),
        (lambda W: quantize_weights(nn.Linear(3, 3), ["bias"]), "no floating matrix"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(int8(30, 300))


# --------------------------------------------------------------------------------------------------- block by block


@pytest.mark.parametrize(
    ("dim", "start", "length"),
    [(0, 0, 70), (0, 13, 1), (0, 69, 1), (1, 0, 600), (1, 64, 128), (1, 576, 24), (0, 5, 0), (1, 64, 0)],
)
def test_what_was_read_is_written_back_unchanged_bit_for_bit(dim, start, length):
    W = int8(70, 600, group_size=64)
    before = W.detach().clone()
    X = W.read_block(dim, start, length)
    assert X.equal(W.dequantize(torch.float32).narrow(dim, start, length))
    W.write_block(dim, start, X)
    assert same(W, before)


@pytest.mark.parametrize(("dim", "start", "length"), [(0, 13, 5), (1, 64, 128), (1, 576, 24)])
def test_a_block_changes_nothing_else(dim, start, length):
    W = int8(70, 600, group_size=64)
    before = W.dequantize()
    X = torch.randn(W.read_block(dim, start, length).shape)
    given = X.clone()
    W.write_block(dim, start, X)
    assert X.equal(given)
    block = W.dequantize().narrow(dim, start, length)
    assert ((block - X).abs() <= spread(W).narrow(dim, start, length)).all()
    after = W.dequantize()
    after.narrow(dim, start, length).copy_(before.narrow(dim, start, length))
    assert after.equal(before)


def test_rounding_is_to_a_neighbour_and_right_in_the_mean():
    generator = torch.Generator().manual_seed(0)
    values = torch.cat((torch.randn(300), torch.tensor([1e-6, -1e-6, 0.0, 3.0])))
    W = Int8Weight.from_float(torch.zeros(20_000, 304), group_size=128)
    W.write_block(0, 0, values.expand(20_000, -1), generator)
    assert (W.scale == W.scale[0]).all()
    draws, step = W.dequantize().double(), spread(W)[0].double()
    lower = (values / step).floor() * step
    share = (values.double() - lower) / step
    assert (((draws - lower).abs() < 1e-9) | ((draws - lower - step).abs() < 1e-9)).all()
    sigma = (share * (1 - share) / len(draws)).sqrt()
    assert (((draws.mean(0) - values) / step).abs() <= 4.5 * sigma + 1e-6).all()


def test_random_bits_are_the_generators():
    X, written = matrix(5, 300), []
    for seed in (1, 1, 2):
        W = Int8Weight.from_float(torch.zeros(5, 300))
        W.write_block(0, 0, X, torch.Generator().manual_seed(seed))
        written.append(W.codes)
    assert written[0].equal(written[1])
    assert not written[0].equal(written[2])


@every_dtype
def test_steps_much_smaller_than_a_code_add_up(dtype):
    """Nearest rounding, or an update in bfloat16, would lose them all."""
    torch.manual_seed(0)
    W, D = int8(64, 700, dtype), 1e-5 * torch.randn(64, 700)
    start, steps = W.dequantize(torch.float32), 100
    assert D.abs().max() < spread(W).min() / 2
    for _ in range(steps):
        for first, length in ((0, 256), (256, 444)):
            W.write_block(1, first, W.read_block(1, first, length).add_(D.narrow(1, first, length)))
    moved = W.dequantize(torch.float32) - start
    assert float((moved * D).sum() / (D * D).sum()) == pytest.approx(steps, rel=0.03)
    error = moved - steps * D
    assert abs(float(error.mean())) < 4 * float(error.std()) / error.numel() ** 0.5


def test_a_scale_changes_when_it_must():
    W = Int8Weight.from_float(torch.linspace(-1, 1, 64).expand(1, -1))
    scale = W.scale.clone()
    for factor, kept in ((0.95, True), (1.0, True), (0.8, False), (1.2, False)):
        W.scale.copy_(scale)
        W.write_block(0, 0, factor * torch.linspace(-1, 1, 64).expand(1, -1))
        assert W.scale.equal(scale) == kept
        assert float(W.dequantize().max()) == pytest.approx(factor, rel=0.01)


def test_no_value_is_looked_at():
    W = Int8Weight.from_float(torch.empty(40, 300, device="meta"))
    W.write_block(1, 256, W.read_block(1, 256, 44))
    assert linear(torch.empty(2, 300, device="meta"), W).shape == (2, 40)


# ----------------------------------------------------------------------------------------- copied, moved, saved


@every_dtype
def test_copies(dtype):
    W = int8(30, 300, dtype)
    W.grad = torch.ones(30, 300, dtype=dtype)
    for other in (W.clone(), W.detach(), W.data, copy.deepcopy(W)):
        assert same(other, W)
    copied = copy.deepcopy(W)
    assert isinstance(copied, nn.Parameter)
    assert copied.grad.equal(W.grad)
    assert copied.codes.data_ptr() != W.codes.data_ptr() != W.clone().codes.data_ptr()
    assert W.detach().codes.data_ptr() == W.codes.data_ptr()
    other = int8(30, 300, dtype)
    other.data = W.data
    assert same(other, W)
    with torch.no_grad():
        plain = torch.zeros(30, 300).copy_(W)
        regrouped = int8(30, 300, dtype, 64)
        regrouped.copy_(W)
    assert plain.equal(W.dequantize(torch.float32))
    torch.testing.assert_close(regrouped.dequantize(), W.dequantize(), rtol=0, atol=1e-3)


def test_dtype_and_device():
    layer = nn.Linear(300, 30)
    quantize_weights(layer, ["weight"])
    codes = layer.weight.codes.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == layer(torch.ones(1, 300).bfloat16()).dtype == torch.bfloat16
    assert layer.weight.codes.equal(codes)
    layer.to("meta")
    assert layer.weight.codes.is_meta
    layer.to_empty(device="cpu")
    assert isinstance(layer.weight, Int8Weight)
    assert isinstance(layer.weight, nn.Parameter)
    nn.init.zeros_(layer.weight)
    assert (layer.weight.dequantize() == 0).all()


@pytest.mark.parametrize(
    "fill", [lambda W: nn.init.normal_(W, 0.1, 0.02), nn.init.uniform_, nn.init.ones_, nn.init.zeros_]
)
@every_dtype
def test_initialised_like_a_floating_weight(fill, dtype):
    W, plain = int8(2000, 700, dtype), torch.empty(2000, 700, dtype=dtype)
    for weight in (W, plain):
        torch.manual_seed(0)
        fill(weight)
    assert same(W, Int8Weight.from_float(plain))


@every_dtype
def test_torch_save_without_trusting_pickle(dtype):
    stream, W = io.BytesIO(), int8(30, 300, dtype)
    torch.save({"weight": W}, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)["weight"]
    assert same(loaded, W)
    assert loaded.requires_grad


def test_state_dict():
    int8_layer, again, plain = (nn.Linear(300, 30) for _ in range(3))
    quantize_weights(int8_layer, ["weight"])
    quantize_weights(again, ["weight"])
    again.load_state_dict(int8_layer.state_dict())
    assert same(again.weight, int8_layer.weight)
    state = {key: X.clone() for key, X in plain.state_dict().items()}
    plain.load_state_dict(int8_layer.state_dict())
    assert type(plain.weight) is nn.Parameter
    assert plain.weight.equal(int8_layer.weight.dequantize())
    again.load_state_dict(state)
    assert same(again.weight, Int8Weight.from_float(state["weight"]))


def test_quantize_weights_keeps_what_is_shared_and_what_is_frozen():
    model = nn.ModuleDict({"embed": nn.Embedding(30, 300), "head": nn.Linear(300, 30), "frozen": nn.Linear(3, 4)})
    model["head"].weight = model["embed"].weight
    model["frozen"].weight.requires_grad_(False)
    expected = Int8Weight.from_float(model["embed"].weight)
    quantize_weights(model, ["head.weight", "frozen.weight"], group_size=256)
    assert same(model["embed"].weight, expected)
    assert model["head"].weight is model["embed"].weight
    assert not model["frozen"].weight.requires_grad
    quantize_weights(model, ["head.weight"])
    assert same(model["embed"].weight, expected)


# ------------------------------------------------------------------------------------------ models and checkpoints


def gpt2(folder: Path) -> str:
    GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=300, bos_token_id=0, eos_token_id=0
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["llama-9m", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_made_in_int8_is_that_of_transformers_quantized(name, dtype, tmp_path):
    if name == "gpt2":
        name, overrides = gpt2(tmp_path), {}
    else:
        overrides = SIZES
    torch.manual_seed(0)
    model = build_model(name, vocab_size=300, dtype=dtype, overrides=overrides, int8=True)
    # Over the meta device too: from_config draws random numbers for torch's own initialisation first.
    with torch.device("meta"):
        plain = build_model(name, vocab_size=300, dtype=dtype, overrides=overrides)
    plain.to_empty(device="cpu")
    torch.manual_seed(0)
    plain.initialize_weights()
    plain.tie_weights()
    usual = build_model(name, vocab_size=300, dtype=dtype, overrides=overrides)

    targets = default_targets(plain)
    assert {key for key, p in model.named_parameters() if isinstance(p, Int8Weight)} == targets
    expected = dict(plain.named_parameters())
    assert [key for key, _ in model.named_parameters()] == list(expected)
    for key, p in model.named_parameters():
        if key in targets:
            assert same(p, Int8Weight.from_float(expected[key])), key
        else:
            assert p.equal(expected[key]), key
        std = float(dict(usual.named_parameters())[key].detach().float().std())
        assert float(expected[key].detach().float().std()) == pytest.approx(std, rel=0.2), key
    assert [key for key, _ in model.named_buffers()] == [key for key, _ in usual.named_buffers()]
    for ours, theirs in zip(model.buffers(), usual.buffers(), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.equal(theirs)
    assert model.training == usual.training
    assert len(set(map(id, model.parameters()))) == len(set(map(id, usual.parameters())))

    model.eval()
    tokens = torch.randint(300, (2, 9))
    logits = model(tokens).logits
    assert logits.isfinite().all()
    plain.load_state_dict(model.state_dict())  # dequantizes
    torch.testing.assert_close(logits, plain.eval()(tokens).logits)

    save_pretrained(model, tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=getattr(torch, dtype))
    assert not any(isinstance(p, Int8Weight) for p in exported.parameters())
    torch.testing.assert_close(logits, exported.eval()(tokens).logits)
    loaded = build_model(str(tmp_path / "export"), dtype=dtype, pretrained=True, int8=True)
    assert {key for key, p in loaded.named_parameters() if isinstance(p, Int8Weight)} == targets


def test_a_model_is_made_without_a_floating_copy_of_it():
    sizes = {**SIZES, "hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 1}
    with Allocations() as seen:
        build_model("llama-9m", vocab_size=300, dtype="bfloat16", overrides=sizes, int8=True)
    assert max(seen.sizes) == 2**20
    with torch.device("meta"):
        model = build_model("llama-7b", dtype="bfloat16", int8=True)
    assert all(X.is_meta for p in model.parameters() for X in stored_tensors(p))
    planned = sum(X.nbytes for p in model.parameters() for X in stored_tensors(p))
    assert planned / 2**30 == pytest.approx(6.57, abs=0.01)


def test_a_model_without_layers_to_quantize_says_so(monkeypatch):
    monkeypatch.setattr("subspan.training.models.default_targets", lambda model: set())
    with pytest.raises(ValueError, match=r"model.int8=true finds no linear layer in numbered blocks of llama-9m"):
        build_model("llama-9m", vocab_size=300, overrides=SIZES, int8=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_holds_codes_and_scale_and_loads_them_in_place(tmp_path):
    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = build_model("llama-9m", vocab_size=300, dtype="bfloat16", overrides=SIZES, int8=True)
        return model, torch.optim.SGD([p for p in model.parameters() if not isinstance(p, Int8Weight)], 0.1)

    model, optimizer = make(0)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, model, optimizer, {})
    checkpointer.wait()
    other, its_optimizer = make(1)
    weight = other.model.layers[0].mlp.up_proj.weight
    storage = weight.codes.data_ptr(), weight.scale.data_ptr()
    load(tmp_path / "step_00000001", other, its_optimizer)
    assert (weight.codes.data_ptr(), weight.scale.data_ptr()) == storage
    for (key, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert same(a, b) if isinstance(a, Int8Weight) else a.equal(b), key

    floating = build_model("llama-9m", vocab_size=300, dtype="bfloat16", overrides=SIZES)
    with pytest.raises(ValueError, match=r"model\.model\.layers.*q_proj\.weight\S* is .* model\.int8"):
        load(tmp_path / "step_00000001", floating, torch.optim.SGD(floating.parameters(), 0.1))


def test_groups_are_those_of_the_floating_model():
    models = [build_model("llama-9m", vocab_size=300, overrides=SIZES, int8=value) for value in (True, False)]
    names = [
        [[name for name, _ in group["params"]] for group in subspan.param_groups(model, rank=8, verbose=False)]
        for model in models
    ]
    assert names[0] == names[1]


def test_memory_can_be_shared():
    """torch would follow a null pointer."""
    p = nn.Parameter(Int8Weight.from_float(torch.randn(4, 300)))
    before = p.dequantize()
    p.share_memory_()
    assert p.codes.is_shared()
    assert p.dequantize().equal(before)
