"""Norms of gradients by parts, and which rows of a low-rank gradient count."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.linalg import vector_norm

from subspan.optim.projectors import live_directions

if TYPE_CHECKING:
    from subspan.optim.shards import Shards


def parts_of(X: Tensor, dim: int, multiple: int = 1, compiled: bool = False) -> Iterator[tuple[int, int]]:
    """(start, length) of the parts along `dim` that X (1-d or more) is worked through in; starts are multiples of `multiple`.
    compiled: a part has no temporaries but its result, so that fewer and larger ones take no more memory."""
    whole = X.shape[dim]
    largest = 2**18 if X.device.type == "cpu" else 2**24 if compiled else 2**22
    most = largest * whole // max(X.numel(), 1)
    length = max(most // multiple * multiple, multiple)
    for start in range(0, whole, length):
        yield start, min(length, whole - start)


def gauge(
    R: Tensor, projected: bool, mask_null: bool | torch.dtype, shards: Shards | None = None
) -> tuple[Tensor, Tensor]:
    """The norm of R, 0-d, and what of R counts, a bool tensor that broadcasts to R; the rest counts as zero.

    Nothing counts if the norm is not finite; of a low-rank gradient (..., r, k) the rows of rounding noise do not
    (`live_directions`, with mask_null). R stays as it is. No host sync. shards: R is a part, and both are of the whole.
    """
    if not (projected and mask_null):
        norm = norm_of(R) if shards is None else shards.norm(norm_of(R))
        return norm, norm < math.inf
    rows = row_norms(R)
    if shards is not None and shards.axis != "batch":
        rows = shards.norm(rows)
    norm = vector_norm(rows)
    if shards is not None and shards.axis == "batch":
        norm = shards.norm(norm)
    dtype = mask_null if isinstance(mask_null, torch.dtype) else R.dtype
    return norm, (live_directions(rows, dtype) & (norm < math.inf)).unsqueeze(-1)


def row_norms(R: Tensor) -> Tensor:
    """Euclidean norms of the rows of R (..., r, k): (..., r), in fp32 or wider."""
    parts, dtype = list(parts_of(R, -1)), torch.promote_types(R.dtype, torch.float32)
    turned = R.stride(-1) != 1  # it lies as (k, r): torch's norm along k then takes ten times as long
    whole: Tensor
    if len(parts) == 1 and not turned:
        whole = vector_norm(R, dim=-1, dtype=dtype)
        return whole
    norms = R.new_empty((len(parts), *R.shape[:-1]), dtype=dtype)
    for (start, length), norm in zip(parts, norms, strict=True):
        part = R.narrow(-1, start, length)
        if turned:
            torch.sum(part.to(dtype).square(), -1, out=norm)
        else:
            vector_norm(part, dim=-1, dtype=dtype, out=norm)
    whole = norms.sum(0).sqrt_() if turned else vector_norm(norms, dim=0)
    return whole


def norm_of(X: Tensor) -> Tensor:
    """Euclidean norm of all elements, 0-d, in fp32 or wider."""
    dtype = torch.promote_types(X.dtype, torch.float32)
    if X.dtype == dtype or X.ndim == 0:
        whole: Tensor = vector_norm(X, dtype=dtype)
        return whole
    # On the CPU torch makes a copy of `dtype` first: of a part at a time. A result of its own for each part would settle in the
    # hole that the copy before it left, so that no copy finds room in it: 0.5 GiB of holes for an embedding of 7B.
    parts = list(parts_of(X, 0))
    norms = X.new_empty(len(parts), dtype=dtype)
    for (start, length), norm in zip(parts, norms, strict=True):
        vector_norm(X.narrow(0, start, length), dtype=dtype, out=norm)
    total: Tensor = vector_norm(norms)
    return total
