"""Does subspace iteration find what the exact SVD finds? Captured energy on the gradients of a real training run.

    python reproductions/subspace_iteration/run.py

Trains a LLaMA of hidden size 512 on the embedded text (the source of Python's standard library) with GaLore. Before every GAP-th
step the gradient of each projected matrix is decomposed exactly and by subspace iteration, at every rank, each rank
carrying its own basis from one refresh to the next as the optimizer does.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from subspan.optim.optimizer import ProjectedOptimizer
from subspan.optim.projectors import SubspaceIteration, captured_energy, orient, pick_side
from subspan.training.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from subspan.training.optimizers import build_optimizer
from subspan.training.trainer import train

RANKS = (32, 64, 128, 256)
BATCH, GAP = 8, 50  # 8 x 256 tokens: 8 r at the largest rank


class Measurement:
    """A hook before `optimizer.step()`: energies at every GAP-th step."""

    def __init__(self, candidates: dict[str, SubspaceIteration]) -> None:
        self.candidates = candidates
        self.bases: dict[tuple[str, int, Tensor], Tensor] = {}
        self.rows: list[dict[str, Any]] = []
        self.step = 0

    @torch.no_grad()
    def __call__(self, optimizer: ProjectedOptimizer, *_: object) -> None:
        if self.step % GAP == 0:
            for group in optimizer.param_groups:
                if "rank" in group:
                    for index, (name, p) in enumerate(zip(group["param_names"], group["params"], strict=True)):
                        self.measure(name, p, index)
        self.step += 1

    def measure(self, name: str, p: Tensor, index: int) -> None:
        assert p.grad is not None
        side = pick_side(p.shape)
        A = orient(p.grad, side)
        energy = torch.linalg.svdvals(p.grad).square()
        for rank in RANKS:
            exact = float(energy[:rank].sum() / energy.sum())
            for label, projector in self.candidates.items():
                key = (label, rank, p)
                self.bases[key] = Q = projector.basis(p.grad, side, rank, self.bases.get(key), index)
                ratio = float(captured_energy(A, Q)) / exact
                row = {
                    "step": self.step,
                    "name": name,
                    "rank": rank,
                    "projector": label,
                    "exact": exact,
                    "ratio": ratio,
                }
                self.rows.append(row)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the ratio of captured energies, subspace iteration over SVD, smallest and median over matrices and refreshes."""
    lines = [
        "| projector | rank | SVD captures (median) | first refresh: min | median | later refreshes: min | median |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in dict.fromkeys(row["projector"] for row in rows):
        for rank in RANKS:
            some = [row for row in rows if row["projector"] == label and row["rank"] == rank]
            cold, warm = ([row["ratio"] for row in some if (row["step"] == 0) == first] for first in (True, False))
            exact = statistics.median(row["exact"] for row in some)
            cells = [f"{f(ratios):.4f}" for ratios in (cold, warm) for f in (min, statistics.median)]
            lines.append(f"| {label} | {rank} | {exact:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(steps: int = 151, threads: int = 1) -> None:
    """Train, measure, print the table.

    Args:
        steps: optimizer steps; measured at 0, 50, 100, ...
        threads: CPU threads
    """
    candidates = {f"n_iter={n}, cold_iter={c}": SubspaceIteration(n, c) for n, c in ((1, 4), (2, 4), (2, 8))}
    measurement = Measurement(candidates)

    def builder(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        optimizer = build_optimizer(model, config)
        optimizer.register_step_pre_hook(measurement)
        return optimizer

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=ModelConfig(name="llama-60m", overrides={"num_hidden_layers": 4}),
            optim=OptimConfig(lr=0.01, rank=128, update_proj_gap=GAP, gradients="hold"),
            run=RunConfig(
                out=f"{folder}/run",
                steps=steps,
                warmup_steps=20,
                batch_size=BATCH,
                eval_every=0,
                checkpoint_every=0,
                eval_sequences=64,
                autocast=True,
                export=False,
                threads=threads,
            ),
        )
        summary = train(config, builder)
    print(table(measurement.rows))
    print(json.dumps(summary["versions"]), f"validation loss {summary['valid_loss']:.3f}")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
