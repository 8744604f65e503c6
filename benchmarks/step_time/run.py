"""Time of an optimizer's step between two refreshes, matrix by matrix: ours, its peers', and what no such step can do without.

    python benchmarks/step_time/run.py
    python benchmarks/step_time/run.py --models '[llama-130m]' --dtypes '[bfloat16]'
    python benchmarks/step_time/run.py --device cuda --dtypes '[bfloat16]'

One weight of each shape of a LLaMA layer with a gradient, rank a quarter of the hidden size. All optimizers take turns within a
round, and beside them the two matrix products of GaLore alone (R = Q^T G, W <- W - Q U), so that a busy moment meets all; a
ratio is that of medians. On a GPU a turn is 20 steps in a row, so that launches hide where they can. Leaves
results/MODEL_DTYPE[_DEVICE].json beside this file, where what is there is not run again, and writes
README.md's tables and step_time.png. A package that is not installed, or has no kernel for this machine, is listed with the
reason.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import subspan
from subspan.optim.presets import PRESETS

HERE = Path(__file__).parent
RESULTS = HERE / "results"

MODELS = {"llama-130m": (768, 2048), "llama-1b": (2048, 5461), "llama-7b": (4096, 11008)}  # hidden, intermediate
PRODUCTS, OURS = "two products", "subspan"
FULL_RANK = ("torch AdamW", "bitsandbytes", "torchao")
"""Beginnings of the names of methods that project nothing."""

Group = dict[str, Any]


def ours(**options: Any) -> Callable[[Group], torch.optim.Optimizer]:
    refresh = subspan.Refresh(first="random", stagger=1)
    return lambda group: subspan.GaLoreAdamW([group], 1e-5, refresh=refresh, **options)


def preset(name: str, **keys: Any) -> Callable[[Group], torch.optim.Optimizer]:
    """A preset over the group, with keys of its own; rank=None: of a matrix that is not projected."""

    def build(group: Group) -> torch.optim.Optimizer:
        full = {"params": group["params"], "full_rank": True}
        refresh = subspan.Refresh(first="random", stagger=1)
        return PRESETS[name]([{**group, **keys} if keys.get("rank", 1) else full], 1e-5, refresh=refresh)

    return build


def peer(module: str, name: str, *, dense: bool = False, renamed: dict[str, Any] | None = None, **options: Any) -> Any:
    """An optimizer of another package over the group, with keys changed or added as that package wants them."""

    def build(group: Group) -> torch.optim.Optimizer:
        package = __import__(module, fromlist=[name])
        keys = {"params": group["params"]} if dense else {**group, **(renamed or {})}
        optimizer: torch.optim.Optimizer = getattr(package, name)([keys], lr=1e-5, **options)
        return optimizer

    return build


METHODS: dict[str, Callable[[Group], torch.optim.Optimizer]] = {
    f"{OURS}, fp32 state": ours(compile=True),
    f"{OURS}, fp32 state, eager": ours(compile=False),
    f"{OURS}, 8 bits": ours(compile=True, state_dtype=torch.int8),
    f"{OURS}, 8 bits, eager": ours(compile=False, state_dtype=torch.int8),
    f"{OURS}, Fira": ours(combine=subspan.Fira()),
    f"{OURS}, APOLLO": ours(combine=subspan.Apollo(), projector=subspan.Random()),
    f"{OURS}, LDAdam in 8 bits": preset("ldadam", update_proj_gap=1, scale=1.0),
    f"{OURS}, the preset `subspan`": preset("subspan", rank=None),
    "galore-torch GaLoreAdamW": peer("galore_torch", "GaLoreAdamW", no_deprecation_warning=True),
    "galore-torch GaLoreAdamW8bit": peer("galore_torch", "GaLoreAdamW8bit"),
    "q-galore-torch": peer("q_galore_torch", "QGaLoreAdamW8bit"),
    "pytorch-optimizer GaLore": peer("pytorch_optimizer", "GaLore", renamed={"projection_type": "std"}),
    "fira FiraAdamW": peer("fira", "FiraAdamW", renamed={"alpha": 1.0}, no_deprecation_warning=True),
    "apollo-torch APOLLOAdamW": peer(
        "apollo_torch", "APOLLOAdamW", renamed={"proj": "random", "scale_type": "channel", "scale": 1.0}
    ),
    "torch AdamW, foreach": peer("torch.optim", "AdamW", dense=True, foreach=True),
    "torch AdamW, fused": peer("torch.optim", "AdamW", dense=True, fused=True),
    "bitsandbytes AdamW8bit": peer("bitsandbytes.optim", "AdamW8bit", dense=True),
    "torchao AdamW8bit": peer("torchao.optim", "AdamW8bit", dense=True),
}


@contextlib.contextmanager
def quick_svd() -> Iterator[None]:
    """Peers find their first basis by an exact SVD, minutes at 7B's shapes: here it is orthonormal, which is all a step needs."""

    def svd(X: Tensor, full_matrices: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        least = min(X.shape)
        generator = torch.Generator().manual_seed(0)
        U, V = (torch.linalg.qr(torch.randn(n, least, generator=generator).to(X.device)).Q for n in X.shape)
        return U.to(X.dtype), torch.ones(least, device=X.device), V.mT.to(X.dtype)

    exact = torch.linalg.svd
    torch.linalg.svd = svd  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.linalg.svd = exact


def products(W: Tensor, G: Tensor, rank: int) -> Callable[[], None]:
    """The two products of a step with a basis on the short side, and nothing else."""
    tall = W.shape[0] >= W.shape[1]
    W, G = (X.detach() if not tall else X.detach().mT for X in (W, G))
    Q = torch.linalg.qr(torch.randn(W.shape[0], rank, device=W.device)).Q.to(W.dtype)
    U = (Q.mT @ G).contiguous()

    def both() -> None:
        _ = Q.mT @ G
        W.addmm_(Q, U, alpha=-1e-5)

    return both


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Of one call; on a GPU, of one of 20 in a row, the last of which is waited for."""
    calls = 1 if device == "cpu" else 20
    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    if device != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) / calls


def measure(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, rounds: int, seconds: float, device: str
) -> dict[str, Any]:
    """Seconds of each step of each method on one weight; at most `rounds` rounds, and none begun after `seconds`."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(shape, generator=generator).to(device, dtype)
    weight = lambda: nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))  # noqa: E731
    steps: dict[str, Callable[[], Any]] = {PRODUCTS: products(weight(), G, rank)}
    reasons: dict[str, str] = {}
    for name, build in METHODS.items():
        p = weight()
        try:
            optimizer = build(
                {"params": [p], "rank": rank, "update_proj_gap": 10**6, "scale": 0.25, "proj_type": "std"}
            )

            def step(p: Tensor = p, optimizer: torch.optim.Optimizer = optimizer) -> None:
                p.grad = G  # each time, since some packages put another in its place
                optimizer.step()

            with quick_svd():
                step()
            step()
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        steps[name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    for number in range(rounds + 1):  # one round to warm up
        for name, step in steps.items():
            took = seconds_of(step, device)
            if number:
                times[name].append(took)
        if number >= 5 and time.perf_counter() - begin > seconds:
            break
    return {"shape": shape, "rank": rank, "seconds": times, "reasons": reasons}


def machine(dtype: torch.dtype, device: str) -> dict[str, float]:
    """What the machine does at best here: operations a second of a large product, bytes a second of a copy."""
    A, B = (torch.randn(4096, n, device=device).to(dtype) for n in (4096, 1024))
    X = torch.empty(2**27 if device == "cpu" else 2**32, dtype=torch.uint8, device=device)
    Y = torch.zeros_like(X)

    def fastest(work: Callable[[], Any]) -> float:
        return min([seconds_of(work, device) for _ in range(7)][1:])

    return {
        "flops": 2 * 4096 * 4096 * 1024 / fastest(lambda: A @ B),
        "bandwidth": 2 * X.numel() / fastest(lambda: X.copy_(Y)),
    }


def floor(row: dict[str, Any], best: dict[str, float], element: int) -> float:
    """Seconds that a step with fp32 moments takes at the least: operations over the rate of products, or bytes over bandwidth.

    Both products, 2 d k r operations each. Bytes once: G and Q read, W read and written, moments (two, fp32) read and written, R
    written and read.
    """
    (m, n), r = row["shape"], row["rank"]
    d, k = min(m, n), max(m, n)
    moved = element * (3 * m * n + d * r + 2 * r * k) + 4 * 4 * r * k
    return max(4 * d * k * r / best["flops"], moved / best["bandwidth"])


# --------------------------------------------------------------------------------------------------------------- output


def tables(results: list[dict[str, Any]]) -> str:
    text = []
    for result in results:
        where = result.get("gpu") or f"{result['threads']} threads"
        element = getattr(torch, result["dtype"]).itemsize
        shapes = [f"{m} x {n}" for m, n in (row["shape"] for row in result["rows"])]
        text += [
            f"**{result['model']}, {result['dtype']}**, rank {result['rows'][0]['rank']}: time over that of the two products, "
            f"{where}; products at {result['machine']['flops'] / 1e9:.0f} GFLOP/s, copies at "
            f"{result['machine']['bandwidth'] / 1e9:.0f} GB/s at best",
            "",
            f"| step | {' | '.join(shapes)} |",
            f"|---|{'---|' * len(shapes)}",
        ]
        floors = [floor(row, result["machine"], element) / median(row["seconds"][PRODUCTS]) for row in result["rows"]]
        text.append(f"| the machine's floor | {' | '.join(f'{value:.2f}' for value in floors)} |")
        for name in METHODS:
            cells = [
                f"{median(row['seconds'][name]) / median(row['seconds'][PRODUCTS]):.2f}"
                if name in row["seconds"]
                else "-"
                for row in result["rows"]
            ]
            if any(cell != "-" for cell in cells):
                text.append(f"| {'**' + name + '**' if name.startswith(OURS) else name} | {' | '.join(cells)} |")
        text.append("")
    reasons = {
        (name, result.get("gpu") or "the CPU"): why
        for result in results
        for row in result["rows"]
        for name, why in row["reasons"].items()
    }
    text += [f"- {name} has no number on {where}: `{why}`" for (name, where), why in reasons.items()]
    return "\n".join(text)


def draw(results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in METHODS if all(name in row["seconds"] for result in results for row in result["rows"])]
    figure, axes = plt.subplots(1, len(results), figsize=(3.2 * len(results) + 2, 4.5), sharey=True, squeeze=False)
    for ax, result in zip(axes[0], results, strict=True):
        layer = lambda name, result=result: sum(median(row["seconds"][name]) for row in result["rows"])  # noqa: E731
        values = [layer(name) / layer(PRODUCTS) for name in names]
        colours = ["#4c72b0" if name.startswith(OURS) else "#c0c0c0" for name in names]
        ax.barh(names[::-1], values[::-1], color=colours[::-1])
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_title(f"{result['model']}, {result['dtype']}{', GPU' if result.get('gpu') else ''}", fontsize=9)
        ax.set_xlabel("time of a step / two products", fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "step_time.png", dpi=120)


def main(
    models: list[str] | None = None,
    dtypes: list[str] | None = None,
    rounds: int = 30,
    seconds: float = 60.0,
    device: str = "cpu",
) -> None:
    """Measure what has no result yet, and write tables and figure.

    Args:
        models: some of llama-130m, llama-1b, llama-7b; none: all
        dtypes: some of float32, bfloat16; none: both
        rounds: steps of each optimizer on each shape
        seconds: no further round on a shape after so long
        device: cpu or cuda
    """
    on = "" if device == "cpu" else f"_{device}"
    RESULTS.mkdir(exist_ok=True)
    for model in models or MODELS:
        for dtype in dtypes or ("float32", "bfloat16"):
            file = RESULTS / f"{model}_{dtype}{on}.json"
            if file.exists():
                continue
            hidden, wide = MODELS[model]
            rows = [
                measure(shape, hidden // 4, getattr(torch, dtype), rounds, seconds, device)
                for shape in ((hidden, hidden), (wide, hidden), (hidden, wide))
            ]
            result = {
                "model": model,
                "dtype": dtype,
                "machine": machine(getattr(torch, dtype), device),
                "gpu": None if device == "cpu" else torch.cuda.get_device_name(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "rows": rows,
            }
            file.write_text(json.dumps(result, indent=1) + "\n")
            print(model, dtype, "done", flush=True)
    results = [
        json.loads((RESULTS / name).read_text())
        for end in ("", "_cuda")
        for m in MODELS
        for t in ("float32", "bfloat16")
        if (RESULTS / (name := f"{m}_{t}{end}.json")).exists()
    ]
    readme = HERE / "README.md"
    new = f"\\1{tables(results)}\n\\2"
    readme.write_text(re.sub(r"(<!-- tables -->\n).*?(<!-- end -->)", new, readme.read_text(), flags=re.S))
    draw(results)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
