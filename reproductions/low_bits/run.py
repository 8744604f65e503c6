"""What fewer bits cost: GaLore on recipes/cpu_9m.yaml with state, basis and weights in fewer bits, one run a row.

    python reproductions/low_bits/run.py 'TEXT/train/*.txt' TEXT/valid.txt

Model, text, data order, schedule, learning rates and token budget are those of reproductions/first_run; only what is named
changes, and its run of GaLore with subspace iteration is the fp32 row here. Another seed of that row says how much a difference
means. Every row leaves a file in results/ beside this file;
what is there is not run again, and two processes may share the rows (--rows). `table.py` writes the table from these files.
"""

from __future__ import annotations

import dataclasses
import glob
import sys
from pathlib import Path
from typing import Any

from torch import nn

from subspan.optim.optimizer import ProjectedOptimizer
from subspan.optim.projectors import SubspaceIteration
from subspan.training.config import TrainConfig, load_config
from subspan.training.optimizers import build_optimizer
from subspan.training.trainer import train

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from grid import once

HERE = Path(__file__).parent
RESULTS = HERE / "results"
RECIPE = HERE.parents[1] / "recipes" / "cpu_9m.yaml"

LR, DENSE_LR = 0.003, 0.01  # the search of reproductions/first_run
FP32 = HERE.parent / "first_run" / "results" / f"final_galore_subspace_{LR}_{DENSE_LR}.json"

ROWS: dict[str, dict[str, dict[str, Any]]] = {  # what differs from the recipe, by section
    "fp32_other_seed": {"run": {"seed": 2}},
    "bf16": {"optim": {"state_dtype": "bfloat16"}},
    "int8": {"optim": {"state_dtype": "int8"}},
    "int4": {"optim": {"state_dtype": "int4"}},
    "basis_int4": {"optim": {"basis_dtype": "int4"}},
    "weights_int8": {"model": {"int8": True}},
    "qgalore": {"optim": {"preset": "qgalore"}},
    "dense_adafactor": {"optim": {"dense_rule": "adafactor"}},
}


def configure(row: str, train_files: list[str], valid: str, out: Path) -> TrainConfig:
    config = load_config(RECIPE)
    changes: dict[str, dict[str, Any]] = {
        "model": {},
        "data": {"files": train_files, "valid_files": valid},
        "optim": {"lr": LR, "dense_lr": DENSE_LR, "gradients": "hold"},  # bases and refreshes as in first_run
        "run": {
            "out": str(out),
            "threads": 1,  # two rows side by side on two cores: threads that wait for each other would lose both
            "eval_every": 0,
            "eval_sequences": None,
            "checkpoint_every": 0,
            "seed": 1,
            "export": False,
        },
    }
    for section, values in ROWS[row].items():
        changes[section] |= values
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    return dataclasses.replace(config, **sections)


def one_run(row: str, config: TrainConfig) -> dict[str, Any]:
    def builder(model: nn.Module, config: TrainConfig) -> Any:
        model.compile()  # in place: about a fifth faster on a CPU, for every row alike
        optimizer = build_optimizer(model, config)
        if isinstance(optimizer, ProjectedOptimizer):
            optimizer.projector = SubspaceIteration(n_iter=2)  # what the committed rows were run with
        return optimizer

    summary = train(config, builder)
    kept = (
        "valid_loss",
        "perplexity",
        "valid_tokens",
        "tokens",
        "steps",
        "seconds",
        "refresh_seconds",
        "bytes",
        "versions",
    )
    return {"row": row, **{key: summary[key] for key in kept}, "corpus_sha256": summary["corpus"]["sha256"]}


def main(train: str, valid: str, out: str = "runs/low_bits", rows: list[str] | None = None) -> None:
    """Run the rows that have no result yet.

    Args:
        train: glob of the training files
        valid: validation file
        out: folder for the run folders
        rows: some of the rows; none: all
    """
    files = sorted(glob.glob(train))
    if not files:
        raise SystemExit(f"train={train!r} matches no file")
    for row in rows or ROWS:
        folder = Path(out) / row
        once(RESULTS / f"{row}.json", folder, one_run, row, configure(row, files, valid, folder))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
