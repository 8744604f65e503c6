"""Tensors that may lie on several processes (torch's DTensor), in code that is the same for those that do not.

torch.distributed.tensor is imported only where there is a DTensor: it takes a second.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_spread(X: Tensor) -> bool:
    """Whether X is a DTensor."""
    return hasattr(X, "placements")


def local(X: Any) -> Tensor:
    """The part of X on this process, in X's own memory; X itself if it lies on one."""
    here: Tensor = X.to_local() if is_spread(X) else X
    return here


def whole(X: Any) -> Tensor:
    """X, joined and summed from all processes."""
    full: Tensor = X.full_tensor() if is_spread(X) else X
    return full


def summed(X: Any) -> Tensor:
    """X, with those sums over processes done that a product left open; cut as it is."""
    done: Tensor = X
    if is_spread(X) and any(placement.is_partial() for placement in X.placements):
        from torch.distributed.tensor import Replicate

        done = X.redistribute(placements=[Replicate() if p.is_partial() else p for p in X.placements])
    return done


def settle_gradient(p: Any) -> None:
    """Place p.grad as p is: DTensor leaves the sum over processes open in the gradient of a parameter that they have copies of,
    and torch's optimizers do it."""
    G = p.grad
    if is_spread(p) and is_spread(G) and G.placements != p.placements:
        p.grad = G.redistribute(placements=p.placements)


def beside(X: Tensor, A: Any) -> Tensor:
    """X, equal on all processes, where A lies: one DTensor in a product wants another."""
    if not is_spread(A):
        return X
    from torch.distributed.tensor import DTensor, Replicate

    mesh = A.device_mesh
    return DTensor.from_local(X, mesh, [Replicate()] * mesh.ndim, run_check=False)


def placed_as(X: Any, Y: Any) -> Tensor:
    """Y, of the same shape, cut as X is."""
    if not is_spread(X):
        return whole(Y)
    if is_spread(Y) and Y.device_mesh == X.device_mesh:
        moved: Tensor = Y.redistribute(placements=X.placements)
        return moved
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole(Y), X.device_mesh, X.placements, src_data_rank=None)
