"""One training step on fake tensors, in pieces: what the model's passes take, what the optimizer does to one gradient, and both
put together. The planner's (plan.py) inner part.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from subspan.extras import require
from subspan.live import LiveBytes
from subspan.optim import norms, update
from subspan.optim.dtensors import is_spread, local
from subspan.optim.int8 import Int8Weight
from subspan.optim.optimizer import ProjectedOptimizer
from subspan.traffic import Payload, Traffic

Pair = tuple[int, int]
PhaseName = Literal["forward", "backward", "refresh", "step"]


@dataclass(frozen=True)
class Phase:
    """Bytes alive at the fullest moment of a phase, beside weights and optimizer state."""

    gradients: int
    activations: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.temporaries


@dataclass(frozen=True)
class Trace:
    """Bytes that one forward and backward pass takes beside weights and arrived gradients: (activations, temporaries).

    series: after every operation; the first `forward` of them are the forward pass.
    arrivals: (position in the series, parameter's name), in order. alive: at each, without the gradient that arrives.
    others: at each, bytes of the other gradients in its memory: FSDP2 has one piece for those of a block.
    left: what is alive at the end. traffic: what the passes exchange with other processes.
    """

    series: list[Pair]
    forward: int
    arrivals: list[tuple[int, str]]
    alive: list[Pair]
    others: list[int]
    left: Pair
    traffic: Payload

    @functools.cached_property
    def fullest(self) -> list[Pair]:
        """The fullest moment of the forward pass, of the backward pass before each arrival, and after the last one."""
        cuts = [0, self.forward, *(at for at, _ in self.arrivals), len(self.series)]
        pieces = [self.series[start:end] for start, end in itertools.pairwise(cuts)]
        return [max(piece, key=sum, default=(0, 0)) for piece in pieces]

    def scaled(self, other: Trace, times: int) -> Trace | None:
        """The trace `times` as far from this one as `other` is: bytes are linear in the number of sequences, moment by moment.
        None if the two do not consist of the same operations."""
        if self.arrivals != other.arrivals or self.forward != other.forward or len(self.series) != len(other.series):
            return None

        def line(own: list[Pair], others: list[Pair]) -> list[Pair]:
            pairs = zip(own, others, strict=True)
            return [(a + times * (c - a), b + times * (d - b)) for (a, b), (c, d) in pairs]

        left = line([self.left], [other.left])[0]
        return replace(self, series=line(self.series, other.series), alive=line(self.alive, other.alive), left=left)


@dataclass(frozen=True)
class Cost:
    """Bytes that one parameter's gradient takes, itself included, stage by stage.

    gradient: its own. arrive: at most, while its hook runs. again: the same in the second backward pass of a step, above what
    waits already. waiting: between the passes and after them. prepare: at most in `prepare()`. prepared: after it.
    step: at most in `step()`.
    arriving, finishing: what the hook, and `prepare()` and `step()`, exchange with other processes.
    """

    gradient: int
    arrive: int
    again: int
    waiting: int
    prepare: int
    prepared: int
    step: int
    arriving: Payload
    finishing: Payload

    def kept_elsewhere(self) -> Cost:
        """The same where somebody else counts the gradient after its arrival."""
        own = self.gradient
        waits = {key: getattr(self, key) - own for key in ("waiting", "prepare", "prepared", "step")}
        return replace(self, **waits)


def watch_passes(
    model: Any,
    *,
    sequences: int,
    seq_len: int,
    checkpointing: bool = False,
    autocast: bool = False,
    position_ids: bool = False,
) -> Trace:
    """The trace of a causal LM of transformers that no optimizer has hooked. Call it inside FakeTensorMode."""
    arrivals: list[tuple[int, str]] = []
    alive: list[Pair] = []
    others: list[int] = []
    live = LiveBytes([*model.parameters(), *model.buffers()])

    def now() -> Pair:
        return live.bytes["activations"], live.bytes["temporaries"]

    def arrived(name: str, p: Tensor) -> None:
        G = local(p.grad)
        live.mark(G, "gradients")
        arrivals.append((len(live.series), name))
        alive.append(now())
        others.append(G.untyped_storage().nbytes() - G.nbytes)

    with contextlib.ExitStack() as undo:
        if checkpointing:
            _checkpoint_activations(model, True)
            undo.callback(_checkpoint_activations, model, False)
        for name, p in model.named_parameters():
            if p.requires_grad:
                hook = functools.partial(arrived, name)
                undo.callback(p.register_post_accumulate_grad_hook(hook).remove)
        undo.enter_context(_few_parts())
        if not position_ids:
            undo.enter_context(_no_packed_sequences())
        traffic = undo.enter_context(Traffic())
        undo.enter_context(live)
        live.kind = "activations"
        ids = torch.zeros(sequences, seq_len, dtype=torch.int64)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if position_ids:
            batch["position_ids"] = ids.clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch, use_cache=False).loss
        forward, live.kind = len(live.series), "temporaries"
        loss.backward()
        del loss
        left = now()
    for p in model.parameters():
        p.grad = None
    return Trace(live.series, forward, arrivals, alive, others, left, traffic.payload)


class _Arrive(torch.autograd.Function):
    """A backward pass that only hands over a gradient. shared: it is not all of its memory, as with FSDP2."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, shared: bool) -> Tensor:
        here = local(p)
        ctx.shape, ctx.dtype, ctx.shared = here.shape, here.dtype, shared
        ctx.around = (p.device_mesh, p.placements, p.shape, p.stride()) if is_spread(p) else None  # type: ignore[attr-defined]
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        G = torch.empty(ctx.shape.numel() + ctx.shared, dtype=ctx.dtype)[: ctx.shape.numel()].view(ctx.shape)
        if ctx.around is None:
            return G, None
        from torch.distributed.tensor import DTensor

        mesh, placements, shape, stride = ctx.around
        return DTensor.from_local(G, mesh, placements, run_check=False, shape=shape, stride=stride), None


def watch_update(model: nn.Module, optimizer: ProjectedOptimizer, p: Tensor, refresh: bool) -> Cost:
    """What `optimizer` does to the gradient of `p` in a step with or without a refresh. Call it inside FakeTensorMode."""
    state = [X for values in optimizer.state.values() for X in values.values()]
    live = LiveBytes([*model.parameters(), *model.buffers(), *state])

    def most(work: Any) -> int:
        live.peak = live.now
        work()
        return live.peak

    def arrive() -> None:
        shared = is_spread(p) and optimizer.gradients == "project"
        _Arrive.apply(p, shared).backward()  # type: ignore[no-untyped-call]

    optimizer.refresh_due = lambda p: refresh  # type: ignore[method-assign]
    optimizer._check_complete = lambda: None  # type: ignore[method-assign]  # the others have no gradient here
    arriving, finishing = Traffic(), Traffic()
    with _few_parts():
        if is_spread(p):  # DTensor tries an operation that it meets for the first time on tensors of the whole
            with LiveBytes([]):
                for work in (arrive, optimizer.prepare, optimizer.step, optimizer.zero_grad):
                    work()
        # It has moments for a refresh to move, and a basis to start from.
        optimizer._steps[p] = optimizer._timetable.refreshes[p] = 1
        with arriving, live:
            first = most(arrive)
            waiting = live.now
        with live:
            again = most(arrive) - waiting if optimizer.gradients != "update" else 0
        with finishing, live:
            prepare = most(optimizer.prepare)
            prepared = live.now
            step = most(optimizer.step)
            optimizer.zero_grad()
    del optimizer.refresh_due, optimizer._check_complete
    gradient = local(p).nbytes
    return Cost(gradient, first, again, waiting, prepare, prepared, step, arriving.payload, finishing.payload)


def put_together(
    trace: Trace, costs: Mapping[str, Cost], refreshed: Set[str], accumulation: int, always: int = 0, held: bool = True
) -> dict[PhaseName, Phase]:
    """The fullest moment of each phase of a step: `accumulation` passes, then `prepare()` and `step()`, as the trainer does.

    costs: of every trained parameter by name, in the order of the optimizer; refreshed: the names of those whose basis changes.
    always: bytes of gradients that are never freed. held: whether gradients stay in the memory where they arrive.
    """
    phases: dict[PhaseName, Phase] = {}

    def moment(name: PhaseName, gradients: int, activations: int, temporaries: int) -> None:
        phase = Phase(gradients, activations, temporaries)
        if name not in phases or phase.total > phases[name].total:
            phases[name] = phase

    waiting = always
    arrived: set[str] = set()
    forward, *pieces, last = trace.fullest
    for _ in range(min(accumulation, 2)):  # from the second pass on, all are alike
        moment("forward", waiting, *forward)
        for (_, name), fullest, (activations, temporaries), others in zip(
            trace.arrivals, pieces, trace.alive, trace.others, strict=True
        ):
            moment("backward", waiting, *fullest)
            cost = costs[name]
            most = (cost.again if name in arrived else cost.arrive) + (0 if held else others)
            own = min(cost.gradient, most)
            phase: PhaseName = "refresh" if name in refreshed else "backward"
            moment(phase, waiting + own, activations, temporaries + most - own)
            waiting += 0 if name in arrived else cost.waiting
            arrived.add(name)
        moment("backward", waiting, *last)
    for name in (name for name in costs if name in arrived):
        cost, phase = costs[name], "refresh" if name in refreshed else "step"
        moment(phase, waiting, trace.left[0], trace.left[1] + cost.prepare - cost.waiting)
        waiting += cost.prepared - cost.waiting
    for name in (name for name in costs if name in arrived):
        moment("step", waiting, trace.left[0], trace.left[1] + costs[name].step - costs[name].prepared)
    return phases


@contextlib.contextmanager
def _few_parts() -> Iterator[None]:
    """Loops over the parts of a tensor do the first two and the last: the others take as much as the second, and at 7B there are
    hundreds of them for each weight."""

    def few(parts: Any) -> Any:
        @functools.wraps(parts)
        def ends(*args: Any, **kwargs: Any) -> Iterator[tuple[int, int]]:
            found = list(parts(*args, **kwargs))
            return iter(found[:2] + found[2:][-1:])

        return ends

    with contextlib.ExitStack() as undo:
        for owner, name in ((update, "parts_of"), (norms, "parts_of"), (Int8Weight, "blocks")):
            parts = getattr(owner, name)
            undo.callback(setattr, owner, name, parts)
            setattr(owner, name, few(parts))
        yield


@contextlib.contextmanager
def _no_packed_sequences() -> Iterator[None]:
    """transformers looks for them in the values of positions, and where it sees no values makes a mask for each block, which no
    run has."""
    masking: Any = require("transformers.masking_utils", "train")
    find = masking.find_packed_sequence_indices
    masking.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = find


def _checkpoint_activations(model: Any, on: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for name in ("activation_checkpointing", "gradient_checkpointing"):  # the name since transformers 5, and before
            if switch := getattr(model, f"{name}_{'enable' if on else 'disable'}", None):
                switch()
                return
