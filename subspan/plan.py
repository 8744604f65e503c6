"""The memory planner: what a run will take, before any weight exists.

    plan_memory(config)              weights, gradients, optimizer, activations, temporaries and peak of one configuration
    search(...)  in budget.py        the configurations that fit into so many bytes, best first

No shape rule is written down here a second time. The model and the optimizer are the real ones, built by the trainer's own
functions on fake tensors, which have shapes and no memory, and two things are watched operation by operation (live.py):

    trace    one forward and backward pass of the model alone: activations and temporaries after every operation, and where in it
             each parameter's gradient arrives
    costs    what the optimizer does to one gradient, for every distinct shape: its hook at arrival, `prepare()`, `step()`, with
             and without a refresh

A step is the trace with each arrival replaced by its parameter's cost: gradients that wait add up, everything else is freed
before the next one arrives. So one trace serves all optimizers, and a search over hundreds of them takes seconds.

Planned is what the tensors of one process take at the fullest moment of the step whose refreshes take most, as `train()` runs
it. Python, the libraries' code and the allocator's own leftovers come on top, a few hundred MiB.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from subspan.extras import require
from subspan.memory import GIB, MemoryTable, count_memory
from subspan.optim.optimizer import ProjectedOptimizer
from subspan.optim.presets import FULL_GRADIENT, FULL_RANK
from subspan.optim.quant import init_basis, quantize, write_basis
from subspan.simulation import Cost, Phase, PhaseName, Trace, put_together, watch_passes, watch_update
from subspan.traffic import Payload
from subspan.training.baselines import add_baseline
from subspan.training.config import OF_BASES, WITHOUT_BETAS, WITHOUT_EPS, OptimConfig, TrainConfig, as_given
from subspan.training.models import build_model
from subspan.training.optimizers import build_optimizer, groups_of
from subspan.training.processes import make_mesh, shard_model

CARDS = (8, 12, 16, 24, 32, 40, 48, 80)
"""Memory of common cards in GiB."""

CARD_RESERVE = 3 * GIB // 2
"""Bytes of a card that a plan does not see: the driver's context, libraries, holes of the allocator; 1.2 to 1.4 GiB of an H100
with LLaMA-7B (benchmarks/train_7b_gpu)."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, and the number of parameters. The columns are those of the fullest moment, so they add up to `peak`.

    gradients: full ones and low-rank ones. activations: made by the forward pass, logits included. temporaries: the rest, as
    gradients of activations, recomputed activations, and what the optimizer works with.
    phases: the fullest moment of each. `refresh` is a gradient's arrival or preparation when its basis changes.
    """

    parameters: int
    weights: int
    basis: int
    moments: int
    phases: Mapping[PhaseName, Phase]

    @property
    def peak_at(self) -> PhaseName:
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def gradients(self) -> int:
        return self.phases[self.peak_at].gradients

    @property
    def activations(self) -> int:
        return self.phases[self.peak_at].activations

    @property
    def temporaries(self) -> int:
        return self.phases[self.peak_at].temporaries

    @property
    def optimizer(self) -> int:
        """Basis and moments."""
        return self.basis + self.moments

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + self.phases[self.peak_at].total

    def rows(self) -> list[tuple[str, int]]:
        """(name, bytes) in the order of the printed table; the last is the sum of the others."""
        return [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer: basis", self.basis),
            ("optimizer: moments", self.moments),
            ("activations", self.activations),
            ("temporaries", self.temporaries),
            ("peak", self.peak),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, in bytes."""
        base = self.weights + self.optimizer
        return {
            **{name.replace("optimizer: ", ""): size for name, size in self.rows()},
            "optimizer": self.optimizer,
            "parameters": self.parameters,
            "peak_at": self.peak_at,
            "phases": {name: {**dataclasses.asdict(p), "total": base + p.total} for name, p in self.phases.items()},
            "cards": self.cards(),
        }

    def cards(self) -> list[int]:
        """The cards, in GiB, that `peak` fits into."""
        return [size for size in CARDS if self.peak <= size * GIB - CARD_RESERVE]

    def describe(self, config: TrainConfig) -> str:
        """What was planned, in two lines of words."""
        run = describe_run(config)
        passes = "" if run["accumulation"] == 1 else f", {run['accumulation']} times a step"
        checkpointing = ", activation checkpointing" if run["activation_checkpointing"] else ""
        return (
            f"{run['model']}, {self.parameters:,} parameters, {run['dtype']}, "
            f"{run['micro_batch']} x {run['seq_len']} tokens{passes}{checkpointing}\n{describe_optim(config)}"
        )

    def __str__(self) -> str:
        lines = [f"  {name:<20}{size / GIB:10.3f} GiB" for name, size in self.rows()]
        base = self.weights + self.optimizer
        phases = [f"{name} {(base + phase.total) / GIB:.3f}" for name, phase in self.phases.items()]
        lines.append(f"  peaks of the phases   {', '.join(phases)} GiB")
        lines.append(f"  fits into             {describe_cards(self.cards())}")
        return "\n".join(lines)


