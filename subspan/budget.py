"""Which configurations fit into a budget of memory, best first."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from subspan.memory import GIB
from subspan.optim.presets import FULL_GRADIENT, FULL_RANK
from subspan.plan import MemoryPlan, Planner, describe_cards, describe_optim, describe_run, with_preset
from subspan.training.config import TrainConfig, without_baseline
from subspan.training.models import LLAMA, model_config

UNITS = {"": GIB, "g": GIB, "gib": GIB, "gb": 10**9, "m": 2**20, "mib": 2**20, "mb": 10**6, "tib": 2**40, "tb": 10**12}


@dataclass(frozen=True)
class Space:
    """What a search may choose from, the best first.

    Presets by the loss they reach, as far as that is measured (benchmarks/quality). `project` before `update`, which takes no
    micro-batches and no clipping; `hold` takes the steps of `project` with more memory. `std` is the paper's side. ranks: None: a
    half, a quarter and an eighth of the hidden size.
    """

    presets: Sequence[str] = ("subspan", "adamw", "adamw8bit", "galore", "galore8bit", "qgalore")
    ranks: Sequence[int] | None = None
    checkpointing: Sequence[bool] = (False, True)
    gradients: Sequence[str] = ("project", "update")
    proj_types: Sequence[str] = ("std", "reverse_std")
    micro_batches: Sequence[int] = (64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Fit:
    """A configuration and its plan."""

    config: TrainConfig
    plan: MemoryPlan

    def __str__(self) -> str:
        run = describe_run(self.config)
        checkpointing = ", activation checkpointing" if run["activation_checkpointing"] else ""
        return f"{describe_optim(self.config)}, micro-batch {run['micro_batch']}{checkpointing}"


def parse_size(text: str) -> int:
    """Bytes of "24GiB", "24G" or "24" (2^30 each), "24GB" (10^9 each), "500MiB", "1.5TiB"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    size = int(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else 0
    if not size:
        raise ValueError(f"budget={text!r} is no size: write it like 24GiB or 24GB")
    return size


def search(config: TrainConfig, budget: int, space: Space | None = None, planner: Planner | None = None) -> list[Fit]:
    """The configurations of `space` whose planned peak is at most `budget` bytes, best first; all else is `config`'s.

    Best: the earlier preset of the space, then the larger rank. Of each preset and rank there is one answer: without activation
    checkpointing if that fits, then gradients and side in the space's order, then the largest micro-batch that fits. The number
    of micro-batches to a step stays that of `config`; with more than one, `update` is left out.

    Raises ValueError when nothing fits: what comes closest, and what is missing.
    """
    space, planner = space or Space(), planner or Planner()
    fits = _fits(config, budget, space, planner)
    if not fits:
        closest = min(_smallest(config, space, planner), key=lambda fit: fit.plan.peak)
        peak, weights = closest.plan.peak / GIB, closest.plan.weights / GIB
        raise ValueError(
            f"budget={budget / GIB:.2f}GiB is too small for {config.model.name}: closest is {closest} at {peak:.2f} GiB, "
            f"{(closest.plan.peak - budget) / GIB:.2f} GiB more ({weights:.2f} GiB of it weights)"
        )
    return fits


def largest_model(config: TrainConfig, budget: int, space: Space, planner: Planner) -> list[Fit]:
    """As `search`, of the largest `llama-*` size of which anything fits. Raises ValueError when not even the smallest fits."""
    *larger, smallest = (replace(config, model=replace(config.model, name=name)) for name in reversed(LLAMA))
    for candidate in larger:
        if fits := _fits(candidate, budget, space, planner):
            return fits
    return search(smallest, budget, space, planner)


def describe_fits(fits: Sequence[Fit], budget: int) -> str:
    """What a search found, a line each."""
    config, plan = fits[0].config, fits[0].plan
    lines = [
        f"{config.model.name}, {plan.parameters:,} parameters, {config.model.dtype}, {config.data.seq_len} tokens: "
        f"what fits into {budget / GIB:.2f} GiB, best first\n"
    ]
    for fit in fits:
        cards = describe_cards(fit.plan.cards()[:1])
        lines.append(f"  {fit.plan.peak / GIB:7.2f} GiB  {fit!s:<76} {cards}{' and up' if fit.plan.cards() else ''}")
    return "\n".join(lines)


def _fits(config: TrainConfig, budget: int, space: Space, planner: Planner) -> list[Fit]:
    tried = (_first_fit(config, budget, space, planner, *one) for one in _presets_and_ranks(config, space))
    return [fit for fit in tried if fit is not None]


def _presets_and_ranks(config: TrainConfig, space: Space) -> Iterator[tuple[str, int]]:
    ranks = space.ranks
    if ranks is None:
        hidden: int = model_config(config.model.name, config.model.overrides).get_text_config().hidden_size
        ranks = [max(1, hidden // part) for part in (2, 4, 8)]
    for preset in space.presets:
        if preset == "qgalore" and config.parallel.count > 1:
            continue  # INT8 weights are of one process
        adapters = preset in FULL_RANK and config.model.baseline and space.ranks is None
        for rank in [config.optim.rank] if adapters else ranks[:1] if preset in FULL_RANK else ranks:
            yield preset, rank


def _ways(config: TrainConfig, space: Space, preset: str) -> Iterator[tuple[bool, str, str]]:
    """Checkpointing, gradients and side, best first."""
    averaged = config.parallel.shard == 1 < config.parallel.count and preset in {*FULL_RANK, *FULL_GRADIENT}
    no_update = averaged or config.accumulation > 1 or bool(config.optim.max_grad_norm)
    gradients = [mode for mode in space.gradients if not (no_update and mode == "update")] or space.gradients
    sides = space.proj_types[:1] if preset in FULL_RANK else space.proj_types
    return itertools.product(space.checkpointing, gradients, sides)


def _first_fit(config: TrainConfig, budget: int, space: Space, planner: Planner, preset: str, rank: int) -> Fit | None:
    for checkpointing, gradients, side in _ways(config, space, preset):
        if planner.least(_variant(config, preset, rank, checkpointing, gradients, side, 1)) > budget:
            continue
        for micro_batch in sorted(space.micro_batches, reverse=True):
            variant = _variant(config, preset, rank, checkpointing, gradients, side, micro_batch)
            plan = planner.plan(variant)
            if plan.peak <= budget:
                return Fit(variant, plan)
    return None


def _smallest(config: TrainConfig, space: Space, planner: Planner) -> Iterator[Fit]:
    """The configurations that may take least: the smallest micro-batch, with checkpointing, and least weights and state."""
    micro_batch, checkpointing = min(space.micro_batches), max(space.checkpointing)
    variants = [
        _variant(config, preset, rank, checkpointing, gradients, side, micro_batch)
        for preset, rank in _presets_and_ranks(config, space)
        for on, gradients, side in _ways(config, space, preset)
        if on == checkpointing
    ]
    for variant in sorted(variants, key=planner.least)[:4]:
        yield Fit(variant, planner.plan(variant))


def _variant(
    config: TrainConfig, preset: str, rank: int, checkpointing: bool, gradients: str, side: str, micro_batch: int
) -> TrainConfig:
    batch_size = micro_batch * config.accumulation * config.parallel.count
    model = config.model if preset in FULL_RANK else without_baseline(config.model)
    return replace(
        config,
        model=replace(model, activation_checkpointing=checkpointing),
        optim=with_preset(config.optim, preset, rank=rank, gradients=gradients, proj_type=side),
        run=replace(config.run, batch_size=batch_size, micro_batch=micro_batch),
    )
