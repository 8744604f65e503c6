"""Code books: the values that codes stand for, and the nearest code of a value.

`code_book`, all fp32:

    8 bits             dynamic tree quantization of arXiv 2110.02861: the books of bitsandbytes, and its codes except that an
                       unsigned value above 0 is never stored as 0
    4 bits, signed     0, and 7 negative and 8 positive values evenly spaced in the logarithm from 10^-1.75 to 1
    4 bits, unsigned   16 values evenly spaced in the logarithm from 10^-4 to 1, no 0
    4 bits, basis      16 values with the least mean squared error for a Gaussian over its block's largest (Lloyd-Max)

The zero of a second moment v is a trap (the zero-point problem of arXiv 2309.01507): a v that is small beside its block becomes
0, and the step m / (sqrt(v) + eps) grows by orders of magnitude. Raised to the smallest code it makes the step smaller instead.

The 4-bit books were chosen by measurement (docs/LOG.md): a block of a low-rank moment mixes strong and weak directions, so its
values span four decades and more, and an even book has most of them at its lowest entry. A basis has no such spread.

Each look-up is written twice. Eager it reads tables, few operations over memory; compiled it is arithmetic, which a compiler
turns into vector instructions, as it cannot do with reads all over a table. Both give the nearest code; the values of 8-bit
codes agree to 1e-6.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Bits = Literal[4, 8]

BASIS_BOOK = (0.0445, 0.1347, 0.2281, 0.3272, 0.4365, 0.5612, 0.7145, 0.9249)
"""Positive half of the basis's code book: Lloyd-Max for x / max |x| over blocks of 128 Gaussians. A random basis then has a
relative error of 0.092; 16 even steps from smallest to largest (Q-GaLore, arXiv 2407.08296) leave 0.100 and need two scales."""

DECADES = 7
"""Of an 8-bit book: (10^(i-7), 10^(i-6)] for i = 0..6, with 2^i (signed) or 2^(i+1) values each."""


def code_book(bits: Bits, signed: bool) -> Tensor:
    """The values that codes 0, 1, ... stand for: (2^bits,) fp32, CPU, ascending, the largest 1."""
    return _book(book_name(bits, signed))


def book_name(bits: int, signed: bool) -> str:
    """Of the book of moments; "basis" is the one of bases."""
    # Comparisons: torch.compile makes a symbol of an int that it has seen change, and a string has no room for one.
    return ("8" if bits == 8 else "4") + (" signed" if signed else " unsigned")


def bits_of(name: str) -> int:
    """8, or 4 for two codes a byte."""
    return 8 if name.startswith("8") else 4


def values_of(codes: Tensor, name: str) -> Tensor:
    """What uint8 `codes` (..., n) stand for: (..., n) fp32; (..., 2n) of a 4-bit book, the lower half of a byte first."""
    if not torch.compiler.is_compiling():
        values = _tables(name, codes.device).values
        return values.index_select(0, codes.flatten().int()).view(
            *codes.shape[:-1], codes.shape[-1] * 8 // bits_of(name)
        )
    c = codes.int()
    if bits_of(name) == 8:
        return _dynamic_value(c, name)
    c = torch.stack((c & 15, c >> 4), -1).flatten(-2)
    book = _constants(name).book
    X = torch.full_like(c, book[0], dtype=torch.float32)
    for code, value in enumerate(book[1:], 1):
        X = torch.where(c >= code, value, X)
    return X


def nearest_codes(Z: Tensor, name: str) -> Tensor:
    """int32 codes of Z, contiguous fp32 of any shape in [-1, 1]: the nearest one, the lower of two equally near."""
    if torch.compiler.is_compiling():
        if bits_of(name) == 8:
            return _dynamic_code(Z, name)
        return sum(((limit < Z).int() for limit in _constants(name).limits), torch.zeros_like(Z, dtype=torch.int32))
    # Two look-ups by the upper half of Z's bits and one comparison: ten times as fast on a CPU as torch.bucketize, whose binary
    # search a processor cannot predict.
    tables = _tables(name, Z.device)
    cells = (Z.view(torch.int32) >> 16).add_(2**15).flatten()
    codes = tables.first.index_select(0, cells)
    return codes.add_(Z.flatten() > tables.limit.index_select(0, cells)).view(Z.shape)


# ------------------------------------------------------------------------------------------------------- books


def _book(name: str) -> Tensor:
    if name == "basis":
        positive = torch.tensor(BASIS_BOOK, dtype=torch.float32, device="cpu")
        return torch.cat((-positive.flip(0), positive))
    if name == "4 signed":
        negative, positive = _log_book(-1.75, 7), _log_book(-1.75, 8)
        return torch.cat((-negative.flip(0), negative.new_zeros(1), positive))
    return _log_book(-4.0, 16) if name == "4 unsigned" else _dynamic_book(signed=name == "8 signed")


def _dynamic_book(signed: bool) -> Tensor:
    """0, 1, and for each decade the midpoints of its equal cells between its upper nine tenths' ends: small values keep their
    exponent, large ones their digits (arXiv 2110.02861, section 1.3)."""
    parts = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for i in range(DECADES):
        cells = 2 ** (i if signed else i + 1)
        edges = torch.linspace(0.1, 1.0, cells + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        parts += [middles, -middles] if signed else [middles]
    return torch.cat(parts).sort().values


def _log_book(lowest: float, count: int) -> Tensor:
    """10^lowest, ..., 1: `count` values of constant ratio."""
    exponents = torch.linspace(lowest, 0.0, count, dtype=torch.float64, device="cpu")
    return (10.0**exponents).float()


def _limits(book: Tensor) -> Tensor:
    """The largest fp32 number that each code but the last is nearest to."""
    middles = (book[:-1].double() + book[1:].double()) / 2
    limits = middles.float()
    # Rounded down: of the numbers that fp32 has, those above are then nearer to the upper code, none is misjudged.
    return torch.where(limits > middles, limits.nextafter(limits - 1), limits)


# ------------------------------------------------------------------------------------------------ eager: tables


@dataclass(frozen=True)
class _Tables:
    """A code book made ready for look-up, on one device.

    values: (256,) fp32, or (256, 2) of a 4-bit book: what one byte decodes to.
    first: (65536,) int32. fp32 numbers that agree in their upper 16 bits lie within 2^-7 of each other, so that at most
        one of them borders on the next code. `first` is the code of the lowest of them, and
    limit: (65536,) fp32, the largest number that still has it.
    """

    values: Tensor
    first: Tensor
    limit: Tensor


@functools.cache
def _tables(name: str, device: torch.device) -> _Tables:
    book = _book(name)
    limits = _limits(book)
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cpu") << 16
    lowest = torch.stack((upper, upper | 0xFFFF)).view(torch.float32).amin(0)  # negative numbers descend
    first = torch.bucketize(lowest, limits, out_int32=True)
    limit = torch.cat((limits, limits.new_full((1,), torch.inf)))[first]
    byte = torch.arange(256, device="cpu")
    values = book if bits_of(name) == 8 else book[torch.stack((byte & 15, byte >> 4), -1)]
    return _Tables(values.to(device), first.to(device), limit.to(device))


# ---------------------------------------------------------------------------------------- compiled: arithmetic


@dataclass(frozen=True)
class _Constants:
    """A book and its limits as numbers; of an 8-bit one also the limits between 0 and the lowest decade, between decades, and
    between the highest decade and 1, among positive values: DECADES + 1 of them."""

    book: tuple[float, ...]
    limits: tuple[float, ...]
    between: tuple[float, ...] = ()


@functools.cache
def _build_constants(name: str) -> _Constants:
    book = _book(name)
    limits = _limits(book)
    between: tuple[float, ...] = ()
    if bits_of(name) == 8:
        zero, first = (127, 1) if name == "8 signed" else (0, 2)
        places = [zero + (first * 2**i - first) for i in range(DECADES + 1)]
        between = tuple(limits[places].tolist())
    return _Constants(tuple(book.tolist()), tuple(limits.tolist()), between)


def _constants(name: str) -> _Constants:
    return _build_constants(name)


# What torch.compiler.assume_constant_result does: that decorator would import all of torch.compile with the library.
_constants._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _dynamic_value(c: Tensor, name: str) -> Tensor:
    """In decade i with s cells, place f = 0..s-1 has the value (0.1 + 0.9 (f + 1/2) / s) 10^(i-6). Counted from the lowest
    decade, f + s are the codes of positive values, or those plus 1 if there is no sign."""
    signed = name == "8 signed"
    place = (c - 127).abs() if signed else c + 1
    first = 1 if signed else 2
    size, unit = torch.full_like(c, 1 / first, dtype=torch.float32), torch.full_like(c, 1e-6, dtype=torch.float32)
    for i in range(1, DECADES):
        above = place >= first * 2**i
        size = torch.where(above, 1 / (first * 2**i), size)
        unit = torch.where(above, 10.0 ** (i - 6), unit)
    X = (0.9 * ((place.float() + 0.5) * size - 1) + 0.1) * unit
    X = torch.where(place >= first * 2**DECADES, 1.0, X)
    X = torch.where(place < first, 0.0, X)
    return torch.where(c < 127, -X, X) if signed else X


def _dynamic_code(Z: Tensor, name: str) -> Tensor:
    """The other way round; rounding may take a value within 1e-6 of the middle of two to the farther one."""
    signed = name == "8 signed"
    first = 1 if signed else 2
    zero, *between, one = _constants(name).between
    a = Z.abs() if signed else Z
    cells, scale = torch.full_like(a, first), torch.full_like(a, 1e6)
    for i, limit in enumerate(between, 1):
        above = a > limit
        cells = torch.where(above, float(first * 2**i), cells)
        scale = torch.where(above, 10.0 ** (6 - i), scale)
    inside = ((a * scale - 0.1) * (cells / 0.9)).floor().maximum(torch.zeros_like(a)).minimum(cells - 1)
    place = cells + inside
    place = torch.where(a > one, float(first * 2**DECADES), place)
    place = torch.where(a > zero, place, float(first - 1))
    if not signed:
        return (place - 1).int()
    return 127 + torch.where(Z < 0, -place.clamp(max=127.0), place).int()  # there is no -1
