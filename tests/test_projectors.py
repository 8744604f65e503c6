"""Geometry and basis finders: orthonormal and finite for every input, and as good as the exact SVD where it counts."""

from __future__ import annotations

import pytest
import torch

from subspan.optim.projectors import (
    NULL_TOLERANCE,
    SVD,
    Random,
    RandomizedSVD,
    SubspaceIteration,
    captured_energy,
    effective_rank,
    live_directions,
    orient,
    orthonormalize,
    overlap,
    pick_side,
    project,
    project_back,
    random_basis,
)

PROJECTORS = {
    "svd": SVD(),
    "randomized_svd": RandomizedSVD(),
    "subspace_iteration": SubspaceIteration(),
    "random": Random(),
}


@pytest.mark.parametrize(
    ("proj_type", "tall", "wide", "square"),
    [
        ("std", "right", "left", "right"),  # square counts as tall: what the reference code does
        ("reverse_std", "left", "right", "left"),
        ("left", "left", "left", "left"),
        ("right", "right", "right", "right"),
    ],
)
def test_side(proj_type, tall, wide, square):
    assert [pick_side(shape, proj_type) for shape in ((5, 3), (3, 5), (4, 4))] == [tall, wide, square]
    assert pick_side((7, 5, 3), proj_type) == tall  # leading dimensions are a batch


@pytest.mark.parametrize(
    ("proj_type", "message"), [("full", "use proj_type='std'"), ("standard", "is unknown"), (3, "3")]
)
def test_unknown_side_is_refused(proj_type, message):
    with pytest.raises(ValueError, match=message):
        pick_side((4, 3), proj_type)


def test_orient_is_its_own_inverse_and_a_view():
    X = torch.randn(2, 5, 3)
    for side in ("left", "right"):
        assert orient(orient(X, side), side).equal(X)
        assert orient(X, side).data_ptr() == X.data_ptr()


def test_effective_rank():
    assert [effective_rank(r, (9, 5, 3)) for r in (1, 3, 100)] == [1, 3, 3]


def test_projecting_back_and_forth_is_the_identity_inside_the_subspace():
    Q, U = random_basis((9, 4), seed=0), torch.randn(4, 6)
    torch.testing.assert_close(project(project_back(U, Q), Q), U)


def test_overlap_of_equal_and_of_orthogonal_subspaces():
    Q = random_basis((10, 6), seed=1)
    rotated = Q[:, :3] @ random_basis((3, 3), seed=2)
    assert overlap(Q[:, :3], rotated).item() == pytest.approx(1)
    assert overlap(Q[:, :3], Q[:, 3:]).item() == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------------- every input


def low_rank(m, n, rank):
    return torch.randn(m, rank) @ torch.randn(rank, n)


INPUTS = {
    "full rank": lambda: (torch.randn(12, 20), 5),
    "tall": lambda: (torch.randn(20, 12), 5),
    "zero": lambda: (torch.zeros(12, 20), 5),
    "rank 1": lambda: (low_rank(12, 20, 1), 5),
    "rank below r": lambda: (low_rank(20, 12, 3), 8),
    "row": lambda: (torch.randn(1, 7), 1),
    "column": lambda: (torch.randn(7, 1), 1),
    "full basis": lambda: (torch.randn(9, 9), 9),
    "tiny": lambda: (torch.randn(12, 20) * 1e-20, 5),
    "huge": lambda: (torch.randn(12, 20) * 1e17, 5),
    "one nonzero": lambda: (torch.zeros(12, 20).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(2.0)), 5),
    "batch": lambda: (torch.randn(3, 12, 20), 5),
    "batch with a zero": lambda: (torch.randn(3, 12, 20) * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1), 5),
    "bf16": lambda: (torch.randn(12, 20).bfloat16(), 5),
    "bf16 rank 2": lambda: (low_rank(12, 20, 2).bfloat16(), 5),
    "fp16 small": lambda: ((torch.randn(12, 20) * 1e-5).half(), 5),
    "fp64": lambda: (torch.randn(12, 20).double(), 5),
}


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", INPUTS)
def test_basis_is_orthonormal_and_finite(case, side, projector):
    torch.manual_seed(0)
    G, rank = INPUTS[case]()
    previous = None
    for refresh in range(3):  # cold, then warm
        Q = PROJECTORS[projector].basis(G, side, rank, previous, refresh)
        d = G.shape[-2] if side == "left" else G.shape[-1]
        assert Q.shape == (*G.shape[:-2], d, rank)
        assert Q.isfinite().all()
        eye = torch.eye(rank, dtype=Q.dtype).expand(*G.shape[:-2], rank, rank)
        torch.testing.assert_close(Q.mT @ Q, eye, atol=1e-5, rtol=0)
        previous = Q.to(G.dtype)


