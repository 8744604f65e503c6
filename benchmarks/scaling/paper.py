"""LLaMA 7B, 13B and 70B on 8 to 512 GPUs, on paper: memory of a device, what it sends in a step, and how long that takes.

    python benchmarks/scaling/paper.py

Every row is a `subspan plan` of its layout; nothing runs. A row leaves a file in results/paper; what is there is not done again.
The speeds are assumptions, in LINKS and FLOPS, and so is that everything waits for everything: a collective overlaps with
nothing, and one that crosses nodes runs at a GPU's share of the network.
"""

from __future__ import annotations

import json
import multiprocessing
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspan.cluster import as_dict, plan_traffic, pretended
from subspan.plan import Planner
from subspan.training.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig

HERE = Path(__file__).parent
GIB = 2**30
GPUS_PER_NODE, TOKENS, GAP = 8, 2048, 200
LINKS = {
    "within": 360e9,
    "between": 40e9,
}  # bytes a second and GPU that rings reach: NVLink 4 (450), 400 Gbit/s of network (50)
FLOPS = 400e12  # of a GPU in bf16, as trainings reach
RANKS = {"llama-7b": 1024, "llama-13b": 1280, "llama-70b": 2048}  # d/4
LAYOUTS = ((8, 1), (64, 1), (8, 8), (512, 1), (8, 64))
COPIES = ((1, 8), (1, 64))
PRESETS = {"adamw": "hold", "galore": "project"}


@dataclass(frozen=True)
class Row:
    model: str
    preset: str
    shard: int
    replicate: int

    @property
    def file(self) -> Path:
        return HERE / "results" / "paper" / f"{self.model}_{self.preset}_{self.shard}_{self.replicate}.json"

    def config(self) -> TrainConfig:
        return TrainConfig(
            ModelConfig(name=self.model, dtype="bfloat16", activation_checkpointing=True),
            DataConfig(seq_len=TOKENS),
            OptimConfig(
                preset=self.preset, rank=RANKS[self.model], update_proj_gap=GAP, gradients=PRESETS[self.preset]
            ),
            RunConfig(batch_size=self.shard * self.replicate, micro_batch=1),
            ParallelConfig(self.shard, self.replicate),
        )


def rows() -> list[Row]:
    sharded = [Row(model, preset, *layout) for model in RANKS for preset in PRESETS for layout in LAYOUTS]
    copies = [Row("llama-7b", preset, *layout) for preset in PRESETS for layout in COPIES]
    return [*copies, *sharded]


def plan(row: Row) -> None:
    config = row.config()
    with pretended(config.parallel):
        planner = Planner()
        memory = planner.plan(config)
        traffic = plan_traffic(planner, config, GPUS_PER_NODE)
    result = {**memory.as_dict(), **as_dict(config.parallel, GPUS_PER_NODE, traffic)}
    row.file.write_text(json.dumps(result, indent=1) + "\n")


def table() -> str:
    lines = [
        "| model | GPUs | shard x replicate | preset | weights, GiB | state | basis | peak | sent within a node, GB | between | "
        "time of it, s | compute, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows(), key=lambda r: (list(RANKS).index(r.model), r.shard * r.replicate, -r.shard, r.preset)):
        if not row.file.exists():
            continue
        found: dict[str, Any] = json.loads(row.file.read_text())
        sent = {where: sum(part[where] for part in found["sent"].values()) for where in LINKS}
        seconds = sum(sent[where] / LINKS[where] for where in LINKS)
        compute = 8 * found["parameters"] * TOKENS / FLOPS  # forward, again for checkpointing, and backward: 2 + 2 + 4
        sizes = [f"{found[key] / GIB:.2f}" for key in ("weights", "moments", "basis", "peak")]
        lines.append(
            f"| {row.model} | {row.shard * row.replicate} | {row.shard} x {row.replicate} | {row.preset} | "
            f"{' | '.join(sizes)} | {sent['within'] / 1e9:.2f} | {sent['between'] / 1e9:.2f} | {seconds:.2f} | {compute:.2f} |"
        )
    return "\n".join(lines)


def main(only: str = "") -> None:
    """Plan what has no result yet, then write the table.

    Args:
        only: rows whose file's name contains this
    """
    (HERE / "results" / "paper").mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    for row in rows():
        if not row.file.exists() and only in row.file.name:
            process = context.Process(target=plan, args=(row,))  # one each: models of 70B add up even on paper
            process.start()
            process.join()
            print(row, "planned" if row.file.exists() else "failed", flush=True)
    readme = HERE / "README.md"
    text = re.sub(
        r"(<!-- paper -->\n).*?(<!-- end -->)", rf"\g<1>{table()}\n\g<2>", readme.read_text(), flags=re.DOTALL
    )
    readme.write_text(text)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
