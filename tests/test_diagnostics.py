"""Diagnostics say of refreshes what an independent computation says, change nothing, and get into the log and a figure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import tiny_config
from torch import nn

import subspan
from subspan.cli import main
from subspan.diagnostics import FIELDS, Diagnostics
from subspan.optim import quant
from subspan.optim.projectors import orient, pick_side
from subspan.report.figures import draw_refreshes
from subspan.training.trainer import train


def drawn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def watched(shape=(24, 40), gradients="hold", steps=5, watch=True, **options):
    """The weight, and all rows, of steps with a refresh every second one."""
    model = nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        model.weight.copy_(drawn(shape, 0))
    group = {"params": [model.weight], "rank": 6, "update_proj_gap": 2, "weight_decay": 0.1}
    optimizer = subspan.ProjectedOptimizer([group], 0.05, gradients=gradients, **options)
    diagnostics, rows = Diagnostics(optimizer, model), []
    for step in range(steps):
        before = optimizer.basis(model.weight).clone(), model.weight.detach().clone()
        G = drawn(shape, step + 1) + 3 * drawn((shape[0], 1), step + 1) * drawn((1, shape[1]), step + 1)
        (model.weight * G).sum().backward()
        if watch:
            diagnostics.before()
        optimizer.step()
        found = diagnostics.after() if watch else []
        optimizer.zero_grad()
        rows += [
            (row, G, *before, optimizer.basis(model.weight).clone(), model.weight.detach().clone()) for row in found
        ]
    return model.weight.detach(), rows, optimizer


@pytest.mark.parametrize("gradients", ["hold", "project"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_every_number(shape, gradients):
    _, rows, _ = watched(shape, gradients)
    assert len(rows) == 3
    for row, G, old, _, new, _ in rows:
        A = orient(G, pick_side(shape)).double()
        old, new = old.double(), new.double()
        angles = torch.rad2deg(torch.linalg.svdvals(new.mT @ old).clamp(max=1).acos())
        energy = A.square().sum()
        expected = {
            "stale": (old.mT @ A).square().sum() / energy,
            "captured": (new.mT @ A).square().sum() / energy,
            "overlap": (new.mT @ old).square().sum() / 6,
            "median_angle": angles.median(),
            "largest_angle": angles.max(),
            "stable_rank": energy / torch.linalg.matrix_norm(A, 2).square(),
        }
        assert row["name"] == "weight"
        for field, value in expected.items():
            assert row[field] == pytest.approx(float(value), rel=0.02 if field == "stable_rank" else 1e-3), field
        assert 1 <= row["moment_stable_rank"] <= 6
        assert "outside" not in row


def test_the_share_of_an_update_outside_of_the_subspace():
    """Fira with the gradient as direction moves by the gradient: outside is what the new basis does not capture."""
    _, rows, _ = watched(rule=subspan.SGDMomentum(momentum=0.0), combine=subspan.Fira(limit=None))
    for row, *_ in rows:
        assert row["outside"] == pytest.approx(1 - row["captured"], abs=1e-3)
    inside, _, _ = watched(rule=subspan.Adam(), combine=subspan.Frugal(0.0))
    assert inside.isfinite().all()
    assert all(row["outside"] < 1e-3 for row, *_ in watched(combine=subspan.Frugal(0.0))[1])


def test_what_storing_changes_grows_as_bits_go(monkeypatch):
    monkeypatch.setattr(quant, "MIN_ELEMENTS", 0)

    def errors(field, **options):
        return [row.get(field) for row, *_ in watched(**options)[1]]

    assert errors("state_error") == [None] * 3  # fp32 loses nothing
    low = {dtype: errors("state_error", state_dtype=dtype) for dtype in (torch.bfloat16, torch.int8, torch.int4)}
    for bf16, int8, int4 in zip(*low.values(), strict=True):
        assert 1e-4 < bf16 < 0.004 < int8 < 0.04 < int4 < 0.4
    assert all(error < 1e-5 for error in errors("basis_error"))
    assert all(0.02 < error < 0.2 for error in errors("basis_error", basis_dtype=torch.int4))


@pytest.mark.parametrize(("bits", "max_grad_norm"), [(8, None), (4, 1.0)])
def test_the_error_of_storing_by_hand(monkeypatch, bits, max_grad_norm):
    monkeypatch.setattr(quant, "MIN_ELEMENTS", 0)
    dtype = {8: torch.int8, 4: torch.int4}[bits]
    _, rows, optimizer = watched(rule=subspan.Adam((0.8, 0.9), 1e-3), state_dtype=dtype, max_grad_norm=max_grad_norm)
    row, G, _, _, Q, _ = rows[-1]  # after the last of five steps
    R = Q.mT @ G
    R = R if max_grad_norm is None else R / R.norm()

    def stored(X, signed):
        """As it lies: (k, r)."""
        return quant.dequantize(*quant.quantize(X.mT, bits, signed, 128), bits, signed, 128, 6).mT

    (p,) = optimizer.state
    m, v = (
        optimizer.memory(optimizer.group_of(p))[1].read(optimizer.state[p], key, R.shape)
        for key in ("exp_avg", "exp_avg_sq")
    )
    m, v = 0.8 * m + 0.2 * R, 0.9 * v + 0.1 * R**2  # step 6
    directions = []
    for m6, v6 in ((m, v), (stored(m, True), stored(v, False))):
        m7, v7 = 0.8 * m6 + 0.2 * R, 0.9 * v6 + 0.1 * R**2
        directions.append(m7 / (1 - 0.8**7) / ((v7 / (1 - 0.9**7)).sqrt() + 1e-3))
    U, changed = directions
    assert row["state_error"] == pytest.approx(float((changed - U).norm() / U.norm()), rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"gradients": "project"}, {"state_dtype": torch.int8}], ids=str)
def test_watching_changes_nothing(options, monkeypatch):
    monkeypatch.setattr(quant, "MIN_ELEMENTS", 0)
    assert watched(**options)[0].equal(watched(**options, watch=False)[0])


def test_a_refresh_that_finds_no_basis_has_no_row():
    model = nn.Linear(8, 8, bias=False)
    optimizer = subspan.GaLoreAdamW([{"params": [model.weight], "rank": 2}])
    diagnostics = Diagnostics(optimizer, model)
    model.weight.grad = torch.zeros(8, 8)
    diagnostics.before()
    optimizer.step()
    assert diagnostics.after() == []


def test_experts_without_tokens_are_left_out():
    """A row of a stack with an idle expert is that of the others alone."""
    rows = []
    for experts in (2, 3):
        model = nn.Module()
        model.stack = nn.Parameter(drawn((3, 24, 40), 0)[:experts].clone())
        group = {"params": [model.stack], "rank": 6, "update_proj_gap": 1, "view": "batch"}
        optimizer = subspan.GaLoreAdamW([group], projector=subspan.SVD(), state_dtype=torch.bfloat16)
        diagnostics = Diagnostics(optimizer, model)
        for step in range(2):
            model.stack.grad = drawn((3, 24, 40), step + 1)[:experts].clone()
            model.stack.grad[2:] = 0
            diagnostics.before()
            optimizer.step()
            (row,) = diagnostics.after()
        rows.append(row)
    assert rows[0].keys() == rows[1].keys()
    assert {key: value for key, value in rows[1].items() if key != "name"} == pytest.approx(
        {key: value for key, value in rows[0].items() if key != "name"}, rel=1e-3
    )


def test_update_mode_is_refused():
    model = nn.Linear(8, 8)
    optimizer = subspan.GaLoreAdamW([{"params": [model.weight], "rank": 2}], gradients="update")
    with pytest.raises(ValueError, match="gradients='update' leaves none: use gradients='project' or 'hold'"):
        Diagnostics(optimizer, model)


def test_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    config = tiny_config(tmp_path, optim={"update_proj_gap": 4}, run={"diagnostics": True, "export": False, "steps": 9})
    train(config)
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "refreshes" in line]
    rows = [row for line in found for row in line["refreshes"]]
    assert {line["step"] for line in found} <= set(range(1, 10))
    assert rows
    for row in rows:
        assert row.keys() <= {"name", *FIELDS}
        assert row["stale"] <= row["captured"] + 1e-3 <= 1 + 2e-3
        assert all(math.isfinite(value) for key, value in row.items() if key != "name")
    main(["report", str(run), "--figure", str(run / "refreshes.png")])
    assert (run / "refreshes.png").stat().st_size > 10_000
    assert str(run / "refreshes.png") in capsys.readouterr().out


def test_a_run_without_diagnostics_cannot_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n7\n')
    with pytest.raises(ValueError, match=r"says nothing of refreshes: train with --run.diagnostics true"):
        draw_refreshes(tmp_path, tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"is no run folder"):
        draw_refreshes(tmp_path / "none", tmp_path / "x.png")


@pytest.mark.parametrize("optim", [{"gradients": "update"}, {"preset": "adamw"}])
def test_runs_without_refreshes_or_gradients_are_refused(tmp_path: Path, optim: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"run\.diagnostics=true reads gradients at refreshes"):
        tiny_config(tmp_path, optim=optim, run={"diagnostics": True})
