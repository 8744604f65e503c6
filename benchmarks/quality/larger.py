"""The same question of llama-60m (33 M parameters with this vocabulary), on a GPU, several runs side by side.

    python benchmarks/quality/larger.py 'TEXT/train/*.txt' TEXT/valid.txt

For each method two rates of matrices with 0.03 for embeddings, head and norms, then with the better of them a third of that
and three times as much: the same four places for all. 32 x 256 tokens a step, bf16 autocast, rank 128 as in the paper. Leaves
results/llama-60m/KEY.json, where what is there is not run again, and `table.py` reads them.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import beside, finite, training_files
from methods import METHODS, configure, result_of

MODEL = "llama-60m"
RATES = {"subspan": (0.01, 0.003), "adamw": (0.003, 0.001), "ldadam": (0.003, 0.001), "galore": (0.01, 0.003)}
DENSE = 0.03
BATCH = 32


def main(
    train: str,
    valid: str,
    out: str = "runs/larger",
    steps: int = 600,
    jobs: int = 4,
    device: str = "auto",
    methods: list[str] | None = None,
) -> None:
    """All methods, `jobs` of them at a time, two runs of each.

    Args:
        train: glob of the training files
        valid: validation file
        out: folder for the run folders
        steps: of every run, 8,192 tokens each
        jobs: methods side by side
        device: auto, cpu, cuda
        methods: some of the methods; none: all
    """
    files = training_files(train)
    Path(out).mkdir(parents=True, exist_ok=True)

    def loss(name: str, lr: float, dense_lr: float) -> float:
        folder = Path(out) / f"{name}_{lr:g}_{dense_lr:g}"
        more = {"eval_sequences": 1024, "batch_size": BATCH, "micro_batch": BATCH, "autocast": True, "device": device}
        config = configure(METHODS[name], MODEL, lr, dense_lr, steps, 1, files, valid, folder, **more)
        return float(result_of(name, config, compile=False)["valid_loss"])

    def search(name: str) -> None:
        with ThreadPoolExecutor(2) as two:
            rates = RATES[name]
            losses = list(two.map(lambda lr: loss(name, lr, DENSE), rates))
            better = min(zip(losses, rates, strict=True), key=lambda pair: finite(pair[0]))[1]
            list(two.map(lambda dense_lr: loss(name, better, dense_lr), beside(DENSE)))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(search, methods or RATES))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