@pytest.mark.parametrize("case", ["rank 1", "rank below r", "one nonzero"])
@pytest.mark.parametrize("projector", ["svd", "randomized_svd", "subspace_iteration"])
def test_basis_holds_the_whole_gradient_when_its_rank_is_small(case, projector):
    torch.manual_seed(0)
    G, rank = INPUTS[case]()
    Q = PROJECTORS[projector].basis(G, "left", rank, None, 0)
    assert captured_energy(G, Q).item() == pytest.approx(1, abs=1e-5)


def test_qr_keeps_the_direction_of_its_columns():
    Y = torch.randn(9, 4)
    assert ((orthonormalize(Y).mT @ Y).diagonal() > 0).all()
    Q = orthonormalize(Y)
    torch.testing.assert_close(orthonormalize(Q), Q)  # a basis that did not move keeps its signs


# -------------------------------------------------------------------------------------------------- properties


def decaying(m, n, seed):
    """A gradient-like matrix with singular values 1, 1/2, 1/3, ..."""
    k = min(m, n)
    return random_basis((m, k), seed) / torch.arange(1, k + 1) @ random_basis((n, k), seed + 1).mT


@pytest.mark.parametrize("projector", ["randomized_svd", "subspace_iteration"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rank", [4, 16, 32])
def test_captured_energy_comes_close_to_the_exact_svd(projector, side, rank):
    G = decaying(64, 96, seed=0)
    exact = captured_energy(orient(G, side), SVD().basis(G, side, rank, None, 0))
    found = captured_energy(orient(G, side), PROJECTORS[projector].basis(G, side, rank, None, 0))
    assert found >= 0.99 * exact


def test_warm_subspace_iteration_follows_a_drifting_gradient():
    projector, previous = SubspaceIteration(), None
    step = torch.randn(64, 96, generator=torch.Generator().manual_seed(7)) * 0.002
    for refresh in range(5):
        G = decaying(64, 96, seed=0) + refresh * step
        previous = projector.basis(G, "left", 16, previous, refresh)
        exact = captured_energy(G, SVD().basis(G, "left", 16, None, 0))
        assert captured_energy(G, previous) >= 0.99 * exact


@pytest.mark.parametrize(("rank", "products"), [(8, 1), (7, 2)])
def test_warm_subspace_iteration_makes_two_products_below_an_eighth(rank, products):
    G, previous = decaying(64, 96, seed=0), random_basis((64, rank), seed=1)
    expected = SubspaceIteration(n_iter=products).basis(G, "left", rank, previous, 0)
    assert SubspaceIteration().basis(G, "left", rank, previous, 0).equal(expected)
    assert not SubspaceIteration(n_iter=3 - products).basis(G, "left", rank, previous, 0).equal(expected)


def test_subspace_iteration_leaves_a_converged_basis_where_it_is():
    G = decaying(32, 48, seed=3)
    exact = SVD().basis(G, "left", 6, None, 0)
    torch.testing.assert_close(SubspaceIteration().basis(G, "left", 6, exact, 0), exact, atol=1e-4, rtol=0)


def test_svd_projector_is_the_reference_decomposition():
    G = torch.randn(12, 20)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    assert SVD().basis(G, "left", 5, None, 0).equal(U[:, :5])
    assert SVD().basis(G, "right", 5, None, 0).equal(Vh[:5].mT)


def test_random_draws_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    G = torch.randn(12, 20)
    torch.set_rng_state(state)
    for projector in (Random(), RandomizedSVD(), SubspaceIteration()):
        first, again, other = (projector.basis(G, "left", 4, None, seed) for seed in (1, 1, 2))
        assert first.equal(again)
        assert not first.equal(other)
    assert torch.get_rng_state().equal(state)  # the global random state is untouched


@pytest.mark.parametrize("dtype", list(NULL_TOLERANCE))
def test_live_directions(dtype):
    norms = torch.tensor([1.0, 0.1 * NULL_TOLERANCE[dtype], 100 * NULL_TOLERANCE[dtype], 0.0], dtype=torch.float64)
    assert live_directions(norms, dtype).tolist() == [True, False, True, False]
    batch = torch.stack([norms, 1e-20 * norms, 0 * norms])  # every matrix has a largest row of its own
    assert live_directions(batch, dtype).sum(-1).tolist() == [2, 2, 0]
    for bad in (float("nan"), float("inf")):
        norms[2] = bad
        assert not live_directions(norms, dtype).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SubspaceIteration(n_iter=0), "n_iter=0"),
        (lambda: SubspaceIteration(cold_iter=0), "cold_iter=0"),
        (lambda: RandomizedSVD(oversample=-1), "oversample=-1"),
        (lambda: RandomizedSVD(n_iter=1.5), "n_iter=1.5"),
    ],
)
def test_bad_counts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
