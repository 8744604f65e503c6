"""Table 4 of arXiv 2403.03507 in small: MiniLM on five tasks, methods with learning rates of their own, memory beside quality.

    python reproductions/table4_small/run.py MODEL TASKS
    python reproductions/table4_small/run.py MODEL TASKS --tasks '[mrpc, rte]' --methods '[full, galore4]' --seeds '[1, 2]'

MODEL: folder of all-MiniLM-L6-v2. TASKS: folder with CoLA, MRPC, RTE, SST-2 and Banking77, TASK/train.jsonl and dev or test.

1. A fixed part of the training rows of each task; its last fifth is held out, and learning rates are judged on it, one seed,
   last epoch, that of matrices and that of the head: from a start to the better neighbour in 1, 3, 10, ..., until none is better.
2. The best rate with fresh seeds on the whole part, judged on the task's own validation rows.

Every run leaves results/KEY.json beside this file; what is there is not run again, so an interrupted grid goes on where it was,
and several processes may share tasks and methods. `table.py` makes the tables of it.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from subspan.extras import require
from subspan.training.finetune import finetune
from subspan.training.finetune_config import (
    ClassifierConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
    FinetuneRunConfig,
    TaskConfig,
)
from subspan.training.tasks import VALID_NAMES, normal

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from grid import beside, walk

RESULTS = Path(__file__).with_name("results")
SEARCH_SEED = 0
HEAD_RATE = 0.01
"""Where the search for that of the head starts: pretrained matrices of full fine-tuning break at a tenth of it."""
REST_RATE = 0.001
"""Of embeddings and norms, where they are trained."""
EPOCHS, BATCH, MAX_LENGTH = 3, 16, 64


class Part(NamedTuple):
    """What is used of a task, so that one run takes two to four minutes on a core. valid: rows to validate on, None: all."""

    train: int
    valid: int | None
    seeds: tuple[int, ...]


PARTS = {
    "cola": Part(1200, None, (1, 2, 3, 4, 5)),
    "mrpc": Part(500, None, (1, 2, 3, 4, 5)),
    "rte": Part(600, None, (1, 2, 3, 4, 5)),
    "sst2": Part(1200, None, (1, 2, 3)),
    "banking77": Part(1540, 1000, (1, 2, 3)),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """Settings of `subspan finetune`, and the learning rate where the search starts, or the method whose best rate is taken."""

    title: str
    rate: float | str
    optim: dict[str, Any]
    model: dict[str, Any] = dataclasses.field(default_factory=dict)


def _galore(rank: int, rate: float | str) -> Method:
    return Method(f"GaLore r = {rank}", rate, {"preset": "galore", "rank": rank, "update_proj_gap": 100})


def _lora(rank: int, rate: float | str) -> Method:
    model = {"baseline": "lora", "lora_alpha": 2.0 * rank}
    return Method(f"LoRA r = {rank}", rate, {"preset": "adamw", "rank": rank}, model)


METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", 1e-4, {"preset": "adamw"}),
    "full_same": Method("full, embeddings at the rate of matrices", "full", {"preset": "adamw", "dense_lr": None}),
    "lora4": _lora(4, "lora8"),
    "lora8": _lora(8, 1e-3),
    "galore4": _galore(4, "galore8"),
    "galore8": _galore(8, 1e-3),
    "subspan": Method("subspan", 1e-3, {"preset": "subspan"}),
}


def neighbours(pair: tuple[float, float]) -> list[tuple[float, float]]:
    """Pairs of rates, of matrices and of the head, that differ from `pair` in one."""
    lr, head = pair
    return [*((rate, head) for rate in beside(lr)), *((lr, rate) for rate in beside(head))]


def prepare(tasks: Path, task: str, out: Path) -> dict[str, str]:
    """Files of rows: `train` (the fixed part), `search_train` and `search_valid` (the same, cut), `valid` (the task's own)."""
    (folder,) = (path for path in tasks.iterdir() if normal(path.name) == task)
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    part = lines[: PARTS[task].train]
    cut = len(part) * 4 // 5
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, rows in (("train", part), ("search_train", part[:cut]), ("search_valid", part[cut:])):
        files[name] = str(out / f"{name}.jsonl")
        Path(files[name]).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    valid = next(path for name in VALID_NAMES if (path := folder / f"{name}.jsonl").is_file())
    return {**files, "valid": str(valid)}


def result_of(
    name: str,
    task: str,
    rates: tuple[float, float],
    seed: int,
    model: str,
    files: dict[str, str],
    out: Path,
    threads: int,
) -> dict[str, Any]:
    """The result of a run: from its file, or by running it. Seed SEARCH_SEED is a run of the search."""
    search = seed == SEARCH_SEED
    lr, head = rates
    key = f"{task}_{name}_{lr:g}_{head:g}_{seed}"
    file = RESULTS / f"{key}.json"
    if not file.exists():
        method, folder = METHODS[name], out / key
        shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
        config = FinetuneConfig(
            ClassifierConfig(name=model, **method.model),
            TaskConfig(
                task=task,
                train_files=files["search_train" if search else "train"],
                valid_files=files["search_valid" if search else "valid"],
                max_valid_rows=None if search else PARTS[task].valid,
                max_length=MAX_LENGTH,
            ),
            FinetuneOptimConfig(lr=lr, head_lr=head, **{"dense_lr": REST_RATE, **method.optim}),
            FinetuneRunConfig(
                out=str(folder),
                epochs=EPOCHS,
                seeds=[seed],
                batch_size=BATCH,
                warmup_ratio=0.1,
                checkpoint_every=0,
                log_every=100,
                threads=threads,
            ),
        )
        summary = finetune(config)
        (only,) = summary["seeds"]
        kept = ("best", "last", "seconds", "tokens", "tokens_per_second", "bytes", "peak_memory_bytes")
        result = {
            "task": task,
            "method": name,
            "lr": lr,
            "seed": seed,
            "metrics": summary["metrics"],
            "rows": summary["rows"],
            "optim": dataclasses.asdict(config.optim),
            **{key: only[key] for key in kept},
            "versions": summary["versions"],
        }
        RESULTS.mkdir(exist_ok=True)
        new = file.with_suffix(".new")
        new.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        new.replace(file)
        shutil.rmtree(folder)
    result = json.loads(file.read_text(encoding="utf-8"))
    metric = result["metrics"][0]
    print(
        f"== {key}: {metric} {result['last'][metric]:.4f}, {result['seconds']:.0f} s, "
        f"{result['tokens_per_second']:.0f} tokens/s",
        flush=True,
    )
    return dict(result)


def main(
    model: str,
    tasks_folder: str,
    out: str = "runs/table4_small",
    tasks: list[str] | None = None,
    methods: list[str] | None = None,
    seeds: list[int] | None = None,
    search_only: bool = False,
    threads: int = 1,
) -> None:
    """Search, then the seeds, task by task and method by method.

    Args:
        model: folder of the pretrained model
        tasks_folder: folder of the tasks
        out: folder for rows and run folders
        tasks: some of cola, mrpc, rte, sst2, banking77; none: all
        methods: some of the methods; none: all
        seeds: of the last runs; none: 1 to 5, of sst2 and banking77 1 to 3
        search_only: no seeds yet
        threads: CPU threads
    """
    for given, known in ((tasks, PARTS), (methods, METHODS)):
        for name in given or []:
            if name not in known:
                raise SystemExit(f"{name!r} is unknown: use some of {', '.join(known)}")
    if SEARCH_SEED in (seeds or []):
        raise SystemExit(f"seeds={seeds}: seed {SEARCH_SEED} is the search's, use others")
    require("transformers.utils.logging", "train").set_verbosity_error()  # that the head is new is said by each run
    for task in tasks or PARTS:
        files = prepare(Path(tasks_folder).expanduser(), task, Path(out) / "rows" / task)
        for name in methods or METHODS:
            rate, searched = METHODS[name].rate, name
            if isinstance(rate, str):
                rate, searched = METHODS[rate].rate, rate

            def error(
                rates: tuple[float, float], task: str = task, searched: str = searched, files: Any = files
            ) -> float:
                result = result_of(searched, task, rates, SEARCH_SEED, model, files, Path(out), threads)
                return -float(result["last"][result["metrics"][0]])

            rates = walk((float(rate), HEAD_RATE), neighbours, error)
            for seed in [] if search_only else seeds or PARTS[task].seeds:
                result_of(name, task, rates, seed, model, files, Path(out), threads)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
