"""Gradient memory in each mode of `gradients`, measured on the paper's LLaMA 130M and 350M.

    python benchmarks/peak_memory/run.py

Every row of the table is measured three times, each time in a process of its own: once with every allocation of a tensor
counted, twice undisturbed for the resident memory of the process. Rank and T come from recipes/. Every row leaves a file in
results/ beside this file; what is there is not measured again. The tables of README.md are written from these files.
Linux with glibc only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import re
import resource
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from subspan.memory import count_memory
from subspan.optim.backward import Gradients
from subspan.optim.groups import param_groups
from subspan.optim.presets import GaLoreAdamW
from subspan.optim.refresh import Refresh
from subspan.training.models import build_model

HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "recipes"

STEPS = 3  # with Refresh(first="random") a refresh is due at step 0 in both models
ADDRESS_SPACE = 16 * 2**30  # a mistake ends the process, not the machine
MIB = 2**20
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Row:
    """One line of the table. tokens: of a micro-batch, one sequence."""

    model: str
    mode: Gradients
    micro_batches: int
    dtype: str = "float32"
    tokens: int = 32

    @property
    def name(self) -> str:
        return f"{self.model}_{self.dtype}_{self.mode}_x{self.micro_batches}"


ROWS = [
    Row(model, mode, micro_batches)
    for model in ("llama-130m", "llama-350m")
    for mode, micro_batches in (("hold", 1), ("project", 1), ("update", 1), ("hold", 4), ("project", 4))
]


def recipe_of(model: str) -> dict[str, Any]:
    recipe: dict[str, Any] = yaml.safe_load((RECIPES / f"{model.replace('-', '_')}_galore.yaml").read_text())
    return recipe


def make_model(model: str, dtype: str, device: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A model of a recipe with its parameter groups."""
    recipe = recipe_of(model)
    network = build_model(model, dtype=dtype, overrides=recipe["model"]["overrides"], device=device)
    optim = recipe["optim"]
    groups = param_groups(network, rank=optim["rank"], update_proj_gap=optim["update_proj_gap"], verbose=False)
    return network, groups


# ----------------------------------------------------------------------------------------- expected, from shapes alone


