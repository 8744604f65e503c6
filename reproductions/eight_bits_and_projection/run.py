"""What few-bit moments and a projection do to each other: the error of an update with both, each and neither.

    python reproductions/eight_bits_and_projection/run.py 'TEXT/train/*.txt' TEXT/valid.txt

One run of recipes/cpu_2m.yaml, which GaLore with fp32 state drives. At every step each projected matrix's gradient also goes to
shadow optimizers, at full rank and in the same subspace, with fp32, 8-bit and 4-bit moments: same gradients, same bases, so
updates differ in what is compared and in nothing else. A shadow's weight is zero before each step and minus its update after it
(lr and scale 1), so what is compared is what `ProjectedOptimizer` does to a weight. Writes results.json (if there is none: a
second call only writes the tables) and the tables of README.md.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan.optim.groups import default_targets
from subspan.optim.optimizer import ProjectedOptimizer
from subspan.optim.presets import GaLoreAdamW
from subspan.training.config import TrainConfig, load_config
from subspan.training.optimizers import build_optimizer
from subspan.training.trainer import train

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
RECIPE = HERE.parents[1] / "recipes" / "cpu_2m.yaml"

STEPS = 301
MEASURED = (20, 50, 100, 101, 150, 200, 300)  # steps, from 1; refreshes are at 1, 101, 201 and 301
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BITS = {"fp32": torch.float32, "8": torch.int8, "4": torch.int4}
BLOCK = 32  # values to a scale in the subspace, of rank 32; at full rank 128 or 256

PAIRS = {  # what is compared: an update with a reference
    "8 bits, full rank": ("full 8", "full fp32"),
    "8 bits, full rank, blocks of 32": ("full 8 short blocks", "full fp32"),
    "8 bits, in the subspace": ("projected 8", "projected fp32"),
    "4 bits, full rank": ("full 4", "full fp32"),
    "4 bits, in the subspace": ("projected 4", "projected fp32"),
    "projection alone": ("projected fp32", "full fp32"),
    "projection and 8 bits": ("projected 8", "full fp32"),
    "projection and 4 bits": ("projected 4", "full fp32"),
}


class Shadow:
    """An optimizer over zero weights, one for each projected matrix. `view`: what is done to weight and gradient first."""

    def __init__(
        self,
        parameters: dict[str, Tensor],
        make: Callable[[list[tuple[str, nn.Parameter]]], ProjectedOptimizer],
        view: Callable[[Tensor], Tensor] = lambda G: G,
    ) -> None:
        self.view = view
        self.weights = {name: nn.Parameter(view(torch.zeros_like(p))) for name, p in parameters.items()}
        self.optimizer = make(list(self.weights.items()))

    @torch.no_grad()
    def updates(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, W in self.weights.items():
            W.zero_()
            W.grad = self.view(gradients[name]).clone()
        self.optimizer.step()
        return {name: -W.view_as(gradients[name]) for name, W in self.weights.items()}


class Measurement:
    """A hook before `optimizer.step()`."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        names = default_targets(model)
        self.parameters = {name: p for name, p in model.named_parameters() if name in names}
        projected = {"rank": config.optim.rank, "update_proj_gap": config.optim.update_proj_gap, "scale": 1.0}
        self.shadows: dict[str, Shadow] = {}
        for where, keys in (("full", {}), ("projected", projected)):
            for bits, dtype in BITS.items():

                def make(params: Any, keys: Any = keys, dtype: Any = dtype) -> ProjectedOptimizer:
                    return GaLoreAdamW([{"params": params, **keys}], 1.0, state_dtype=dtype)

                self.shadows[f"{where} {bits}"] = Shadow(self.parameters, make)
                if (where, bits) == ("full", "8"):
                    view = lambda G: G.reshape(-1, BLOCK)  # noqa: E731  # a row of the matrix that the optimizer sees is a block
                    self.shadows["full 8 short blocks"] = Shadow(self.parameters, make, view)
        self.step, self.rows = 0, []

    def __call__(self, *_: object) -> None:
        self.step += 1
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        updates = {name: shadow.updates(gradients) for name, shadow in self.shadows.items()}
        if self.step in MEASURED:
            self.rows += [self.row(name, updates) for name in gradients]

    def row(self, name: str, updates: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        row: dict[str, Any] = {"step": self.step, "kind": name.split(".")[-2]}
        for pair, (ours, reference) in PAIRS.items():
            X, Y = updates[ours][name].double(), updates[reference][name].double()
            row[pair] = {
                "error": float((X - Y).norm() / Y.norm()),
                "cosine": float((X * Y).sum() / (X.norm() * Y.norm())),
                "length": float(X.norm() / Y.norm()),
            }
        for where in ("full", "projected"):
            shadow = self.shadows[f"{where} fp32"]
            v = shadow.optimizer.state[shadow.weights[name]]["exp_avg_sq"]
            blocks = (v.mT if where == "projected" else v[:, : v.shape[1] // 128 * 128].reshape(-1, 128)).sqrt()
            row[f"spread, {where}"] = float((blocks.amax(1) / blocks.median(1).values.clamp_min(1e-30)).median())
        return row


def rounded(values: Iterable[float]) -> float:
    """The median, in five digits."""
    return float(f"{statistics.median(values):.5g}")


def measure(files: list[str], valid: str) -> dict[str, Any]:
    made: list[Measurement] = []

    def builder(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        optimizer = build_optimizer(model, config)
        made[:] = [Measurement(model, config)]
        optimizer.register_step_pre_hook(made[0])
        return optimizer

    config, begin = load_config(RECIPE), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(
            config.run,
            out=f"{folder}/run",
            steps=STEPS,
            warmup_steps=STEPS // 10,
            eval_every=0,
            eval_sequences=64,
            checkpoint_every=0,
            log_every=50,
            seed=1,
            export=False,
        )
        summary = train(
            dataclasses.replace(
                config,
                data=dataclasses.replace(config.data, files=files, valid_files=valid),
                optim=dataclasses.replace(config.optim, gradients="hold"),
                run=run,
            ),
            builder,
        )
    rows = []
    for step in MEASURED:
        for kind in KINDS:
            some = [row for row in made[0].rows if (row["step"], row["kind"]) == (step, kind)]
            row = {"step": step, "kind": kind, "matrices": len(some)}
            for pair in PAIRS:
                row[pair] = {key: rounded(one[pair][key] for one in some) for key in some[0][pair]}
            for key in ("spread, full", "spread, projected"):
                row[key] = rounded(one[key] for one in some)
            rows.append(row)
    kept = {key: summary[key] for key in ("valid_loss", "first_loss", "versions")}
    return {"seconds": round(time.perf_counter() - begin), **kept, "rows": rows}


# ------------------------------------------------------------------------------------------------------- report


def middle(rows: list[dict[str, Any]], pair: str, key: str) -> float:
    return statistics.median(row[pair][key] for row in rows)


def overall(rows: list[dict[str, Any]]) -> str:
    """Of all steps: what each does to the update. Medians over kinds of matrices and steps, the worst in brackets."""
    lines = ["| | relative error | cosine | length |", "|---|---|---|---|"]
    for pair in PAIRS:
        worst = max(row[pair]["error"] for row in rows)
        cosine = min(row[pair]["cosine"] for row in rows)
        lines.append(
            f"| {pair} | {middle(rows, pair, 'error'):.3f} ({worst:.3f}) | {middle(rows, pair, 'cosine'):.4f} ({cosine:.4f}) "
            f"| {middle(rows, pair, 'length'):.3f} |"
        )
    return "\n".join(lines)


def over_time(rows: list[dict[str, Any]]) -> str:
    """Relative errors by step, and whether what is lost adds up: cosines multiply where two errors are independent."""
    pairs = list(PAIRS)[:5]
    lines = [
        f"| step | {' | '.join(pairs)} | cosine: projection alone | and 8 bits | product of the two alone |",
        "|" + "---|" * (len(pairs) + 4),
    ]
    for step in MEASURED:
        some = [row for row in rows if row["step"] == step]
        errors = " | ".join(f"{middle(some, pair, 'error'):.3f}" for pair in pairs)
        alone, both = (middle(some, pair, "cosine") for pair in ("projection alone", "projection and 8 bits"))
        product = statistics.median(
            row["projection alone"]["cosine"] * row["8 bits, in the subspace"]["cosine"] for row in some
        )
        lines.append(f"| {step} | {errors} | {alone:.4f} | {both:.4f} | {product:.4f} |")
    return "\n".join(lines)


def by_kind(rows: list[dict[str, Any]]) -> str:
    pairs = list(PAIRS)[:5]
    lines = [
        f"| matrices | {' | '.join(pairs)} | cosine: projection alone | and 8 bits | spread, full rank | spread, subspace |",
        "|" + "---|" * (len(pairs) + 5),
    ]
    for kind in KINDS:
        some = [row for row in rows if row["kind"] == kind]
        errors = " | ".join(f"{middle(some, pair, 'error'):.3f}" for pair in pairs)
        cosines = " | ".join(f"{middle(some, pair, 'cosine'):.4f}" for pair in list(PAIRS)[5:7])
        spreads = " | ".join(
            f"{statistics.median(row[f'spread, {where}'] for row in some):.1f}" for where in ("full", "projected")
        )
        lines.append(f"| {kind} | {errors} | {cosines} | {spreads} |")
    return "\n".join(lines)


def main(train: str, valid: str) -> None:
    """Measure, unless results.json is there, and write the tables.

    Args:
        train: glob of the training files
        valid: validation file
    """
    if not RESULTS.exists():
        files = sorted(glob.glob(train))
        if not files:
            raise SystemExit(f"train={train!r} matches no file")
        result = measure(files, valid)
        RESULTS.write_text(json.dumps(result).replace('{"step"', '\n{"step"') + "\n")  # a row of the measurement a line
    rows = json.loads(RESULTS.read_text())["rows"]
    readme = HERE / "README.md"
    text = readme.read_text()
    for name, table in (("overall", overall(rows)), ("time", over_time(rows)), ("kinds", by_kind(rows))):
        print(table, end="\n\n")
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
    readme.write_text(text)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
