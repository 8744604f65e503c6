"""Parameters that lie on several processes, as FSDP2's DTensors do: which part is here, and what of an update crosses processes.

Seen as A (d, k) (projectors.py), a sharded matrix is cut along one of

    k       the axis that the basis is not on: R, moments and update are local, and only a refresh sums, (d, r) at a time
    d       the axis of the basis: R = Q^T A is summed in every step, lies here by columns, and U is gathered for the update
    batch   whole matrices of a batch, basis and all: everything is local
    rows    the first dimension of a dense parameter: everything is local

Norms are sums over processes everywhere. Muon's products are shared out (rules.py); another rule that sees a whole matrix
(Adafactor, ColumnNorm) gets it gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from subspan.optim.copies import largest
from subspan.optim.dtensors import local
from subspan.optim.groups import matrix_shape
from subspan.optim.projectors import Side, pick_side
from subspan.optim.quant import SIGNED, State, Store

Axis = Literal["k", "d", "batch", "rows"]


@dataclass(frozen=True)
class Shards:
    """How one parameter is cut.

    mesh: the processes that have a part or a copy of it. dim: the dimension of the mesh whose processes have parts.
    size: of the parameter's dimension that is cut. rows, columns: d and k of A; 0 for a dense parameter.
    """

    mesh: DeviceMesh
    dim: int
    axis: Axis
    size: int
    rows: int
    columns: int

    @property
    def index(self) -> int:
        """The number of this process' part."""
        return self.mesh.get_local_rank(self.dim)

    def mine(self, size: int) -> tuple[int, int]:
        """(start, length) of this process' part of an axis of `size`, cut as torch.chunk and DTensor do."""
        lengths = self._lengths(size)
        return sum(lengths[: self.index]), lengths[self.index]

    def _lengths(self, size: int) -> list[int]:
        """Of the parts of all processes."""
        count = self.mesh.size(self.dim)
        length = -(-size // count)
        return [max(0, min(length, size - i * length)) for i in range(count)]

    def norm(self, norms: Tensor) -> Tensor:
        """Norms of the whole, from norms of the parts."""
        squares = norms.double().square_()  # in fp32 they would overflow before the norm does
        dist.all_reduce(squares, group=self.mesh.get_group(self.dim))
        return squares.sqrt_().to(norms.dtype)

    def init(self, store: Store, moments: State, device: torch.device) -> State:
        """`store.init` for this process: of `moments`, of the whole parameter and on the meta device, those that are cut as it is
        become parts of a tensor of all."""
        state: State = {}
        for key, X in store.init(moments, "meta").items():
            shape = list(X.shape)
            name, _, coded = key.partition(".")
            if name in SIGNED:
                dim = 0 if self.axis in ("rows", "batch") else X.ndim - (2 if coded else 1)
                shape[dim] = self.mine(X.shape[dim])[1]
            state[key] = torch.zeros(shape, dtype=X.dtype, device=device)
            if name in SIGNED:
                state[key] = self.join(state[key], dim, X.shape[dim])
        return state

    def mean(self, X: Tensor, of: Tensor) -> Tensor:
        """The mean of X (b,) over the matrices of a batch for which `of` (b,), bool, is True; there is one."""
        sums = torch.stack([X[of].sum(), of.sum().to(X.dtype)])
        dist.all_reduce(sums, group=self.mesh.get_group(self.dim))
        return sums[0] / sums[1]

    def mine_of(self, Q: Tensor) -> Tensor:
        """Rows of a basis Q (..., d, r) that belong to this process' rows of A."""
        return Q.narrow(-2, *self.mine(self.rows))

    def max(self, X: Tensor) -> Tensor:
        """The largest of a number (0-d) of every process with a part; inf for nan."""
        return largest(X, self.mesh.get_group(self.dim))

    def max_everywhere(self, X: Tensor) -> Tensor:
        """The same of every process with a part or a copy."""
        for dim in range(self.mesh.ndim):
            X = largest(X, self.mesh.get_group(dim))
        return X

    def sum(self, X: Tensor) -> Tensor:
        """The sum of X over processes, in place."""
        dist.all_reduce(X, group=self.mesh.get_group(self.dim))
        return X

    # R, U and moments are cut by columns, or as a dense parameter or a batch is.

    def matrix(self, X: Tensor) -> tuple[int, int, int | None]:
        """m, n of the matrices of which X, like R, has parts, and which of the two is cut, 0 or 1; None: X has whole ones."""
        m, n = X.shape[-2:]
        if self.axis in ("k", "d"):
            return m, self.columns, 1
        return (self.size, n, 0) if X.ndim == 2 else (m, n, None)

    def turn(self, X: Tensor, dim: int, size: int) -> Tensor:
        """Parts along the other dimension of a matrix of which X is this process' part along `dim`, where it is `size` long."""
        given, taken = self._lengths(X.shape[1 - dim]), self._lengths(size)
        own = given[self.index]
        pieces = [piece.flatten() for piece in torch.split(X, given, 1 - dim)]
        counts = [own * length for length in taken]
        flat = X.new_empty(sum(counts))
        group = self.mesh.get_group(self.dim)
        dist.all_to_all_single(flat, torch.cat(pieces), counts, [piece.numel() for piece in pieces], group=group)
        shapes = [(length, own) if dim == 0 else (own, length) for length in taken]
        return torch.cat(
            [piece.view(shape) for piece, shape in zip(torch.split(flat, counts), shapes, strict=True)], dim
        )

    def part(self, X: Tensor) -> Tensor:
        """This process' part of an X like R (..., r, k), or of a vector of its k columns: a view."""
        dim, size = self._cut(X)
        return X.narrow(dim, *self.mine(size))

    def gather(self, X: Tensor) -> Tensor:
        """The whole of which X is this process' part."""
        dim, size = self._cut(X)
        return self.join(X, dim, size, self._line()).full_tensor()

    def reduce(self, X: Tensor) -> Tensor:
        """This process' part of the sum of X over processes."""
        total = DTensor.from_local(X, self._line(), [Partial()], run_check=False)
        return local(total.redistribute(placements=[Shard(self._cut(X)[0])]))

    def join(self, X: Tensor, dim: int, size: int, mesh: DeviceMesh | None = None) -> DTensor:
        """X as this process' part, along `dim`, of a tensor that is `size` long there: no copy, and what checkpoints reshard."""
        placements: list[Placement] = [Shard(dim)]
        if mesh is None:
            mesh, placements = self.mesh, [Replicate()] * self.mesh.ndim
            placements[self.dim] = Shard(dim)
        shape = torch.Size((*X.shape[:dim], size, *X.shape[dim + 1 :]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(X.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride)

    def _cut(self, X: Tensor) -> tuple[int, int]:
        return (0, self.size) if self.axis in ("rows", "batch") else (X.ndim - 1, self.columns)

    def _line(self) -> DeviceMesh:
        """The processes that have the other parts of this copy."""
        if self.mesh.ndim == 1:
            return self.mesh
        assert self.mesh.mesh_dim_names is not None
        return self.mesh[self.mesh.mesh_dim_names[self.dim]]


def shard_along(groups: Iterable[dict[str, Any]], count: int) -> Callable[[nn.Parameter], Shard | None]:
    """For fully_shard's `shard_placement_fn`: cut projected parameters along k, so that only refreshes communicate.

    groups: those of the model before it is sharded, as `param_groups` makes them; make them anew for the optimizer, since
        fully_shard replaces parameters. count: parts, the size of the mesh's shard dimension.

    fully_shard cuts evenly along all dimensions but the first. Where k is another and `count` does not divide it, d is cut.
    """
    dims: dict[Tensor, int] = {}
    for group in groups:
        for p in (item[1] if isinstance(item, tuple) else item for item in group["params"]):
            if "rank" in group and group.get("view", "matrix") == "matrix" and p.ndim == 2:
                k = 1 if pick_side(p.shape, group.get("proj_type", "std")) == "left" else 0
                dims[p] = k if p.shape[k] % count == 0 else 0

    def placement(p: nn.Parameter) -> Shard | None:
        return Shard(dims[p]) if p in dims else None

    return placement


def shards_of(p: Tensor, group: dict[str, Any], side: Side | None) -> Shards | None:
    """How p lies on several processes; None if it lies whole on each. side: of its basis, None if it is dense."""
    if not isinstance(p, DTensor):
        return None
    cuts = [(dim, placement) for dim, placement in enumerate(p.placements) if not isinstance(placement, Replicate)]
    if not cuts:
        return None
    dim, placement = cuts[0]
    if len(cuts) > 1 or type(placement) is not Shard:
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is placed as {p.placements}: only one Shard, as fully_shard makes it, and "
            "copies of it are supported"
        )
    view = group.get("view", "matrix")
    if (view == "batch" and p.ndim > 3) or (view == "conv" and placement.dim != 0 and side is not None):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} with view={view!r} is sharded along dimension {placement.dim}, which cuts "
            "its matrices in no regular way: shard along dimension 0, with at most three dimensions for view='batch'"
        )
    if side is None:
        if placement.dim != 0:
            raise ValueError(
                f"a parameter without a rank, of shape {tuple(p.shape)}, is sharded along dimension {placement.dim}: let "
                "fully_shard's shard_placement_fn return Shard(0) or None for it"
            )
        return Shards(p.device_mesh, dim, "rows", p.shape[0], 0, 0)
    along = 0 if view == "conv" else placement.dim - (p.ndim - 2)  # -1: the batch, 0: m, 1: n
    m, n = matrix_shape(p.shape, group)[-2:]
    axis: Axis = "batch" if along < 0 else "d" if (along == 0) == (side == "left") else "k"
    return Shards(p.device_mesh, dim, axis, p.shape[placement.dim], *((m, n) if side == "left" else (n, m)))
