"""How to remember: moments in 8 or 4 bits a value, bases in 4, block by block, and stochastic rounding to bfloat16.

A block of b values along the last dimension shares one fp32 scale, its largest absolute value; each value is stored as the
number of the nearest entry of a sorted code book in [-1, 1] (block-wise quantization, arXiv 2110.02861):

    scale = max_block |X|,      code = argmin_c |book[c] - X / scale|,      X ~ book[code] scale

The books are in books.py. Nothing here waits for the device, and torch.compile takes each function as one graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from subspan.optim.books import Bits, bits_of, book_name, nearest_codes, values_of

State = dict[str, Tensor]

BLOCK_SIZE: dict[int, int] = {8: 256, 4: 128}
"""Values to a scale, as bitsandbytes (8) and arXiv 2309.01507 (4) have them."""

SIGNED = {"exp_avg": True, "momentum_buffer": True, "exp_avg_sq": False}
"""The moments that can be stored in few bits. All others (Adafactor's row and column) are small and stay as they are."""

MIN_ELEMENTS = 4096
"""Smaller tensors stay in fp32, as in bitsandbytes: they save nothing."""

BASIS_BLOCK = 128
"""Values to a scale of a 4-bit basis, along the rank."""


# ---------------------------------------------------------------------------------------- quantize, dequantize


def quantize(X: Tensor, bits: Bits, signed: bool, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of X (..., n), any floating dtype, taken as fp32; blocks of b = min(block_size, n) along n, the last may
    be short.

    codes: (..., n) uint8 for 8 bits; (..., ceil(n/2)) for 4, value 2i in the lower half of byte i, value 2i + 1 in the
        upper one (0 where n is odd).
    scale: (..., ceil(n/b)) fp32.

    The nearest code, the lower of two equally near. A block of zeros has scale 0 and reads back as zeros, also from a book
    without zero. Not signed: X > 0 is never stored as 0, and X < 0 as the smallest code. A nan or inf makes its block, and no
    other, read back as nan or inf throughout.

    Works on some rows at a time: 20 bytes of temporaries for each of 2^18 values on a CPU, of 2^22 elsewhere.
    """
    _check(bits, block_size)
    if not X.ndim:
        raise ValueError("X is a 0-d tensor, which has no blocks: keep it as it is")
    *rest, n = X.shape
    codes = X.new_empty((*rest, -(-n * bits // 8)), dtype=torch.uint8)
    scale = X.new_empty((*rest, -(-n // _block(block_size, n))), dtype=torch.float32)
    quantize_into(codes, scale, X, book_name(bits, signed), block_size)
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, bits: Bits, signed: bool, block_size: int, n: int | None = None) -> Tensor:
    """What `quantize` stored: (..., n) fp32. n: needed for an odd number of 4-bit values, else that of the codes."""
    _check(bits, block_size)
    most = codes.shape[-1] * 8 // bits
    n = most if n is None else n
    b = _block(block_size, n)
    if -(-n * bits // 8) != codes.shape[-1] or -(-n // b) != scale.shape[-1]:
        raise ValueError(
            f"n={n!r} with block_size={block_size} does not fit codes {tuple(codes.shape)} and scale "
            f"{tuple(scale.shape)}: pass what quantize() was given"
        )
    X = scale.new_empty((*codes.shape[:-1], n))
    _dequantize_into(X, codes, scale, book_name(bits, signed), block_size)
    return X


def _dequantize_into(X: Tensor, codes: Tensor, scale: Tensor, name: str, block_size: int) -> None:
    n = X.shape[-1]
    b = _block(block_size, n)
    for x, c, s in _row_blocks(X, codes, scale):
        decoded = values_of(c, name)[..., :n]
        x.copy_((_blocks(decoded, b) * s.unsqueeze(-1)).flatten(-2)[..., :n])


def quantize_into(
    codes: Tensor, scale: Tensor, X: Tensor, name: str, block_size: int, use: Tensor | None = None
) -> None:
    """use: 0-d bool tensor; if it is False, codes and scale stay as they are."""
    n = X.shape[-1]
    b = _block(block_size, n)
    for x, c, s in _row_blocks(X, codes, scale):
        nearest, absmax = encode(_blocks(x.float().contiguous(), b), name)
        write_codes(c, nearest.flatten(-2)[..., :n], bits_of(name), use)
        s.copy_(absmax if use is None else torch.where(use, absmax, s))


def encode(blocks: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Nearest codes (..., b), int32, of blocks (..., b), contiguous fp32, and their scales (...)."""
    absmax = blocks.abs().amax(-1)
    safe = torch.where(absmax > 0, absmax, 1.0)  # of a block of zeros, and of one with a nan
    nearest = nearest_codes(blocks / safe.unsqueeze(-1), name)
    if name == "8 unsigned":
        nearest = nearest.maximum((blocks > 0).int())  # code 0 is the value 0
    return nearest, absmax


def write_codes(codes: Tensor, nearest: Tensor, bits: int, use: Tensor | None = None) -> None:
    """codes <- `nearest` (..., n), int32, packed; as they are if `use` is False."""
    if bits == 4:
        nearest = _pad(nearest, 2)
        nearest = nearest[..., ::2] + 16 * nearest[..., 1::2]
    codes.copy_(nearest if use is None else torch.where(use, nearest, codes.int()))


def _blocks(X: Tensor, b: int) -> Tensor:
    """X (..., n) as (..., ceil(n/b), b), the last block filled up with zeros."""
    return _pad(X, b).reshape(*X.shape[:-1], -(-X.shape[-1] // b), b)


def _pad(X: Tensor, multiple: int) -> Tensor:
    """X (..., n) with zeros behind, up to a length that `multiple` divides; X itself if n is one."""
    missing = -X.shape[-1] % multiple
    return torch.nn.functional.pad(X, (0, missing)) if missing else X


def _row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same rows of all, which agree but in their last dimension, as many as may have temporaries at once.

    A compiled loop over rows has no temporaries, so it gets all rows. More on a GPU, where each block costs launches.
    """
    X = tensors[0]
    if X.ndim < 2 or torch.compiler.is_compiling():
        yield tensors
        return
    rows, most = X.shape[-2], 2**18 if X.device.type == "cpu" else 2**22
    step = max(1, most * rows // max(1, X.numel()))
    for start in range(0, rows, step):
        yield tuple(Y.narrow(-2, start, min(step, rows - start)) for Y in tensors)


def _block(block_size: int, n: int) -> int:
    return max(1, min(block_size, n))


def _check(bits: int, block_size: int) -> None:
    if bits not in get_args(Bits):
        raise ValueError(f"bits={bits!r} is not supported: use 8 or 4")
    if block_size < 1 or (bits == 4 and block_size % 2):
        raise ValueError(
            f"block_size={block_size!r} must be positive, and even for 4 bits: {BLOCK_SIZE[bits]} is usual"
        )


# -------------------------------------------------------------------------------------------------------- bases


def init_basis(shape: Sequence[int], device: torch.device | str) -> State:
    """A 4-bit basis of shape (..., d, r): `basis.codes` (..., d, ceil(r/2)) uint8, `basis.scale` (..., d, ceil(r/128)) fp32."""
    *rest, r = shape
    return {
        "basis.codes": torch.zeros((*rest, -(-r // 2)), dtype=torch.uint8, device=device),
        "basis.scale": torch.zeros((*rest, -(-r // _block(BASIS_BLOCK, r))), dtype=torch.float32, device=device),
    }


def read_basis(state: State, rank: int, dtype: torch.dtype) -> Tensor:
    """The basis (..., d, r) of `dtype`: a new tensor if it is stored in 4 bits or another dtype, else the one that is kept."""
    if "basis" in state:
        return state["basis"].to(dtype)
    codes, scale = state["basis.codes"], state["basis.scale"]
    Q = torch.empty((*codes.shape[:-1], rank), dtype=dtype, device=codes.device)
    _dequantize_into(Q, codes, scale, "basis", BASIS_BLOCK)
    return Q


def write_basis(state: State, Q: Tensor) -> None:
    """Remember the basis Q (..., d, r), in place."""
    if "basis" in state:
        state["basis"].copy_(Q)
    else:
        quantize_into(state["basis.codes"], state["basis.scale"], Q, "basis", BASIS_BLOCK)


# ------------------------------------------------------------------------------------------------------- stores


@dataclass(frozen=True)
class Store:
    """How the moments of one parameter are remembered: bits=None in fp32, as the rule made them; 8 or 4 in codes.

    A moment `exp_avg` in codes is two tensors, `exp_avg.codes` (uint8) and `exp_avg.scale` (fp32), in blocks of min(256, n)
    values (8 bits) or min(128, n) (4 bits) along their last dimension n:

        transposed=True     for R (..., r, k): (..., k, r), blocks along the rank r. k is the dimension that is sharded, and any
                            piece of it is made of whole blocks
        transposed=False    for a dense parameter (..., m, n): (..., m, n), blocks along n

    Vectors, tensors of fewer than 4096 elements and moments that SIGNED does not list stay as they are. A rule never sees codes:

        moments = store.load(state, R.shape)
        U = rule.update(R, moments, step)
        store.save(state, moments)

    Where R is large (an embedding), so are its fp32 moments. A rule that works element by element can do the same with
    `store.part(state, start, length)` and that part of R along `store.dim(state, R)`.

    bits=None with `transposed` means the same tensors as without, so that all of this works for every state.

    A change of a moment by less than half the way to the next code is lost, and 0.001 (g^2 - v), of a beta2 of 0.999, mostly is
    less: what moves v is the scale, which is exact, and large gradients. On the gradients above, steps became 3 % (Adam) and
    10 % (GaLore) longer in 8 bits, a quarter longer in 4 bits, which may want a smaller lr.
    """

    bits: Bits | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.bits is not None:
            _check(self.bits, BLOCK_SIZE.get(self.bits, 1))

    def init(self, moments: State, device: torch.device | str | None = None) -> State:
        """Zeros for what a rule's `init` returned, on its device or on `device`: from moments on the meta device, codes are
        made without an fp32 tensor of full size."""
        state: State = {}
        for name, moment in moments.items():
            if self.bits is None or name not in SIGNED or moment.ndim < 2 or moment.numel() < MIN_ELEMENTS:
                state[name] = torch.zeros_like(moment, device=device)
                continue
            *rest, n = moment.mT.shape if self.transposed else moment.shape
            blocks = -(-n // _block(BLOCK_SIZE[self.bits], n))
            # With scale 0 every code stands for 0.
            state[f"{name}.codes"] = moment.new_zeros((*rest, -(-n * self.bits // 8)), dtype=torch.uint8, device=device)
            state[f"{name}.scale"] = moment.new_zeros((*rest, blocks), dtype=torch.float32, device=device)
        return state

    def read(self, state: State, name: str, shape: Sequence[int]) -> Tensor:
        """The moment `name` of an R, or a dense gradient, of that shape: fp32 (a new tensor), or the tensor that is kept."""
        if f"{name}.codes" not in state:
            return state[name]
        assert self.bits is not None
        n = shape[-2] if self.transposed else shape[-1]
        codes, scale = state[f"{name}.codes"], state[f"{name}.scale"]
        X = dequantize(codes, scale, self.bits, SIGNED[name], BLOCK_SIZE[self.bits], n)
        return X.mT if self.transposed else X

    def write(self, state: State, name: str, value: Tensor, use: Tensor | None = None) -> None:
        """Remember `value`, of R's shape, in place. use: 0-d bool tensor; if it is False, codes stay as they are."""
        if f"{name}.codes" not in state:
            state[name].copy_(value)
            return
        assert self.bits is not None
        X = value.mT if self.transposed else value
        codes, scale = state[f"{name}.codes"], state[f"{name}.scale"]
        quantize_into(codes, scale, X, book_name(self.bits, SIGNED[name]), BLOCK_SIZE[self.bits], use)

    def load(self, state: State, shape: Sequence[int]) -> State:
        """All of `state` as a rule wants it: moments in codes read as fp32, everything else as it is."""
        if self.bits is None:
            return state
        kept = {key: value for key, value in state.items() if not key.endswith((".codes", ".scale"))}
        return kept | {name: self.read(state, name, shape) for name in self._coded(state)}

    def save(self, state: State, moments: State, use: Tensor | None = None) -> None:
        """Write back what `load` returned and a rule changed in place; `use` as for `write`."""
        for name in self._coded(state):
            self.write(state, name, moments[name], use)

    def dim(self, state: State, R: Tensor) -> int:
        """Along which dimension of R (not 0-d) parts are cut: its rows, or those of its moments, as they lie in memory."""
        return -1 if R.ndim == 1 or (self.transposed and self._coded(state)) else -2

    def part(self, state: State, start: int, length: int) -> State:
        """Views of some rows (elements of a vector) of every moment, codes or not, for a rule that works element by element."""

        def cut(key: str, X: Tensor) -> Tensor:
            moment = key.removesuffix(".codes").removesuffix(".scale") in SIGNED
            return X.narrow(-1 if X.ndim == 1 else -2, start, length) if moment else X

        return {key: cut(key, X) for key, X in state.items()}

    def _coded(self, state: State) -> list[str]:
        return [] if self.bits is None else [name for name in SIGNED if f"{name}.codes" in state]


# ------------------------------------------------------------------------------------------ stochastic rounding


def stochastic_round(
    X: Tensor, dtype: torch.dtype = torch.bfloat16, generator: torch.Generator | None = None
) -> Tensor:
    """X (fp32, any shape) in bfloat16, rounded to one of its two neighbours at random, so that the mean is X.

    The upper half of X's bits is the neighbour nearer to 0, the lower half, over 2^16, the probability of the other one: a random
    16-bit number added to the bits carries into the upper half just that often. Values that bfloat16 has stay, as do
    inf and nan; a finite value never becomes inf, the largest ones are rounded towards 0.
    Three temporaries of X's size: call it on a few rows at a time.
    """
    if X.dtype != torch.float32 or dtype != torch.bfloat16:
        raise ValueError(f"stochastic rounding from {X.dtype} to {dtype} is not supported: only float32 to bfloat16 is")
    noise = torch.randint(0, 2**16, X.shape, dtype=torch.int32, device=X.device, generator=generator)
    rounded = noise.add_(X.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
    most = torch.finfo(dtype).max
    return torch.where(X.isfinite(), rounded.clamp_(-most, most), X).to(dtype)
