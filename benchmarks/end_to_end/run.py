"""Tokens a second of whole training steps: 8-bit GaLore beside AdamW and other packages, refreshes included.

    python benchmarks/end_to_end/run.py
    python benchmarks/end_to_end/run.py --models '[llama-130m]' --dtypes '[float32]'

LLaMA with 4,096 tokens a step, rank a quarter of the hidden size, T = 200. Forward and backward pass are the same for all, so
they are timed once, several times over; then every optimizer in turn steps on the gradients that the last one left. A step's
time is the median pass + the median step between refreshes + 1/200 of a refresh of all matrices: for subspan a warm one, for
packages that take an SVD the time that galore-torch's first step spends in it. Leaves results/MODEL_DTYPE.json beside this
file, where what is there is not run again, and writes README.md's table and end_to_end.png. A package that is not installed, or
has no kernel for this machine, is listed with the reason.
"""

from __future__ import annotations

import contextlib
import gc
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
from subspan.training.models import LLAMA, build_model

HERE = Path(__file__).parent
RESULTS = HERE / "results"

MODELS, DTYPES = ("llama-130m", "llama-350m"), ("float32", "bfloat16")
TOKENS, SEQ_LEN, GAP = 4096, 256, 200
BASE, OURS = "torch AdamW, fused", "subspan"

Build = Callable[[nn.Module, int], torch.optim.Optimizer]


def ours(**options: Any) -> Build:
    return lambda model, rank: subspan.GaLoreAdamW(
        subspan.param_groups(model, rank=rank, update_proj_gap=GAP, verbose=False), 1e-5, compile=True, **options
    )


