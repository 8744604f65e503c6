"""Low-bit moments: the nearest code of a known book, whatever the input, and stores that a rule does not notice."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from subspan.optim.books import code_book
from subspan.optim.quant import BLOCK_SIZE, SIGNED, Store, dequantize, quantize, stochastic_round
from subspan.optim.rules import Adafactor, Adam, Lion, SGDMomentum

BOOKS = [(8, True), (8, False), (4, True), (4, False)]
every_book = pytest.mark.parametrize(("bits", "signed"), BOOKS)


def there_and_back(X, bits, signed, block_size=64):
    return dequantize(*quantize(X, bits, signed, block_size), bits, signed, block_size, X.shape[-1])


def moments(*shape, signed=True, spread=2.0):
    """Values over several decades, as moments are."""
    X = torch.randn(shape) * (spread * torch.randn(shape)).exp()
    return X if signed else X.square()


def unpack(codes):
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


# --------------------------------------------------------------------------------------------------- code books


@pytest.mark.parametrize("signed", [True, False])
def test_the_8_bit_books_are_those_of_bitsandbytes(signed):
    assert code_book(8, signed).equal(bnb.functional.create_dynamic_map(signed))


@every_book
def test_books_ascend_to_one(bits, signed):
    book = code_book(bits, signed)
    assert book.shape == (2**bits,)
    assert book.dtype == torch.float32
    assert (book.diff() > 0).all()
    assert book[-1] == 1
    assert book[0] >= -1 if signed else book[0] >= 0


def test_a_first_moment_can_be_zero_and_a_4_bit_second_moment_cannot():
    assert [0.0 in code_book(bits, signed) for bits, signed in BOOKS] == [True, True, True, False]


def test_4_bit_books_are_even_in_the_logarithm():
    book = code_book(4, False).log10()
    torch.testing.assert_close(book, torch.linspace(-4, 0, 16))
    signed = code_book(4, True)
    assert signed[7] == 0
    torch.testing.assert_close(-signed[:7].neg().log10(), torch.linspace(0, 1.75, 7))
    torch.testing.assert_close(signed[8:].log10(), torch.linspace(-1.75, 0, 8))


# ------------------------------------------------------------------------------------------------- nearest code


@every_book
def test_the_nearest_code_by_brute_force(bits, signed):
    """Both ends of the cells of the look-up table, three numbers around every boundary, and some in between."""
    book = code_book(bits, signed)
    bounds = ((book[:-1].double() + book[1:].double()) / 2).float()
    around = torch.cat((bounds, bounds.nextafter(bounds - 1), bounds.nextafter(bounds + 1)))
    cells = torch.cat((torch.arange(0, 0x3300, 16), torch.arange(0x3300, 0x3F80))).int() << 16  # fewer below 3e-8
    ends = torch.stack((cells, cells | 0xFFFF)).flatten().view(torch.float32)
    Z = torch.cat((around, ends, torch.rand(2000), torch.logspace(-8, 0, 2000)))
    Z = torch.cat((Z, -Z[len(around) :])) if signed else Z
    codes, scale = quantize(torch.stack((torch.ones_like(Z), Z), -1), bits, signed, 2)  # a 1 makes the scale 1
    assert (scale == 1).all()
    codes = (codes if bits == 8 else unpack(codes))[:, 1]
    nearest = [(z.double().unsqueeze(-1) - book.double()).abs().argmin(-1) for z in Z.split(4096)]
    expected = torch.cat(nearest)  # argmin takes the first, the lower, of two
    if (bits, signed) == (8, False):
        expected = torch.where((expected == 0) & (Z > 0), 1, expected)
    assert codes.equal(expected.to(torch.uint8))


@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_codes_are_those_of_bitsandbytes(signed):
    """Of its brute-force kernel, which it runs for fp64. Its fp32 kernel for the CPU looks codes up in 2^16 bins."""
    torch.manual_seed(0)
    X, book = moments(32, 1024, signed=signed), code_book(8, signed)
    codes, scale = quantize(X, 8, signed, 256)
    theirs, absmax = torch.ops.bitsandbytes.quantize_blockwise.default(X.double(), book, 256)
    assert absmax.view_as(scale).equal(scale)
    raised = (theirs == 0) & (X > 0) if not signed else torch.zeros_like(X, dtype=torch.bool)
    assert raised.any() != signed
    Z = X.double() / scale.double().repeat_interleave(256, -1)
    distance, best = ((book[c.int()] - Z).abs() for c in (codes, theirs))
    differ = (codes != theirs) & ~raised
    assert ((distance - best).abs()[differ] < 1e-7).all()  # ties, in fp32
    assert differ.float().mean() < 1e-4

    theirs, state = bnb.functional.quantize_blockwise(X, code=book, blocksize=256)
    assert state.absmax.view_as(scale).equal(scale)
    assert ((distance - (book[theirs.int()] - Z).abs()) <= 2**-15).all()
    read = dequantize(codes, scale, 8, signed, 256)
    torch.testing.assert_close(read, bnb.functional.dequantize_blockwise(codes, state), rtol=1e-6, atol=0)


def test_a_nonzero_second_moment_never_becomes_zero():
    V = torch.tensor([[1e20, 1e-45, 1e-38, 1e-30, 1e13, 0.0], [1.0, 1e-45, 1e-38, 1e-9, 1e-7, 0.0]])
    read = there_and_back(V, 8, False)
    assert (read[V > 0] > 0).all()
    assert (read[V == 0] == 0).all()
    assert (there_and_back(V, 4, False) > 0).all()  # nor does a zero, beside others, in 4 bits


def test_the_step_never_grows_by_much():
    """sqrt(v / v stored): how much longer a step is than with the v that was not rounded."""
    V = moments(256, 256, signed=False, spread=3.0)
    growth = [(V / there_and_back(V, bits, False, BLOCK_SIZE[bits])).sqrt().max().item() for bits in (8, 4)]
    assert growth[0] < 1.37
    assert growth[1] < 1.2


# -------------------------------------------------------------------------------------------------- every input


@every_book
@pytest.mark.parametrize("shape", [(5, 64), (5, 65), (3, 130), (2, 3, 7), (9,), (4, 1), (0, 5), (5, 0)], ids=str)
def test_shapes(bits, signed, shape):
    X = moments(*shape, signed=signed)
    codes, scale = quantize(X, bits, signed, 64)
    n, width = shape[-1], -(-shape[-1] * bits // 8)
    assert (codes.dtype, scale.dtype) == (torch.uint8, torch.float32)
    assert codes.shape == (*shape[:-1], width)
    assert scale.shape == (*shape[:-1], -(-n // max(1, min(64, n))))
    read = dequantize(codes, scale, bits, signed, 64, n)
    assert read.shape == shape
    assert read.dtype == torch.float32
    if X.numel():
        padded = torch.nn.functional.pad(X, (0, -n % min(64, n)))
        assert scale.equal(padded.view(*shape[:-1], -1, min(64, n)).abs().amax(-1))


@every_book
def test_a_value_moves_by_half_the_gap_it_lies_in(bits, signed):
    X, book = moments(50, 192, signed=signed, spread=1.0), code_book(bits, signed)
    scale = quantize(X, bits, signed, 64)[1].repeat_interleave(64, -1)
    Z, read = X / scale, there_and_back(X, bits, signed) / scale
    upper = torch.bucketize(Z, book).clamp(1, len(book) - 1)
    half = (book[upper] - book[upper - 1]) / 2
    outside = (book[0] - Z).clamp_min(0)  # below the lowest code
    smallest = book[1] if (bits, signed) == (8, False) else 0.0  # which may go up to it
    assert ((Z - read).abs() <= torch.maximum(half + outside, torch.as_tensor(smallest)) * (1 + 1e-5)).all()


@every_book
def test_what_was_stored_is_stored_unchanged(bits, signed):
    X = moments(20, 256, signed=signed).abs()  # the largest code is 1, the smallest of the signed 8-bit book not -1
    codes, scale = quantize(X, bits, signed, 64)
    again = quantize(dequantize(codes, scale, bits, signed, 64), bits, signed, 64)
    assert codes.equal(again[0])
    assert scale.equal(again[1])


@every_book
def test_zero_tiny_and_huge_blocks(bits, signed):
    torch.manual_seed(0)
    pattern = torch.rand(64) + 0.5
    X = torch.stack([pattern * factor for factor in (0.0, 1e-44, 1e-40, 1e-30, 1.0, 1e30, 2e38)])
    read = there_and_back(X, bits, signed)
    assert (read[0] == 0).all()
    for row in range(1, 7):
        atol = 3e-45 if row < 3 else 0.0  # subnormal: the last bit
        torch.testing.assert_close(read[row], X[row], rtol=0.5, atol=atol)
    assert (read[:, X[4].argmax()] == X[:, X[4].argmax()]).all()


@every_book
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_stay_in_their_block(bits, signed, bad):
    X = moments(3, 256, signed=signed)
    expected = there_and_back(X, bits, signed)
    X[1, 70] = bad
    read = there_and_back(X, bits, signed)
    assert not read[1, 64:128].isfinite().any()
    read[1, 64:128] = expected[1, 64:128]
    assert read.equal(expected)


@every_book
def test_a_negative_value_of_an_unsigned_book_is_its_smallest(bits, signed):
    read = there_and_back(torch.tensor([[1.0, -0.5]]), bits, signed)
    assert (read[0, 1] < 0) == signed
    if not signed:
        assert read[0, 1] == code_book(bits, signed)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_count_as_fp32(dtype):
    X = moments(4, 64, spread=1.0).to(dtype)
    assert all(a.equal(b) for a, b in zip(quantize(X, 8, True, 64), quantize(X.float(), 8, True, 64), strict=True))


def test_two_4_bit_codes_share_a_byte_the_first_in_the_lower_half():
    book = code_book(4, False)
    codes, scale = quantize(book[[15, 3, 9, 0, 7]].unsqueeze(0), 4, False, 128)
    assert codes.tolist() == [[15 + 16 * 3, 9, 7]]
    assert dequantize(codes, scale, 4, False, 128, 5).equal(book[[15, 3, 9, 0, 7]].unsqueeze(0))


@every_book
def test_rows_do_not_feel_each_other_nor_strides(bits, signed):
    X = moments(40, 300, signed=signed)
    codes, scale = quantize(X, bits, signed, 64)
    parts = [quantize(x, bits, signed, 64) for x in X.split(7)]
    assert codes.equal(torch.cat([c for c, _ in parts]))
    assert scale.equal(torch.cat([s for _, s in parts]))
    strided = quantize(X.T.contiguous().T, bits, signed, 64)
    assert codes.equal(strided[0])
    assert scale.equal(strided[1])


class Allocations(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {X.untyped_storage().data_ptr() for X in args if isinstance(X, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in old:
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


@every_book
def test_temporaries_are_small_beside_a_large_tensor(bits, signed):
    X = torch.rand(8192, 256)
    reference = quantize(X[-100:], bits, signed, 256)
    with Allocations() as seen:
        codes, scale = quantize(X, bits, signed, 256)
    assert seen.largest == codes.numel() if bits == 8 else seen.largest <= 2**20
    assert codes[-100:].equal(reference[0])
    with Allocations() as seen:
        X = dequantize(codes, scale, bits, signed, 256)
    assert seen.largest == 4 * X.numel()  # the result
    assert X[-100:].equal(dequantize(*reference, bits, signed, 256))


@every_book
def test_no_value_is_looked_at(bits, signed):
    X = torch.empty(6, 101, device="meta")  # has none to wait for
    codes, scale = quantize(X, bits, signed, 64)
    assert dequantize(codes, scale, bits, signed, 64, 101).shape == X.shape


def test_compiled_codes_and_values_are_the_same():
    """Compiled they come from arithmetic, not from tables; in one graph."""
    write = torch.compile(quantize, fullgraph=True, backend="aot_eager")
    read = torch.compile(dequantize, fullgraph=True, backend="aot_eager")
    for bits, signed in BOOKS:  # the second number of bits is made a symbol
        book = code_book(bits, signed)
        decades = 10.0 ** (-7 * torch.rand(20, 101)) * (torch.rand(20, 101) - 0.5).sign()
        X = torch.cat((moments(20, 101, spread=3.0).flatten(), decades.flatten(), book, torch.tensor([0.0, 1e-45])))
        X = torch.cat((X[: 16 * (len(X) // 16)].view(16, -1), torch.ones(16, 1)), -1)
        X = X if signed else X.abs()
        codes, scale = quantize(X, bits, signed, 4096)
        theirs = write(X, bits, signed, 4096)
        assert theirs[1].equal(scale)
        assert (theirs[0] != codes).sum() <= 2  # ties, but for rounding
        value = dequantize(codes, scale, bits, signed, 4096, X.shape[1])
        torch.testing.assert_close(read(codes, scale, bits, signed, 4096, X.shape[1]), value, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(torch.ones(4), 2, True, 64), "use 8 or 4"),
        (lambda: quantize(torch.ones(4), 8, True, 0), "block_size=0 must be positive"),
        (lambda: quantize(torch.ones(4), 4, True, 3), "even for 4 bits: 128 is usual"),
        (lambda: quantize(torch.ones(()), 8, True, 64), "keep it as it is"),
        (lambda: dequantize(*quantize(torch.ones(9), 8, True, 64), 8, True, 4), "pass what quantize"),
        (lambda: dequantize(*quantize(torch.ones(9), 4, True, 64), 4, True, 64, 11), "n=11"),
        (lambda: Store(16), "use 8 or 4"),
        (lambda: stochastic_round(torch.ones(3), torch.float16), "only float32 to bfloat16"),
        (lambda: stochastic_round(torch.ones(3).double()), "only float32 to bfloat16"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------------- stores


def shapes(state):
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize(
    ("bits", "codes", "scale"), [(8, (300, 32), (300, 1)), (4, (300, 16), (300, 1))], ids=["int8", "int4"]
)
def test_low_rank_moments_are_stored_transposed_in_blocks_along_the_rank(bits, codes, scale):
    state = Store(bits, transposed=True).init(Adam().init(torch.zeros(32, 300)))
    assert shapes(state) == {
        "exp_avg.codes": codes,
        "exp_avg.scale": scale,
        "exp_avg_sq.codes": codes,
        "exp_avg_sq.scale": scale,
    }
    assert {value.dtype for value in state.values()} == {torch.uint8, torch.float32}


def test_dense_moments_are_stored_in_blocks_along_the_last_dimension():
    state = Store(8).init(Lion().init(torch.zeros(20, 600)))
    assert shapes(state) == {"exp_avg.codes": (20, 600), "exp_avg.scale": (20, 3)}
    state = Store(4).init(SGDMomentum().init(torch.zeros(3, 20, 601)))
    assert shapes(state) == {"momentum_buffer.codes": (3, 20, 301), "momentum_buffer.scale": (3, 20, 5)}


def test_small_tensors_vectors_and_factored_moments_stay_as_they_are():
    for template in (torch.zeros(63, 65), torch.zeros(10_000)):
        assert shapes(Store(8).init(Adam().init(template))) == shapes(Adam().init(template))
    factored = Adafactor().init(torch.zeros(3, 2000, 2000))
    assert shapes(Store(8).init(factored)) == shapes(factored)
    assert shapes(Store().init(Adam().init(torch.zeros(64, 64)))) == {"exp_avg": (64, 64), "exp_avg_sq": (64, 64)}


def test_every_moment_of_a_rule_is_known():
    made = [rule.init(torch.zeros(64, 64)) for rule in (Adam(), Lion(), SGDMomentum())]
    assert {name for state in made for name in state} == set(SIGNED)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_new_state_reads_as_zeros_and_needs_no_full_tensor(bits):
    template = Adam().init(torch.empty(80, 90, device="meta"))
    state = Store(bits, transposed=True).init(template, device="cpu")
    assert {value.device.type for value in state.values()} == {"cpu"}
    for X in Store(bits, transposed=True).load(state, (80, 90)).values():
        assert X.equal(torch.zeros(80, 90))


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(64, 100), (75, 91), (3, 75, 91)], ids=str)
def test_write_and_read(shape, transposed, bits):
    store = Store(bits, transposed)
    state = store.init(Adam().init(torch.zeros(shape)))
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        X = moments(*shape, signed=signed)
        store.write(state, name, X)
        read = store.read(state, name, shape)
        assert read.shape == X.shape
        if bits is None:
            assert read.equal(X)
        else:
            oriented = X.mT if transposed else X
            expected = there_and_back(oriented, bits, signed, BLOCK_SIZE[bits])
            assert read.equal(expected.mT if transposed else expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_piece_of_k_is_stored_like_the_whole(bits):
    """So that sharding k, the dimension without the basis, cuts no block."""
    store, M = Store(bits, transposed=True), moments(64, 200)
    whole, half = (store.init({"exp_avg": X}) for X in (M, M[:, 100:]))
    store.write(whole, "exp_avg", M)
    store.write(half, "exp_avg", M[:, 100:])
    assert all(value[100:].equal(half[key]) for key, value in whole.items())


def steps(rule, store, gradients, parts=1):
    """Directions of a rule whose moments live in a store, computed in `parts` pieces."""
    shape = gradients[0].shape
    state = store.init(rule.init(torch.zeros(shape)))
    dim = -1 if store.transposed else -2
    size = shape[dim] // parts
    for step, R in enumerate(gradients, 1):
        pieces = []
        for i in range(parts):
            part, piece = store.part(state, i * size, size), R.narrow(dim, i * size, size)
            loaded = store.load(part, piece.shape)
            pieces.append(rule.update(piece, loaded, torch.tensor(float(step))))
            store.save(part, loaded)
        yield torch.cat(pieces, dim)


@pytest.mark.parametrize("rule", [Adam(), Lion(), SGDMomentum()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_in_parts_or_at_once_makes_no_difference(bits, transposed, rule):
    torch.manual_seed(0)
    gradients = [moments(64, 80, spread=1.0) for _ in range(3)]
    store = Store(bits, transposed)
    for whole, parts in zip(steps(rule, store, gradients), steps(rule, store, gradients, parts=4), strict=True):
        assert whole.equal(parts)


@pytest.mark.parametrize(("bits", "least"), [(None, 1 - 1e-6), (8, 0.99), (4, 0.8)])
def test_adam_goes_the_same_way(bits, least):
    """Gradients whose columns differ in size by two decades, as the rows of a low-rank gradient do: cosine of directions."""
    torch.manual_seed(0)
    gradients = [torch.randn(64, 128) * torch.logspace(-1, 1, 128) for _ in range(20)]
    state = Adam().init(gradients[0])
    for step, (R, U) in enumerate(zip(gradients, steps(Adam(), Store(bits), gradients), strict=True), 1):
        exact = Adam().update(R, state, torch.tensor(float(step)))
        assert torch.cosine_similarity(U.flatten(), exact.flatten(), dim=0) > least


# ------------------------------------------------------------------------------------------ stochastic rounding


def test_rounding_is_to_a_neighbour_and_right_in_the_mean():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0 + 2**-10, -3.1415927, 1e-3, -1e-30, 65000.0, 1e-40, -2e38, 2.0 - 2**-24])
    draws = stochastic_round(values.expand(20_000, -1).contiguous(), generator=generator).double()
    lower = values.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32).double()  # the neighbour nearer to 0
    upper = ((values.view(torch.int32) & -(2**16)) + 2**16).view(torch.float32).double()
    assert ((draws == lower) | (draws == upper)).all()
    share = (values.double() - lower) / (upper - lower)
    sigma = (share * (1 - share) / len(draws)).sqrt()
    assert (((draws == upper).double().mean(0) - share).abs() <= 4 * sigma + 1e-12).all()
    assert ((draws.mean(0) - values).abs() <= 4 * sigma * (upper - lower).abs() + 1e-12 * values.abs()).all()


def test_what_bfloat16_has_stays():
    exact = torch.cat([torch.randn(10_000) * 10.0**e for e in (-40, -10, 0, 10)]).bfloat16().float()
    exact = torch.cat((exact, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.finfo(torch.bfloat16).max])))
    rounded = stochastic_round(exact)
    assert rounded.dtype == torch.bfloat16
    assert rounded.float().view(torch.int32).equal(exact.view(torch.int32))
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert nan.isnan().all()
    assert stochastic_round(nan).isnan().all()


def test_no_finite_value_becomes_infinite():
    largest = torch.finfo(torch.float32).max
    X = torch.tensor([largest, -largest]).repeat(1000)
    most = torch.finfo(torch.bfloat16).max
    assert stochastic_round(X).float().equal(torch.tensor([most, -most]).repeat(1000))


def test_rounding_is_a_function_of_its_generator_and_compiles():
    X = torch.randn(7, 33)
    draws = [stochastic_round(X, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])
    compiled = torch.compile(stochastic_round, fullgraph=True, backend="aot_eager")(X)
    assert ((compiled.float() - X).abs() <= X.abs() * 2**-7).all()
    assert stochastic_round(X.to("meta")).shape == X.shape