def full_bytes(groups: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of all gradients: what `hold` keeps."""
    return sum(nbytes(p) for group in groups for _, p in group["params"])


def most_between(groups: Sequence[Mapping[str, Any]], mode: Gradients, step: int) -> int:
    """The most bytes of gradients that may be alive between the backward pass and step().

    hold: all. project: r/d of those of the projected matrices, d the short side, and all of the matrices that are refreshed in
    this step, and all of the dense ones. update: none. The schedule is written out here a second time on purpose.
    """
    if mode == "update":
        return 0
    if mode == "hold":
        return full_bytes(groups)
    most = 0
    for group in groups:
        pairs = group["params"]
        for i, (_, p) in enumerate(pairs):
            if "rank" not in group:
                most += nbytes(p)
                continue
            d = min(p.shape)
            most += nbytes(p) * min(group["rank"], d) // d
            gap = group["update_proj_gap"]
            first = i * gap // len(pairs)
            if step >= first and (step - first) % gap == 0:
                most += nbytes(p)
    return most


# ---------------------------------------------------------------------------------------------------------- measuring


def nbytes(X: Tensor) -> int:
    """Of what X keeps alive: all of the memory that a view looks at."""
    return X.untyped_storage().nbytes() if not X.is_meta else X.numel() * X.element_size()


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors alive, after every operation: each storage counts once, from the operation that returns it
    until it is freed.

    torch's own MemTracker (torch.distributed._tools) works the same way, but raises at the second forward pass of a step, so
    micro-batches are out of its reach, and its hooks warn of every gradient that an earlier hook has freed.
    """

    def __init__(self, alive: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()
        for X in alive:
            self.add(X)

    def add(self, X: Tensor) -> None:
        storage = X.untyped_storage()
        if storage not in self.known:
            size = storage.nbytes()
            self.known[storage] = weakref.ref(storage, lambda _: self.free(size))
            self.now += size

    def free(self, size: int) -> None:
        self.now -= size

    def take_peak(self) -> int:
        """The peak since the last call; the next one starts from what is alive now."""
        peak, self.peak = max(self.peak, self.now), self.now
        return peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for X in tree_leaves(result):
            if isinstance(X, Tensor):
                self.add(X)
        self.peak = max(self.peak, self.now)
        return result


class GradientBytes:
    """Bytes of gradients now, and their peak in the backward pass, from hooks on both sides of the optimizer's own.

    Gradients are p.grad of every parameter, the low-rank gradients of `project`, and one that just came out of autograd.
    Exact: these change only where a parameter's gradient arrives.
    """

    def __init__(self, optimizer: GaLoreAdamW) -> None:
        self.optimizer = optimizer
        self.peak = 0
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.register_hook(self.arrived)
                p.register_post_accumulate_grad_hook(self.taken)

    def now(self) -> dict[str, int]:
        """Full gradients of projected parameters, low-rank gradients, gradients of dense parameters."""
        sizes = {"full": 0, "low_rank": 0, "dense": 0}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    sizes["full" if "rank" in group else "dense"] += nbytes(p.grad)
        backward = self.optimizer._backward
        if backward:
            sizes["low_rank"] = sum(map(nbytes, backward.low_rank.values()))
        return sizes

    def arrived(self, G: Tensor) -> None:
        self.peak = max(self.peak, sum(self.now().values()) + nbytes(G))

    def taken(self, p: Tensor) -> None:
        freed = nbytes(p) if p.grad is None else 0  # was alive beside its R until the end of the optimizer's hook
        self.peak = max(self.peak, sum(self.now().values()) + freed)


@dataclass
class Bench:
    """A model, its optimizer and its data."""

    row: Row

    def __post_init__(self) -> None:
        row = self.row
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.model, self.groups = make_model(row.model, row.dtype, "cpu")
        self.expected = [most_between(self.groups, row.mode, step) for step in range(STEPS)]
        self.full = full_bytes(self.groups)
        # One refresh schedule for all modes, so that they do the same work; `hold` alone would refresh all at step 0.
        self.optimizer = GaLoreAdamW(
            self.groups, lr=recipe_of(row.model)["optim"]["lr"], gradients=row.mode, refresh=Refresh(first="random")
        )
        vocabulary = self.model.get_input_embeddings().num_embeddings
        self.data = torch.randint(vocabulary, (row.micro_batches, 1, row.tokens))

    def loss(self, x: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=x, labels=x).loss / self.row.micro_batches
        return loss

    def end_step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure_live(row: Row) -> dict[str, Any]:
    """Bytes of tensors in each step, above what was alive before its forward pass."""
    bench = Bench(row)
    gradients = GradientBytes(bench.optimizer)
    state = [X for values in bench.optimizer.state.values() for X in values.values()]
    steps = []
    with LiveBytes([*bench.model.parameters(), *bench.model.buffers(), *state, bench.data]) as live:
        for step in range(STEPS):
            before, gradients.peak = live.now, 0
            backward_peak = step_peak = live.take_peak()
            for x in bench.data.unbind():
                loss = bench.loss(x)
                step_peak = max(step_peak, live.take_peak())
                loss.backward()
                del loss
                peak = live.take_peak()
                backward_peak, step_peak = max(backward_peak, peak), max(step_peak, peak)
            between = gradients.now()
            total, bound = sum(between.values()), bench.expected[step]
            rest = live.now - before - total
            assert total <= bound, f"{row.name}, step {step}: {total} bytes of gradients, at most {bound} were expected"
            # Gradients are all that is alive: none hides from `between` in another tensor. (Norms are, in `update`.)
            assert 0 <= rest < MIB, f"{row.name}, step {step}: {rest} bytes are alive beside the gradients"
            bench.end_step()
            steps.append(
                {
                    "between": between,
                    "bound": bound,
                    "gradients_peak": gradients.peak,
                    "live_peak_backward": backward_peak - before,
                    "live_peak_step": max(step_peak, live.take_peak()) - before,
                    "alive_beside_gradients": rest,
                    "left_after_step": live.now - before,
                }
            )
    return {"all_gradients": bench.full, "steps": steps}


def measure_resident(row: Row, holes: bool = True) -> dict[str, Any]:
    """Growth of the resident memory of this process over the steps, at its peak.

    holes: glibc as it is, which keeps freed memory of up to 32 MiB a block on its heap, where a smaller block may stand in the
    way of the next large one. Without: every block of 256 KiB or more is the system's, and goes back to it when freed.
    """
    libc = ctypes.CDLL(None)
    if not holes:
        libc.mallopt(M_MMAP_THRESHOLD, 2**18)
    bench = Bench(row)
    memory = count_memory(bench.model, bench.optimizer)
    gc.collect()
    libc.malloc_trim(0)  # memory freed while the model was built would take the first gradients, unseen
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # ru_maxrss would remember a higher peak of building the model
    for _ in range(STEPS):
        for x in bench.data.unbind():
            bench.loss(x).backward()
        bench.end_step()
    return {
        "weights": memory.weights,
        "optimizer": memory.optimizer,
        "resident_before": before,
        "resident_growth": resident("VmHWM") - before,
    }


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS is resident now, VmHWM at its peak."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def measure(row: Row, what: str) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    return MEASUREMENTS[what](row)


MEASUREMENTS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "live": measure_live,
    "resident": measure_resident,
    "resident_without_holes": partial(measure_resident, holes=False),
}


# ------------------------------------------------------------------------------------------------------------- tables


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: each number is the largest of the steps; the bound is that of the step with most gradients."""
    lines = [
        "| model | mode | micro-batches | gradients between backward and step() | share of hold's | bound "
        "| gradients, peak in backward | tensors, peak in backward | tensors, peak of the step "
        "| resident, peak | resident, heap without holes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        steps = result["live"]["steps"]
        most = max(steps, key=lambda step: sum(step["between"].values()))
        between = sum(most["between"].values())
        peaks = [max(step[key] for step in steps) for key in ("gradients_peak", "live_peak_backward", "live_peak_step")]
        resident = [result[what]["resident_growth"] for what in ("resident", "resident_without_holes")]
        sizes = [most["bound"], *peaks, *resident]
        lines.append(
            f"| {result['model']} | {result['mode']} | {result['micro_batches']} | {between / MIB:.1f} | "
            f"{between / result['live']['all_gradients']:.1%} | " + " | ".join(f"{n / MIB:.1f}" for n in sizes) + " |"
        )
    return "\n".join(lines)


def parts(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: what the gradients between backward and step() of `project` consist of, a step a line."""
    lines = [
        "| model | step | low-rank gradients | full, of matrices being refreshed | dense | sum | bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        if (result["mode"], result["micro_batches"]) == ("project", 1):
            for i, step in enumerate(result["live"]["steps"]):
                part = step["between"]
                sizes = [part["low_rank"], part["full"], part["dense"], sum(part.values()), step["bound"]]
                lines.append(f"| {result['model']} | {i} | " + " | ".join(f"{n / MIB:.1f}" for n in sizes) + " |")
    return "\n".join(lines)


def computed(models: Sequence[str] = ("llama-130m", "llama-350m", "llama-1b", "llama-7b")) -> str:
    """Markdown: the bound for bf16 weights, from shapes alone, at the step of a refresh interval where it is largest."""
    lines = [
        "| model | rank | T | hold | of it projected, dense | project, at most | share of hold's |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in models:
        optim = recipe_of(model)["optim"]
        _, groups = make_model(model, "bfloat16", "meta")
        full = full_bytes(groups)
        most = max(most_between(groups, "project", step) for step in range(optim["update_proj_gap"]))
        dense = full_bytes([group for group in groups if "rank" not in group])
        cells = f"{full / 1e9:.2f} GB | {(full - dense) / 1e9:.2f}, {dense / 1e9:.2f} GB | {most / 1e9:.2f} GB"
        lines.append(f"| {model} | {optim['rank']} | {optim['update_proj_gap']} | {cells} | {most / full:.1%} |")
    return "\n".join(lines)


def write_tables() -> None:
    """The tables of README.md, from results/*.json."""
    paths = [HERE / "results" / f"{row.name}.json" for row in ROWS]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    results = [result for result in results if all(what in result for what in MEASUREMENTS)]
    readme = HERE / "README.md"
    text = readme.read_text()
    for name, content in (("table", table(results)), ("parts", parts(results)), ("computed", computed())):
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{content}\n\g<2>", text, flags=re.DOTALL)
    readme.write_text(text)


def main(only: str = "") -> None:
    """Measure what has no result yet, then write the tables.

    Args:
        only: only rows whose name contains this, such as llama-130m or project_x4
    """
    (HERE / "results").mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    for row in ROWS:
        path = HERE / "results" / f"{row.name}.json"
        result = json.loads(path.read_text()) if path.exists() else {**asdict(row), "torch": torch.__version__}
        for what in MEASUREMENTS:
            if only in row.name and what not in result:
                with ProcessPoolExecutor(1, context) as pool:  # a process of its own for every measurement
                    result[what] = pool.submit(measure, row, what).result()
                path.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{row.name}: {what}", flush=True)
    write_tables()


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