def describe_run(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide about memory; rank and side are None where nothing is projected."""
    optim = config.optim
    projected = optim.preset not in FULL_RANK
    return {
        "model": config.model.name,
        "dtype": config.model.dtype,
        "preset": optim.preset,
        "rank": optim.rank if projected else None,
        "proj_type": optim.proj_type if projected else None,
        "gradients": optim.gradients,
        "micro_batch": config.micro_batch,
        "accumulation": config.accumulation,
        "seq_len": config.data.seq_len,
        "activation_checkpointing": config.model.activation_checkpointing,
    }


def describe_optim(config: TrainConfig) -> str:
    """Baseline, preset, rank, side and gradients in words."""
    run, baseline = describe_run(config), config.model.baseline
    adapters = f"{baseline}, rank {config.optim.rank}, " if baseline else ""
    rank = f", rank {run['rank']} ({run['proj_type']})" if run["rank"] else ""
    whole = run["preset"] in FULL_RANK and run["gradients"] == "project"  # of nothing
    return f"{adapters}{run['preset']}{rank}, gradients {'hold' if whole else run['gradients']}"


def with_preset(optim: OptimConfig, preset: str, **changes: Any) -> OptimConfig:
    """`optim` with another preset; what that one cannot have is dropped, projected gradients become full ones."""
    values = as_given(optim) | changes
    if preset in FULL_RANK:
        values |= {name: getattr(OptimConfig, name) for name in OF_BASES}
    values["betas"] = None if preset in WITHOUT_BETAS else values["betas"]
    values["eps"] = None if preset in WITHOUT_EPS else values["eps"]
    if preset == "qgalore" and values["stochastic_rounding"] is False:
        values["stochastic_rounding"] = None
    if preset in FULL_GRADIENT and values["gradients"] == "project":
        values["gradients"] = "hold"
    return type(optim)(**{**values, "preset": preset})


def describe_cards(cards: Sequence[int]) -> str:
    """Cards of these sizes in words."""
    return f"cards of {', '.join(map(str, cards))} GB" if cards else f"no card of up to {max(CARDS)} GB"


def plan_memory(config: TrainConfig, vocab_size: int | None = None) -> MemoryPlan:
    """The memory of `train(config)` on one CPU process; nothing of the model's size is allocated. (cluster.py: on several.)

    vocab_size: rows of the embedding of a `llama-*` size; None: 32,000, unless `config.model.overrides` has it. Text is not read.

    Raises ValueError for everything that building the model and the optimizer raises it for.
    """
    return Planner(vocab_size).plan(config)


def planned_and_measured(
    config: TrainConfig, vocab_size: int | None, peak: int, device: str
) -> tuple[MemoryPlan | None, str]:
    """The plan of a run, and its peak in words beside the measured one, `peak` bytes on `device` (`describe_device`)."""
    measured = f"measured {peak / GIB:.3f} GiB"
    if device.startswith("cpu"):
        measured += ", the process with Python and its libraries"
    try:
        plan = plan_memory(config, vocab_size)
    except Exception as error:  # a model of another kind than the planner knows: the run is over and good
        reason = " ".join(str(error).split()) or type(error).__name__
        return None, f"{measured} (no plan: {reason})"
    return plan, f"planned {plan.peak / GIB:.3f} GiB of tensors at most, in {plan.peak_at}; {measured}"


@dataclass(frozen=True)
class Update:
    """An optimizer: bytes of its state, the cost of each parameter by name, the names of those refreshed in this step and of all
    that are projected, and the bytes of gradients that buckets of DistributedDataParallel keep."""

    memory: MemoryTable
    costs: Mapping[str, Cost]
    due: Set[str]
    projected: Set[str]
    buckets: Mapping[str, int]


class Planner:
    """Plans many configurations: models, traces and costs are made once each."""

    def __init__(self, vocab_size: int | None = None) -> None:
        self.vocab_size = vocab_size
        # Tables that quantizing keeps for later must not be made of fake tensors.
        for bits, signed in ((8, True), (8, False), (4, True), (4, False)):
            quantize(torch.zeros(2, 2), bits, signed, 2)  # type: ignore[arg-type]
        write_basis(init_basis((2, 2), "cpu"), torch.zeros(2, 2))
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._models: dict[str, nn.Module] = {}
        self._fakes: dict[str, nn.Module] = {}
        self._traces: dict[tuple[Any, ...], Trace] = {}
        self._updates: dict[str, Update] = {}
        self._least: dict[str, int] = {}

    def plan(self, config: TrainConfig, lora: bool = False) -> MemoryPlan:
        """As `plan_memory`. lora: of LoRA (through peft) at `optim.rank`, whose adapters alone are trained."""
        key, model = self._model(config, lora)
        trace = self._trace(key, config)
        update = self._update(key, config)
        costs = update.costs
        if config.accumulation == 1:  # else gradients wait beside their buckets until the last pass
            costs = {name: cost.kept_elsewhere() if name in update.buckets else cost for name, cost in costs.items()}
        held = config.optim.gradients == "hold"
        phases = put_together(trace, costs, update.due, config.accumulation, sum(update.buckets.values()), held)
        count = sum(p.numel() for p in model.parameters())
        return MemoryPlan(count, update.memory.weights, update.memory.basis, update.memory.moments, phases)

    def traffic(self, config: TrainConfig) -> dict[str, Payload]:
        """What a process of several exchanges with others in a step: for its `passes` (weights and gradients), for its
        `optimizer` in every step, and for `refreshes`, in the mean over T. Inside `pretended(config.parallel)`."""
        key, model = self._model(config, False)
        update, everyone = self._update(key, config), tuple(range(config.parallel.count))
        passes = Counter(
            {place: size * config.accumulation for place, size in self._trace(key, config).traffic.items()}
        )
        if update.buckets:
            passes["sum", everyone] += sum(update.buckets.values())
            passes["copy", everyone] += sum(X.nbytes for X in model.buffers())  # before the first pass
        steps, refreshed = (self._exchanged(key, config, due) for due in (set(), update.projected))
        gap = config.optim.update_proj_gap
        assert gap is not None  # OptimConfig has filled it in
        refreshes = {place: (size - steps[place]) // gap for place, size in refreshed.items() if size > steps[place]}
        return {"passes": passes, "optimizer": steps, "refreshes": refreshes}

    def _exchanged(self, key: str, config: TrainConfig, due: Set[str]) -> Counter[Any]:
        """By the optimizer in a step that refreshes the parameters `due`."""
        total = Counter[Any]()
        # Averages are made in the last pass of a step.
        arrivals = 1 if config.averages_low_rank else config.accumulation
        for cost in self._costs(key, config, self._optimizer(key, config), due).values():
            for payload, times in ((cost.arriving, arrivals), (cost.finishing, 1)):
                total.update({place: times * size for place, size in payload.items()})
        return total

    def least(self, config: TrainConfig) -> int:
        """Bytes of weights and optimizer state, which `plan(config)` must exceed; found at once."""
        key, _ = self._model(config, False)
        full = json.dumps([key, dataclasses.asdict(replace(config.optim, gradients="hold"))], default=str)
        if full not in self._least:  # `gradients` changes neither
            memory = count_memory(self._placed(key, config), self._optimizer(key, config))
            self._least[full] = memory.weights + memory.optimizer
        return self._least[full]

    def _model(self, config: TrainConfig, lora: bool) -> tuple[str, nn.Module]:
        """The model on the meta device, with its name among the models."""
        wanted = replace(config.model, pretrained=False, activation_checkpointing=False)
        adapters = config.optim.rank if lora or wanted.baseline else None
        optim, parts = config.optim, None
        if config.parallel.shard > 1:  # cut along one axis or the other
            kind = optim.preset if optim.preset in FULL_RANK else "projected"
            parts = [config.parallel.shard, config.parallel.replicate, kind, optim.proj_type, optim.targets]
        about = [dataclasses.asdict(wanted), config.int8_weights, config.data.seq_len, adapters, parts]
        key = json.dumps(about, default=str)
        if key not in self._models:
            # The only one with L x L numbers in memory; those of a GPU's packages take what sdpa does.
            eager = "eager" if wanted.attn_implementation == "eager" else None
            model: nn.Module = build_model(
                wanted.name,
                vocab_size=self.vocab_size,
                seq_len=config.data.seq_len,
                dtype=wanted.dtype,
                overrides=wanted.overrides,
                attn_implementation=eager,
                device="meta",
                int8=config.int8_weights,
            )
            if lora:
                model = _with_adapters(model, config.optim.rank)
            else:
                add_baseline(model, config)
            self._models[key] = model.train()
        return key, self._models[key]

    def _fake_model(self, key: str, config: TrainConfig) -> nn.Module:
        """The same of fake tensors, as it lies on the first process: operations on them are those of the CPU."""
        if key not in self._fakes:
            model = self._fakes[key] = copy.deepcopy(self._models[key])
            mesh = make_mesh(config.parallel, "cpu") if config.parallel.shard > 1 else None
            with self.fake:
                _bring_in(model)
                if mesh is not None:
                    shard_model(model, groups_of(model, config.optim), mesh)
                    watch_passes(model, sequences=1, seq_len=2)  # FSDP2 makes its buffers in the first one
        return self._fakes[key]

    def _placed(self, key: str, config: TrainConfig) -> nn.Module:
        """The model as it lies on the first process: on the meta device where that is all of it."""
        return self._fake_model(key, config) if config.parallel.shard > 1 else self._models[key]

    def _optimizer(self, key: str, config: TrainConfig) -> ProjectedOptimizer:
        """Of `_placed`, with state, and without the hooks that another optimizer of the same parameters would meet."""
        with self.fake if config.parallel.shard > 1 else nullcontext():
            optimizer = build_optimizer(self._placed(key, config), config)
        assert isinstance(optimizer, ProjectedOptimizer)
        if optimizer._backward:
            optimizer._backward.detach()
        return optimizer

    def _trace(self, key: str, config: TrainConfig) -> Trace:
        """The trace of a micro-batch; of more than three sequences, from those of two and of three."""
        settings: dict[str, Any] = {
            "seq_len": config.data.seq_len,
            "checkpointing": config.model.activation_checkpointing,
            "autocast": config.run.autocast,
            "position_ids": config.data.keep_documents_apart,
        }

        def of(sequences: int) -> Trace:
            full = (key, *settings.values(), sequences)
            if full not in self._traces:
                trace = of(2).scaled(of(3), sequences - 2) if sequences > 3 else None
                if trace is None:
                    model = self._fake_model(key, config)
                    with self.fake:
                        trace = watch_passes(model, sequences=sequences, **settings)
                self._traces[full] = trace
            return self._traces[full]

        return of(config.micro_batch)

    def _update(self, key: str, config: TrainConfig) -> Update:
        """What the optimizer of `config` adds to the trace of its model."""
        settings = json.dumps([key, dataclasses.asdict(config.optim), dataclasses.asdict(config.parallel)], default=str)
        if settings not in self._updates:
            model, optimizer = self._placed(key, config), self._optimizer(key, config)
            names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
            due = {names[p] for p in _fullest_refresh(optimizer)}
            projected = {names[p] for group in optimizer.param_groups if "rank" in group for p in group["params"]}
            buckets = {}
            if config.parallel.shard == 1 < config.parallel.replicate:  # DistributedDataParallel's
                others = projected if config.averages_low_rank else set()
                buckets = {name: p.nbytes for p, name in names.items() if p.requires_grad and name not in others}
            costs = self._costs(key, config, optimizer, due)
            self._updates[settings] = Update(count_memory(model, optimizer), costs, due, projected, buckets)
        return self._updates[settings]

    def _costs(self, key: str, config: TrainConfig, optimizer: ProjectedOptimizer, due: Set[str]) -> dict[str, Cost]:
        """The cost of each parameter by name, in a step that refreshes those that are `due`: of one of each kind, from an
        optimizer that has no others, because all of a kind cost the same."""
        names: dict[Tensor, str] = {p: name for name, p in self._placed(key, config).named_parameters()}
        kinds = {
            names[p]: (i, type(p.data), p.dtype, tuple(p.shape), getattr(p, "placements", None), names[p] in due)
            for i, group in enumerate(optimizer.param_groups)
            for p in group["params"]
        }
        watched = {kind: name for name, kind in reversed(kinds.items())}
        projected = [name for name in watched.values() if "rank" in optimizer.param_groups[kinds[name][0]]]
        model = self._fake_model(key, config)
        targets = [f"^{re.escape(name)}$" for name in projected] or None
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, p in trained.items():
            p.requires_grad_(name in watched.values())
        try:
            with self.fake:
                # Eager: fake tensors cannot be compiled, and one compiled pass has no more temporaries than that.
                changed = replace(config.optim, targets=targets, compile=False)
                small = build_optimizer(model, replace(config, optim=changed))
                assert isinstance(small, ProjectedOptimizer)
            if small.copies:
                small.copies.mesh("cpu")  # of real numbers
            with self.fake:
                costs = {kind: watch_update(model, small, trained[name], name in due) for kind, name in watched.items()}
        finally:
            for p in trained.values():
                p.requires_grad_(True)
        return {name: costs[kind] for name, kind in kinds.items()}


def _fullest_refresh(optimizer: ProjectedOptimizer) -> set[Tensor]:
    """The parameters that are refreshed together with most bytes, the last in the model of equal ones: they arrive first, when
    most activations are still alive."""
    together: dict[int, set[Tensor]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "rank" in group:
                together.setdefault(optimizer.first_refresh(p), set()).add(p)
    return max(together.items(), key=lambda item: (sum(p.numel() for p in item[1]), item[0]), default=(0, set()))[1]


def _with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """LoRA on every linear layer but the head, adapters in the weights' dtype, as in the paper's tables."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # peft imports quantizers that are of no use here, and some say what they miss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            peft = require("peft", "plan")
            settings = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
            adapted: nn.Module = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
            return adapted
    finally:
        logging.disable(before)


def _bring_in(model: nn.Module) -> None:
    """Replace the model's meta tensors by fake ones of the CPU, shared ones by shared ones. Inside FakeTensorMode.

    A model built of fake tensors from the start would run its initialization on them, slowly.
    """
    new: dict[Tensor, Tensor] = {}

    def on_cpu(X: Tensor) -> Tensor:
        if hasattr(X, "__tensor_flatten__"):
            names, context = X.__tensor_flatten__()
            inner = {name: on_cpu(getattr(X, name)) for name in names}
            made: Tensor = type(X).__tensor_unflatten__(inner, context, X.shape, X.stride())  # type: ignore[attr-defined]
            return made
        return torch.empty_like(X, device="cpu")

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, X in own.items():
                if X is not None:
                    if X not in new:
                        made = on_cpu(X.detach())
                        new[X] = nn.Parameter(made, X.requires_grad) if isinstance(X, nn.Parameter) else made
                    own[name] = new[X]  # type: ignore[assignment]
