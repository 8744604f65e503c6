"""The orthogonal matrix nearest to a given one, about: what Muon's steps are made of."""

from __future__ import annotations

import torch
from torch import Tensor

A, B, C = 3.4445, -4.775, 2.0315  # of Keller Jordan's Muon, and torch.optim.Muon


def orthogonalize(X: Tensor) -> Tensor:
    """U V^T of X = U S V^T (..., m, n), its singular values only near 1 (0.7 to 1.2, unless they are tiny beside the largest).

    Five steps of Newton and Schulz' iteration X <- a X + (b X X^T + c (X X^T)^2) X from X / ||X||, in X's dtype: products of m, n
    and min(m, n), no decomposition. A zero matrix stays zero.
    """
    m, n = X.shape[-2:]
    X = X if m <= n else X.mT
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        G = X @ X.mT
        X = A * X + (B * G + C * G @ G) @ X
    return X if m <= n else X.mT