def peer(
    module: str, name: str, *, dense: bool = False, renamed: dict[str, Any] | None = None, **options: Any
) -> Build:
    """An optimizer of another package, with keys of the projected group changed or added as that package wants them."""

    def build(model: nn.Module, rank: int) -> torch.optim.Optimizer:
        package = __import__(module, fromlist=[name])
        if dense:
            groups: list[Any] = [{"params": list(model.parameters())}]
        else:
            groups = [
                {"params": [p for _, p in group["params"]]}
                | ({"rank": rank, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"} if "rank" in group else {})
                | ((renamed or {}) if "rank" in group else {})
                for group in subspan.param_groups(model, rank=rank, verbose=False)
            ]
        optimizer: torch.optim.Optimizer = getattr(package, name)(groups, lr=1e-5, **options)
        return optimizer

    return build


METHODS: dict[str, Build] = {
    BASE: peer("torch.optim", "AdamW", dense=True, fused=True),
    "torch AdamW, foreach": peer("torch.optim", "AdamW", dense=True, foreach=True),
    f"{OURS}, 8-bit GaLore": ours(state_dtype=torch.int8),
    f"{OURS}, GaLore": ours(),
    "galore-torch GaLoreAdamW": peer("galore_torch", "GaLoreAdamW", no_deprecation_warning=True),
    "pytorch-optimizer GaLore": peer("pytorch_optimizer", "GaLore", renamed={"projection_type": "std"}),
    "fira FiraAdamW": peer("fira", "FiraAdamW", renamed={"alpha": 1.0}, no_deprecation_warning=True),
    "apollo-torch APOLLOAdamW": peer(
        "apollo_torch", "APOLLOAdamW", renamed={"proj": "random", "scale_type": "channel", "scale": 1.0}
    ),
    "bitsandbytes AdamW8bit": peer("bitsandbytes.optim", "AdamW8bit", dense=True),
    "torchao AdamW8bit": peer("torchao.optim", "AdamW8bit", dense=True),
}
FINDS_BY_SVD = ("galore-torch", "pytorch-optimizer", "fira")
"""Beginnings of the names of those whose refresh is an exact SVD of every matrix."""


@contextlib.contextmanager
def svd(exact: bool) -> Iterator[list[float]]:
    """Seconds of every SVD taken; if they need not be exact, any orthonormal basis takes their place, in no time."""
    seconds, real = [], torch.linalg.svd

    def replaced(X: Tensor, full_matrices: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        begin = time.perf_counter()
        if exact:
            U, S, Vh = real(X, full_matrices=full_matrices)
        else:
            least = min(X.shape)
            U, Vh = torch.eye(X.shape[0], least), torch.eye(least, X.shape[1])
            U, S, Vh = U.to(X.dtype), torch.ones(least), Vh.to(X.dtype)
        seconds.append(time.perf_counter() - begin)
        return U, S, Vh

    torch.linalg.svd = replaced  # type: ignore[assignment]
    try:
        yield seconds
    finally:
        torch.linalg.svd = real


def timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def passes(model: Any, batch: Tensor, micro_batch: int) -> None:
    """Forward and backward pass of a whole step; leaves the gradients."""
    model.zero_grad()
    for part in batch.split(micro_batch):
        loss = model(input_ids=part, labels=part, use_cache=False).loss
        (loss * (len(part) / len(batch))).backward()


def measure(name: str, dtype: str, methods: list[str], steps: int, micro_batch: int) -> dict[str, Any]:
    rank = LLAMA[name]["hidden_size"] // 4
    torch.manual_seed(0)
    model = build_model(name, dtype=dtype, seq_len=SEQ_LEN).train()
    batch = torch.randint(32000, (TOKENS // SEQ_LEN, SEQ_LEN))
    result: dict[str, Any] = {"model": name, "dtype": dtype, "rank": rank, "threads": torch.get_num_threads()}
    result |= {"passes": [timed(lambda: passes(model, batch, micro_batch)) for _ in range(steps + 1)][1:]}
    result |= {"steps": {}, "refresh": {}, "reasons": {}}
    for method in methods:
        try:
            optimizer = METHODS[method](model, rank)
            with svd(exact=method.startswith("galore-torch")) as seconds:
                optimizer.step()  # the first: bases, and what is compiled
            result["steps"][method] = [timed(optimizer.step) for _ in range(steps)]
        except Exception as error:
            result["reasons"][method] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if method.startswith("galore-torch"):
            result["refresh"] |= {m: sum(seconds) for m in methods if m.startswith(FINDS_BY_SVD)}
        if isinstance(optimizer, subspan.ProjectedOptimizer):
            for group in optimizer.param_groups:
                group["update_proj_gap"] = 1
            before = optimizer.refresh_seconds
            optimizer.step()
            result["refresh"][method] = optimizer.refresh_seconds - before
        print(name, dtype, method, f"{median(result['steps'][method]):.2f} s", flush=True)
        del optimizer
        gc.collect()
    return result


# --------------------------------------------------------------------------------------------------------------- output


def seconds_of(result: dict[str, Any], method: str) -> tuple[float, float, float]:
    """Of a step: forward and backward pass, optimizer between refreshes, its share of a refresh."""
    refresh = result["refresh"].get(method, 0.0) / GAP
    return median(result["passes"]), median(result["steps"][method]), refresh


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| model | method | tokens/s over fused AdamW's | share of the optimizer's step() | of refreshes |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        base = sum(seconds_of(result, BASE))
        for method in result["steps"]:
            model, step, refresh = seconds_of(result, method)
            whole = model + step + refresh
            name = f"**{method}**" if method.startswith(OURS) else method
            cells = f"{base / whole:.3f} | {step / whole:.1%} | {refresh / whole:.2%}"
            lines.append(f"| {result['model']}, {result['dtype']} | {name} | {cells} |")
    reasons = {method: why for result in results for method, why in result["reasons"].items()}
    return "\n".join(lines + [""] + [f"- {method} does not run: `{why}`" for method, why in reasons.items()])


def draw(results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(3.4 * len(results) + 2, 4), sharey=True, squeeze=False)
    for ax, result in zip(axes[0], results, strict=True):
        names = [name for name in METHODS if name in result["steps"]][::-1]
        base = sum(seconds_of(result, BASE))
        ax.barh(
            names,
            [base / sum(seconds_of(result, name)) for name in names],
            color=["#4c72b0" if name.startswith(OURS) else "#c0c0c0" for name in names],
        )
        ax.axvline(0.95, color="black", linewidth=0.8)
        ax.set_title(f"{result['model']}, {result['dtype']}", fontsize=9)
        ax.set_xlabel("tokens/s over fused AdamW's", fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "end_to_end.png", dpi=120)


def main(
    models: list[str] | None = None,
    dtypes: list[str] | None = None,
    methods: list[str] | None = None,
    steps: int = 5,
    micro_batch: int = 4,
) -> None:
    """Measure what has no result yet, and write table and figure.

    Args:
        models: some of llama-130m, llama-350m; none: both
        dtypes: of weights and arithmetic, some of float32, bfloat16; none: both
        methods: some of the methods, fused AdamW among them; none: all
        steps: timed passes, and timed steps of each method, after one that is not
        micro_batch: sequences in a forward and backward pass
    """
    RESULTS.mkdir(exist_ok=True)
    for name in models or MODELS:
        for dtype in dtypes or DTYPES:
            file = RESULTS / f"{name}_{dtype}.json"
            if not file.exists():
                result = measure(name, dtype, methods or list(METHODS), steps, micro_batch)
                file.write_text(json.dumps(result | {"torch": torch.__version__}, indent=1) + "\n")
    files = [RESULTS / f"{name}_{dtype}.json" for name in MODELS for dtype in DTYPES]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    readme = HERE / "README.md"
    new = f"\\1{table(results)}\n\\2"
    readme.write_text(re.sub(r"(<!-- table -->\n).*?(<!-- end -->)", new, readme.read_text(), flags=re.S))
    draw(results)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
