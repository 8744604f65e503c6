"""How fast the subspace drifts, how much of that is sampling noise, and what a stale basis costs, in energy and in loss.

    python reproductions/drift/run.py 'TEXT/train/*.txt' TEXT/valid.txt

1. Rows: model and setting of benchmarks/quality with GaLore at several T, with bases that are kept, and with random ones;
   `run.diagnostics` writes what every refresh finds.
2. Probes: one run at T = 100, in which training halts at PROBES and takes the gradients of 16 fresh batches at the weights of
   that step. A basis comes from one batch, so part of the angle between two successive bases is the noise of two batches: bases
   of two batches at one and the same step say how much.

Every run leaves results/KEY.json beside this file; what is there is not run again, so an interrupted script goes on where it was,
and two processes may share the parts (--parts). `table.py` makes tables and a figure of it.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan.optim.groups import default_targets
from subspan.optim.optimizer import ProjectedOptimizer
from subspan.optim.projectors import SVD, captured_energy, orient, overlap, pick_side, random_basis
from subspan.training.config import TrainConfig
from subspan.training.data import make_loader
from subspan.training.text import load_data
from subspan.training.trainer import train

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))
from grid import once
from methods import DENSE_RATE, GAP, Method, compiled, configure

HERE = Path(__file__).parent
RESULTS = HERE / "results"

RATE = 0.01  # of matrices, GaLore's best there
NEVER = 10**9  # T of a basis that is kept
ROWS: dict[
    str, dict[str, Any]
] = {  # settings of the optimizer; a name says what is done; kept_101: refreshed at steps 1 and 101 alone
    "T10": {"update_proj_gap": 10},
    "T25": {"update_proj_gap": 25},
    "T50": {"update_proj_gap": 50},
    "T100": {"update_proj_gap": GAP},
    "T200": {"update_proj_gap": 200},
    "kept_101": {"update_proj_gap": GAP},
    "kept_1": {"update_proj_gap": NEVER},
    "random_T25": {"update_proj_gap": 25, "projector": "random"},
    "random_T100": {"update_proj_gap": 100, "projector": "random"},
    "random_kept": {"update_proj_gap": NEVER, "projector": "random"},
}
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FIELDS = ("stale", "captured", "overlap", "median_angle", "stable_rank")

PROBES = (100, 125, 150, 200, 300, 500, 525, 550, 600, 700)  # steps; lags 25, 50, 100, 200, 400 after two of them
FRESH = 16  # batches of a probe: two halves, A and B


def kind_of(name: str) -> str:
    return name.split(".")[-2]


def medians(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> dict[str, float]:
    return {key: float(f"{statistics.median(row[key] for row in rows):.4g}") for key in keys}


# --------------------------------------------------------------------------------------------------------- rows


def row_run(name: str, config: TrainConfig) -> dict[str, Any]:
    """Train, and take from the metrics the medians over the layers of every refresh, kind by kind."""

    def builder(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        optimizer = compiled(model, config)
        if name == "kept_101":

            def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
                for group in optimizer.param_groups:
                    if "rank" in group and all(optimizer.state[p]["refreshes"] > 1 for p in group["params"]):
                        group["update_proj_gap"] = NEVER

            optimizer.register_step_post_hook(keep)
        return optimizer

    summary = train(config, builder)
    lines = [json.loads(line) for line in (Path(config.run.out) / "metrics.jsonl").read_text().splitlines()]
    refreshes = [
        {
            "step": line["step"],
            "kind": kind,
            **medians([row for row in line["refreshes"] if kind_of(row["name"]) == kind], FIELDS),
        }
        for line in lines
        if "refreshes" in line
        for kind in KINDS
    ]
    kept = ("valid_loss", "tokens", "seconds", "refresh_seconds", "versions")
    setting = {"lr": config.optim.lr, "dense_lr": config.optim.dense_lr, "seed": config.run.seed}
    return {"row": name, **setting, **{key: summary[key] for key in kept}, "refreshes": refreshes}


# ------------------------------------------------------------------------------------------------------- probes


@dataclasses.dataclass
class Probe:
    """What one matrix has at one step: bases of a batch and of the mean gradient of each half, and that of half B itself."""

    one: Tensor  # (d, r), from a batch of half A
    other: Tensor  # (d, r), from a batch of half B
    half: Tensor  # (d, r), from half A
    other_half: Tensor  # (d, r), from half B
    A: Tensor  # (d, k), of half B: independent of `one` and `half`


class Probing:
    """A hook before `optimizer.step()`; weights, gradients and the run's own batches stay as they are."""

    def __init__(self, model: nn.Module, config: TrainConfig, probes: tuple[int, ...], fresh: int) -> None:
        names = default_targets(model)
        self.model, self.rank, self.probes, self.fresh = model, config.optim.rank, probes, fresh
        self.parameters = {name: p for name, p in model.named_parameters() if name in names}
        corpus = load_data(config.data, None)
        assert corpus.train is not None
        # Another order than the run's; of its 21 M tokens a run sees a tenth.
        self.batches = iter(make_loader(corpus.train, batch_size=config.run.batch_size, seed=config.run.seed + 1))
        self.step = 0
        self.seen: dict[int, dict[str, Probe]] = {}

    def __call__(self, *_: object) -> None:
        self.step += 1
        if self.step in self.probes:
            kept = [p.grad for p in self.model.parameters()]
            with torch.enable_grad():
                self.seen[self.step] = self.probe()
            for p, grad in zip(self.model.parameters(), kept, strict=True):
                p.grad = grad

    def probe(self) -> dict[str, Probe]:
        halves = []
        for _ in range(2):
            gradients = []
            for _ in range(self.fresh // 2):
                self.model.zero_grad()
                self.model(**next(self.batches), use_cache=False).loss.backward()
                gradients.append({name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None})
            halves.append(gradients)
        return {name: self.of([torch.stack([G[name] for G in half]) for half in halves]) for name in self.parameters}

    def of(self, halves: list[Tensor]) -> Probe:
        side = pick_side(halves[0].shape)
        bases = [SVD().basis(G, side, self.rank, None, 0) for half in halves for G in (half[0], half.mean(0))]
        return Probe(bases[0], bases[2], bases[1], bases[3], orient(halves[1].mean(0), side).clone())


def angle(Q1: Tensor, Q2: Tensor) -> float:
    """Median principal angle, degrees."""
    return float(torch.linalg.svdvals(Q1.mT @ Q2).clamp(max=1.0).acos().rad2deg().median())


def compare(old: Probe, new: Probe) -> dict[str, float]:
    """What became of a basis: `old` and `new` may be the same probe, and then all that differs is the batch."""
    ceiling = captured_energy(new.A, new.other_half)
    return {
        "angle_batch": angle(old.one, new.other),
        "angle_half": angle(old.half, new.other_half),
        "overlap_batch": float(overlap(old.one, new.other)),
        "overlap_half": float(overlap(old.half, new.other_half)),
        # Of a gradient that neither basis has seen; `ceiling`: its own best basis.
        "energy_batch": float(captured_energy(new.A, old.one)),
        "energy_half": float(captured_energy(new.A, old.half)),
        "energy_random": float(captured_energy(new.A, random_basis(old.one.shape, 0))),
        "ceiling": float(ceiling),
        "stable_rank": float(new.A.square().sum() / torch.linalg.matrix_norm(new.A, 2).square()),
    }


def probe_run(config: TrainConfig, probes: tuple[int, ...], fresh: int) -> dict[str, Any]:
    made: list[Probing] = []

    def builder(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        optimizer = compiled(model, config)
        assert isinstance(optimizer, ProjectedOptimizer)
        made[:] = [Probing(model, config, probes, fresh)]
        optimizer.register_step_pre_hook(made[0])
        return optimizer

    summary = train(config, builder)
    seen = made[0].seen
    rows = []
    for old, new in itertools.combinations_with_replacement(sorted(seen), 2):
        found = [(kind_of(name), compare(seen[old][name], probe)) for name, probe in seen[new].items()]
        for kind in KINDS:
            some = [row for its_kind, row in found if its_kind == kind]
            rows.append({"from": old, "to": new, "kind": kind, **medians(some, tuple(some[0]))})
    return {"valid_loss": summary["valid_loss"], "versions": summary["versions"], "fresh": fresh, "rows": rows}


# ---------------------------------------------------------------------------------------------------------- all


def main(
    train: str,
    valid: str,
    out: str = "runs/drift",
    parts: list[str] | None = None,
    steps: int = 750,
    lr: float = RATE,
    dense_lr: float = DENSE_RATE,
    seed: int = 1,
) -> None:
    """Run the parts that have no result yet.

    Args:
        train: glob of the training files
        valid: validation file
        out: folder for the run folders
        parts: names of rows, or probes; none: all
        steps: of every run; probes behind them are left out
        lr: peak learning rate of the projected matrices, of every row
        dense_lr: of the other parameters
        seed: of weights, data order and random bases
    """
    files = sorted(glob.glob(train))
    if not files:
        raise SystemExit(f"train={train!r} matches no file")
    for part in parts or [*ROWS, "probes"]:
        if part not in (*ROWS, "probes"):
            raise SystemExit(f"parts: {part!r} is unknown, use some of {', '.join((*ROWS, 'probes'))}")
        folder = Path(out) / part
        method = Method(lr, {"preset": "galore", **ROWS.get(part, {})})
        start = functools.partial(configure, method, "llama-2m", lr, dense_lr, steps, seed, files, valid, folder)
        config = start(diagnostics=part != "probes", eval_sequences=1024)
        file = RESULTS / f"{part}_{lr:g}_{dense_lr:g}_{steps}_{seed}.json"
        if part == "probes":
            probes = tuple(step for step in PROBES if step <= steps)
            once(file, folder, probe_run, config, probes, FRESH)
        else:
            once(file, folder, row_run, part, config)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
