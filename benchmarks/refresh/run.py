"""Time of a refresh: warm-started subspace iteration beside the exact SVD, svd_lowrank and the other finders; and how it grows.

    python benchmarks/refresh/run.py
    python benchmarks/refresh/run.py --models '[llama-130m]'
    python benchmarks/refresh/run.py --device cuda

Gradients of LLaMA's matrices with decaying singular values and noise, rank a quarter of the hidden size. The fast ones take
turns, several rounds; the exact SVD, minutes at 7B's shapes, is taken `svd_rounds` times. Leaves results/MODEL_DTYPE.json
beside this file, where what is there is not run again, and writes README.md's table and refresh.png. How much of real
gradients each finder captures is measured in reproductions/subspace_iteration.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from subspan.optim.projectors import SVD, RandomizedSVD, SubspaceIteration, captured_energy, orient, pick_side

HERE = Path(__file__).parent
RESULTS = HERE / "results"

MODELS = {"llama-130m": (768, 2048), "llama-1b": (2048, 5461), "llama-7b": (4096, 11008)}  # hidden, intermediate
EXACT, LOWRANK, OURS = "exact SVD", "svd_lowrank(niter=2)", "subspace iteration, warm"


def gradient(shape: tuple[int, int], seed: int) -> Tensor:
    """Singular values that fall by four decades, in directions that two seeds share for the most part, and noise."""
    shared, own = (torch.Generator().manual_seed(s) for s in (0, seed))
    rank = min(shape) // 2
    left, right = (torch.randn(n, rank, generator=shared) for n in shape)
    right += 0.3 * torch.randn(right.shape, generator=own)
    G = (left * torch.logspace(0, -4, rank)) @ right.T
    return G.add_(torch.randn(shape, generator=own), alpha=1e-4 * float(G.std()))


def finders(G: Tensor, rank: int, warm: Tensor) -> dict[str, Callable[[], Tensor]]:
    side = pick_side(G.shape)

    def lowrank() -> Tensor:
        U, _, V = torch.svd_lowrank(G.float(), q=rank, niter=2)
        return U if side == "left" else V

    return {
        OURS: lambda: SubspaceIteration().basis(G, side, rank, warm, 0),
        "subspace iteration, first": lambda: SubspaceIteration().basis(G, side, rank, None, 0),
        "RandomizedSVD": lambda: RandomizedSVD().basis(G, side, rank, None, 0),
        LOWRANK: lowrank,
        EXACT: lambda: SVD().basis(G, side, rank, None, 0),
    }


def measure(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, rounds: int, svd_rounds: int, device: str
) -> dict[str, Any]:
    """Seconds of each finder on one gradient, and what its basis captures of it."""
    side = pick_side(shape)
    wait = (lambda: None) if device == "cpu" else torch.accelerator.synchronize
    warm = SubspaceIteration().basis(gradient(shape, 1).to(device), side, rank, None, 0)
    G = gradient(shape, 2).to(device, dtype)
    work = finders(G, rank, warm)
    times: dict[str, list[float]] = {name: [] for name in work}
    energy: dict[str, float] = {}
    A = orient(G.float(), side)
    for number in range(rounds):
        for name, find in work.items():
            if name == EXACT and number >= svd_rounds:
                continue
            wait()
            begin = time.perf_counter()
            Q = find()
            wait()
            times[name].append(time.perf_counter() - begin)
            if name not in energy:
                energy[name] = float(captured_energy(A, Q))
    return {"shape": shape, "rank": rank, "seconds": times, "energy": energy}


def exponent(rows: list[dict[str, Any]], name: str) -> float:
    """Slope of log(time) over log(m n r), least squares."""
    points = [(math.log(math.prod(row["shape"]) * row["rank"]), math.log(median(row["seconds"][name]))) for row in rows]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


# --------------------------------------------------------------------------------------------------------------- output


def table(results: list[dict[str, Any]]) -> str:
    names = list(results[0]["rows"][0]["seconds"])
    lines = [
        "| matrix | rank | dtype | " + " | ".join(f"{name}: time | energy" for name in names) + " |",
        "|---|---|---|" + "---|---|" * len(names),
    ]
    for result in results:
        for row in result["rows"]:
            base, best = median(row["seconds"][OURS]), row["energy"][EXACT]
            cells = [f"{median(row['seconds'][name]) / base:.1f} | {row['energy'][name] / best:.4f}" for name in names]
            lines.append(
                f"| {' x '.join(map(str, row['shape']))} | {row['rank']} | {result['dtype']} | {' | '.join(cells)} |"
            )
    lines.append("")
    for dtype in ("float32", "bfloat16"):
        rows = [row for result in results if result["dtype"] == dtype for row in result["rows"]]
        if len({math.prod(row["shape"]) for row in rows}) > 2:
            fits = ", ".join(f"{name} {exponent(rows, name):.2f}" for name in (OURS, LOWRANK, EXACT))
            lines.append(f"- {dtype}: time grows as (m n r) to the power of: {fits}")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for ax, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        rows = [row for result in results if result["dtype"] == dtype for row in result["rows"]]
        rows.sort(key=lambda row: math.prod(row["shape"]) * row["rank"])
        for name in rows[0]["seconds"] if rows else ():
            size = [math.prod(row["shape"]) * row["rank"] for row in rows]
            ax.loglog(size, [median(row["seconds"][name]) for row in rows], "o-", label=name, markersize=3)
        ax.set(title=dtype, xlabel="m n r")
    axes[0].set_ylabel("seconds")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(HERE / "refresh.png", dpi=120)


def main(
    models: list[str] | None = None,
    dtypes: list[str] | None = None,
    rounds: int = 5,
    svd_rounds: int = 1,
    device: str = "cpu",
) -> None:
    """Measure what has no result yet, and write table and figure.

    Args:
        models: some of llama-130m, llama-1b, llama-7b; none: all
        dtypes: some of float32, bfloat16; none: both
        rounds: times that each finder runs on each matrix
        svd_rounds: times that the exact SVD does
        device: cpu or cuda
    """
    on = "" if device == "cpu" else f"_{device}"
    RESULTS.mkdir(exist_ok=True)
    kinds = [(model, dtype) for model in models or MODELS for dtype in dtypes or ("float32", "bfloat16")]
    for model, dtype in kinds:
        file = RESULTS / f"{model}_{dtype}{on}.json"
        if file.exists():
            continue
        hidden, wide = MODELS[model]
        rows = [
            measure(shape, hidden // 4, getattr(torch, dtype), rounds, svd_rounds, device)
            for shape in ((hidden, hidden), (hidden, wide))
        ]
        result = {
            "model": model,
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "gpu": None if device == "cpu" else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "rows": rows,
        }
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(model, dtype, "done", flush=True)
    readme = HERE / "README.md"
    for end, name in (("", "table"), ("_cuda", "gpu")):
        files = [RESULTS / f"{model}_{dtype}{end}.json" for model in MODELS for dtype in ("float32", "bfloat16")]
        results = [json.loads(file.read_text()) for file in files if file.exists()]
        if results:
            new = f"\\1{table(results)}\n\\2"
            readme.write_text(re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", new, readme.read_text(), flags=re.S))
        if not end:
            draw(results)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
