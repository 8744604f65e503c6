"""Table 4 of arXiv 2403.03507 in small: MiniLM on five tasks, methods with learning rates of their own, memory beside quality.

    python reproductions/table4_small/run.py MODEL TASKS
    python reproductions/table4_small/run.py MODEL TASKS --tasks '[mrpc, rte]' --methods '[full, galore4]' --seeds '[1, 2]'

MODEL: folder of all-MiniLM-L6-v2. TASKS: folder with CoLA, MRPC, RTE, SST-2 and Banking77, TASK/train.jsonl and dev or test.

1. A fixed part of the training rows of SST-2 and Banking77, all rows of the others; their last fifth is held out, and learning
   rates are judged on it, one seed, last epoch, that of matrices and, where a part is used, that of the head: from a start to
   the better neighbour in 1, 3, 10, ..., until none is better.
2. The best rate with fresh seeds on the whole part, judged on the task's own validation rows.

Every run leaves results/KEY.json beside this file; what is there is not run again, so an interrupted grid goes on where it was,
and several processes may share tasks and methods. `table.py` makes the tables of it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
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
from grid import beside, once, walk

RESULTS = Path(__file__).with_name("results")
SEARCH_SEED = 0
EPOCHS, MAX_LENGTH = 3, 64


class Part(NamedTuple):
    """What is used of a task, so that one run takes two to four minutes on a core. train, valid: rows, None: all.
    whole: every training row, in batches of 32 (of a part 16) and bfloat16 arithmetic, the head's rate left where it is: tasks
    of which a part says nothing.
    head: where the search for the head's rate starts; one of many classes wants more than pretrained matrices bear.
    rest: the rate of embeddings and norms, where they are trained."""

    train: int | None
    valid: int | None
    seeds: tuple[int, ...]
    head: float = 0.001
    rest: float = 0.001

    @property
    def whole(self) -> bool:
        return self.train is None


PARTS = {
    "cola": Part(None, None, (1, 2, 3), rest=1e-4),
    "mrpc": Part(None, None, (1, 2, 3), rest=1e-4),
    "rte": Part(None, None, (1, 2, 3), rest=1e-4),
    "sst2": Part(1200, None, (1, 2, 3)),
    "banking77": Part(1540, 1000, (1, 2, 3), head=0.01),
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


def neighbours(task: str, pair: tuple[float, float]) -> list[tuple[float, float]]:
    """Pairs of rates, of matrices and of the head, that differ from `pair` in one."""
    lr, head = pair
    return [*((rate, head) for rate in beside(lr)), *((lr, rate) for rate in beside(head) if not PARTS[task].whole)]


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
        new = out / f"{name}.{os.getpid()}.new"  # another process may be reading the rows
        new.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        new.replace(files[name])
    valid = next(path for name in VALID_NAMES if (path := folder / f"{name}.jsonl").is_file())
    return {**files, "valid": str(valid)}


def configure(
    name: str,
    task: str,
    rates: tuple[float, float],
    seed: int,
    model: str,
    files: dict[str, str],
    out: Path,
    threads: int,
) -> FinetuneConfig:
    """Seed SEARCH_SEED is a run of the search."""
    method, part, (lr, head), search = METHODS[name], PARTS[task], rates, seed == SEARCH_SEED
    # eager: on a CPU the backward pass of sdpa in bfloat16 takes half of a step
    return FinetuneConfig(
        ClassifierConfig(name=model, attn_implementation="eager" if part.whole else None, **method.model),
        TaskConfig(
            task=task,
            train_files=files["search_train" if search else "train"],
            valid_files=files["search_valid" if search else "valid"],
            max_valid_rows=None if search else part.valid,
            max_length=MAX_LENGTH,
        ),
        FinetuneOptimConfig(lr=lr, head_lr=head, **{"dense_lr": part.rest, **method.optim}),
        FinetuneRunConfig(
            out=str(out),
            epochs=EPOCHS,
            seeds=[seed],
            batch_size=32 if part.whole else 16,
            warmup_ratio=0.1,
            checkpoint_every=0,
            log_every=100,
            threads=threads,
            autocast=part.whole,
        ),
    )


def one_run(name: str, config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune, and make a small result of it."""
    require("transformers.utils.logging", "train").set_verbosity_error()  # that the head is new is said by each run
    summary = finetune(config)
    (only,) = summary["seeds"]
    kept = ("best", "last", "seconds", "tokens", "tokens_per_second", "bytes", "peak_memory_bytes")
    return {
        "task": config.data.task,
        "method": name,
        "lr": config.optim.lr,
        "seed": only["seed"],
        "score": only["last"][summary["metrics"][0]],
        "metrics": summary["metrics"],
        "rows": summary["rows"],
        "optim": dataclasses.asdict(config.optim),
        **{key: only[key] for key in kept},
        "versions": summary["versions"],
    }


def result_of(name: str, task: str, rates: tuple[float, float], seed: int, out: Path, **given: Any) -> dict[str, Any]:
    """The result of a run: from its file, or by a run in a process of its own."""
    key = f"{task}_{name}_{rates[0]:g}_{rates[1]:g}_{seed}"
    config = configure(name, task, rates, seed, out=out / key, **given)
    return once(RESULTS / f"{key}.json", out / key, one_run, name, config, shown="score")


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
        seeds: of the last runs; none: 1 to 3
        search_only: no seeds yet
        threads: CPU threads
    """
    for given, known in ((tasks, PARTS), (methods, METHODS)):
        for name in given or []:
            if name not in known:
                raise SystemExit(f"{name!r} is unknown: use some of {', '.join(known)}")
    if SEARCH_SEED in (seeds or []):
        raise SystemExit(f"seeds={seeds}: seed {SEARCH_SEED} is the search's, use others")
    one = functools.partial(result_of, out=Path(out), model=model, threads=threads)
    for task in tasks or PARTS:
        files = prepare(Path(tasks_folder).expanduser(), task, Path(out) / "rows" / task)
        for name in methods or METHODS:
            rate, searched = METHODS[name].rate, name
            if isinstance(rate, str):
                rate, searched = METHODS[rate].rate, rate

            def error(
                rates: tuple[float, float], task: str = task, searched: str = searched, files: Any = files
            ) -> float:
                return -float(one(searched, task, rates, SEARCH_SEED, files=files)["score"])

            rates = walk((float(rate), PARTS[task].head), functools.partial(neighbours, task), error)
            for seed in [] if search_only else seeds or PARTS[task].seeds:
                one(name, task, rates, seed, files=files)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
