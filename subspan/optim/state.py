"""What an optimizer keeps of each parameter: the state itself, its shapes, dtypes and seeds, and how it is loaded.

Everything is there from construction, in tensors alone. What becomes of it in a step is optimizer.py's part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspan.optim.books import Bits
from subspan.optim.combine import LIMITED, Combine
from subspan.optim.dtensors import is_spread, local, placed_as
from subspan.optim.feedback import KEYS, Feedback
from subspan.optim.groups import check_group, matrix_shape
from subspan.optim.projectors import Side, effective_rank, pick_side, random_basis
from subspan.optim.quant import State, Store, init_basis, read_basis, write_basis
from subspan.optim.refresh import Refresh, Timetable
from subspan.optim.rules import Rule
from subspan.optim.sweep import OWN
from subspan.optim.update import stores_in_few_bits

if TYPE_CHECKING:
    from subspan.optim.shards import Shards

Memory = tuple[Rule, Store, torch.dtype | None]
"""A rule, how its moments are stored, and the dtype of those that are not in codes."""

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # missing in torch's own types

WIDE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes that state may be kept in as it is."""

LOW_BITS: dict[torch.dtype, Bits] = {torch.int8: 8, INT4: 4}
"""State dtypes that name codes: block-wise, with a scale a block (quant.py)."""


class StatefulOptimizer(torch.optim.Optimizer):
    """The state of a `ProjectedOptimizer`, whose arguments these are; refresh.first is given."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        rule: Rule,
        dense_rule: Rule,
        rules: Mapping[str, Rule],
        refresh: Refresh,
        combine: Combine | None,
        feedback: Feedback | None,
        weight_decay: float,
        state_dtype: torch.dtype | None,
        dense_state_dtype: torch.dtype | None,
        basis_dtype: torch.dtype | None,
    ) -> None:
        if dense_state_dtype is None:
            dense_state_dtype = state_dtype
            if state_dtype in LOW_BITS and not stores_in_few_bits(dense_rule) and dense_rule is not rule:
                dense_state_dtype = torch.float32
        _check_dtypes(state_dtype, rule, dense_state_dtype, (dense_rule, *rules.values()), basis_dtype)
        if refresh.moments == "transport" and not hasattr(rule, "transport"):
            raise ValueError(
                f"moments='transport' needs a method `transport` of {type(rule).__name__}: use moments='keep'"
            )
        self.rule, self.dense_rule, self.rules = rule, dense_rule, dict(rules)
        self.refresh = refresh
        self.combine, self.feedback = combine, feedback
        self.state_dtype, self.dense_state_dtype, self.basis_dtype = state_dtype, dense_state_dtype, basis_dtype
        self._memories = {
            "projected": _memory(rule, state_dtype, transposed=True),
            "full_rank": _memory(rule, state_dtype),
            "dense": _memory(dense_rule, dense_state_dtype),
        }
        self._named = {name: _memory(r, dense_state_dtype) for name, r in self.rules.items()}
        self._steps: dict[Tensor, int] = {}  # state["step"] as a Python int: asking for it costs no host sync
        self._timetable = Timetable(refresh)
        self._index: dict[Tensor, int] = {}  # position among the projected parameters, for seeds
        self._group: dict[Tensor, int] = {}  # position of its group in param_groups
        self._position: dict[Tensor, int] = {}  # among all parameters, for the seeds of rounding
        self._shards: dict[Tensor, Shards | None] = {}  # None: of those that lie on one process
        self._device: dict[Tensor, torch.device] = {}  # that state lies on
        self._built = False
        defaults = {"lr": lr, "weight_decay": weight_decay, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        super().__init__(params, defaults)
        if unknown := self.rules.keys() - (names := {g.get("name") for g in self.param_groups if "rank" not in g}):
            raise ValueError(
                f"rules: no group without a rank is named {min(unknown)!r}: there are {sorted(map(str, names))}"
            )
        if dense_rule is not rule and not any(
            "rank" in group or group.get("full_rank") or group.get("name") in rules for group in self.param_groups
        ):
            raise ValueError(
                f"no group has a rank or full_rank=True, so rule={type(rule).__name__} would step nothing: give the groups of "
                "param_groups(model, rank=None)"
            )
        for name, value in (("combine", combine), ("feedback", feedback)):
            if value is not None and not any("rank" in group for group in self.param_groups):
                raise ValueError(
                    f"no group has a rank, so {name}={type(value).__name__} would do nothing: give the groups of "
                    "param_groups(model, rank=...)"
                )
        self._timetable.stagger(list(self._index), self._gap)
        self._built = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; checks the group's values and creates the state of its parameters."""
        for key in ("betas", "eps", "momentum"):
            if key in param_group:
                raise ValueError(f"{key} in a parameter group has no effect: give it to the optimizer's rule instead")
        for key in ("maximize", "amsgrad", "nesterov", "dampening"):
            if param_group.get(key):
                raise ValueError(f"{key}={param_group[key]!r} in a parameter group is not supported: drop it")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            names = group.get("param_names", [f"parameter {i}" for i in range(len(group["params"]))])
            check_group(group, names)
            for p in group["params"]:
                self._group[p] = len(self.param_groups) - 1
                self._init_state(group, p)
        except ValueError:
            self.param_groups.pop()
            for p in group["params"]:
                self._timetable.drop(p)
                for of in (
                    self._group,
                    self._index,
                    self._position,
                    self._steps,
                    self._shards,
                    self._device,
                    self.state,
                ):
                    of.pop(p, None)
            raise
        if self._built:  # added later: staggered among themselves, those before keep their steps
            self._timetable.stagger([p for p in group["params"] if p in self._index], self._gap)

    def _init_state(self, group: dict[str, Any], p: Tensor) -> None:
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
        shape = torch.Size(matrix_shape(p.shape, group)) if "view" in group else p.shape
        shards = None
        if is_spread(p):
            from subspan.optim.shards import shards_of  # imports DTensor, which takes a second

            shards = shards_of(p, group, self.side(p) if "rank" in group else None)
        self._shards[p] = shards
        if "rank" in group:
            basis_shape, shape = self.shapes(p)
            self._index[p] = len(self._index)
            state |= self._timetable.add(p)
            if self.refresh.first == "random" and not p.is_meta:
                Q = random_basis(basis_shape, self._seed(p, 0), p.device)
            else:  # orthonormal from the start, although the first step replaces it
                Q = torch.eye(*basis_shape[-2:], device=p.device).expand(basis_shape)
            state |= self._init_basis(Q, p, shards)
            if self.combine is not None:
                state |= self.combine.init(p.device)
            if self.feedback is not None:
                if shards is not None:
                    raise ValueError(
                        "feedback of sharded parameters is not supported: use another preset with fully_shard"
                    )
                state |= self.feedback.init((*shape[:-2], basis_shape[-2], shape[-1]), p.device)
        rule, store, dtype = self.memory(group)
        moments = rule.init(torch.empty(shape, dtype=dtype or p.dtype, device="meta"))
        state |= store.init(moments, p.device) if shards is None else shards.init(store, moments, p.device)
        self.state[p] = state
        self._device[p] = p.device
        self._position[p] = len(self._position)
        self._steps[p] = 0

    def _init_basis(self, Q: Tensor, p: Tensor, shards: Shards | None) -> State:
        batch = shards if shards is not None and shards.axis == "batch" else None
        mine = Q if batch is None else Q.narrow(0, *batch.mine(Q.shape[0]))
        if self.basis_dtype in LOW_BITS:
            state = init_basis(mine.shape, p.device)
        else:
            state = {"basis": torch.empty(mine.shape, dtype=self.basis_dtype or p.dtype, device=p.device)}
        write_basis(state, mine)
        return state if batch is None else {key: batch.join(X, 0, Q.shape[0]) for key, X in state.items()}

    def side(self, p: Tensor) -> Side:
        """The side of a projected parameter that its basis multiplies from."""
        group = self.group_of(p)
        return pick_side(matrix_shape(p.shape, group), group["proj_type"])

    def state_here(self, p: Tensor) -> State:
        """p's state, of which large tensors are this process' parts; where p is now, if the model was moved since."""
        state: State = self.state[p]
        if p.device != self._device[p]:
            for key, X in state.items():
                if key != "step" and key not in Timetable.KEYS:
                    state[key] = X.to(p.device)
            self._device[p] = p.device
        return state if self._shards[p] is None else {key: local(X) for key, X in state.items()}

    def shapes(self, p: Tensor) -> tuple[torch.Size, torch.Size]:
        """Of the basis (..., d, r) and the low-rank gradient (..., r, k) of a projected parameter."""
        group = self.group_of(p)
        *batch, m, n = matrix_shape(p.shape, group)
        d, k = (m, n) if self.side(p) == "left" else (n, m)
        rank = effective_rank(group["rank"], (m, n))
        return torch.Size((*batch, d, rank)), torch.Size((*batch, rank, k))

    def basis(self, p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The basis Q (..., d, r) of a projected parameter, in `dtype` (None: fp32): a new tensor if it is stored otherwise.
        Of a sharded batch, those of this process."""
        state = self.state_here(p)
        rank = 0 if "basis" in state else self.shapes(p)[0][-1]  # of codes, which may be one more than there are values
        return read_basis(state, rank, dtype or torch.float32)

    def forget(self, p: Tensor) -> None:
        """Set p's moments and its count of steps to zero, in place, as if it had not been trained."""
        state = self.state[p]
        for name, X in state.items():
            if name not in OWN or name in ("step", LIMITED, *KEYS):
                X.zero_()
        self._steps[p] = 0
        if p in self._index:
            self._timetable.forget(p, state)

    def first_moment(self, p: Tensor) -> Tensor | None:
        """exp_avg or momentum_buffer of p in fp32, (..., r, k) of a projected parameter: a copy; None if its rule has neither.
        Of a sharded parameter, this process' part."""
        group = self.group_of(p)
        moments = self.memory(group)[1].load(self.state_here(p), self._shape_here(p))
        for name in ("exp_avg", "momentum_buffer"):
            if name in moments:
                return moments[name].float().clone()
        return None

    def _shape_here(self, p: Tensor) -> tuple[int, ...]:
        """Of the (low-rank) gradient of p, or of this process' part."""
        group = self.group_of(p)
        shape = list(
            self.shapes(p)[1] if "rank" in group else matrix_shape(p.shape, group) if "view" in group else p.shape
        )
        if shards := self._shards[p]:
            dim = -1 if shards.axis in ("k", "d") else 0
            shape[dim] = shards.mine(shape[dim])[1]
        return tuple(shape)

    def memory(self, group: dict[str, Any]) -> Memory:
        """The rule of a group's parameters, how their moments are stored, and the dtype of those that are not in codes."""
        if "rank" in group:
            return self._memories["projected"]
        kind = "full_rank" if group.get("full_rank") else "dense"
        return self._named.get(group.get("name", ""), self._memories[kind])

    def refresh_due(self, p: Tensor) -> bool:
        """Whether the next step of the projected parameter p finds it a new basis; known to the host."""
        return self._timetable.due(p, self._steps[p], self._gap(p))

    def first_refresh(self, p: Tensor) -> int:
        """The step of p's first refresh."""
        return self._timetable.first(p)

    def _gap(self, p: Tensor) -> int:
        gap: int = self.group_of(p)["update_proj_gap"]
        return gap

    def _seed(self, p: Tensor, refresh: int) -> int:
        """One seed for each (parameter, refresh), the same on every process and after a resume."""
        return ((self.refresh.seed * 1_000_003 + self._index[p]) * 1_000_003 + refresh) % 2**63

    def _rounding_seed(self, p: Tensor) -> int:
        """One seed for each (parameter, step), apart from those of bases, the same after a resume."""
        number = (self.refresh.seed * 1_000_033 + self._position[p]) * 1_000_003 + self._steps[p]
        shards = self._shards[p]
        part = 0 if shards is None else shards.index
        return (number * 2_147_483_647 + part) % 2**63

    def group_of(self, p: Tensor) -> dict[str, Any]:
        """The parameter group that p is in."""
        group: dict[str, Any] = self.param_groups[self._group[p]]
        return group

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                yield group, p

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the state that exists since construction; dtypes stay this optimizer's.

        torch would cast every state tensor to its parameter's dtype: fp32 moments of bf16 weights would lose 16 bits.
        Raises ValueError when groups, ranks or state shapes differ: nothing is loaded then.
        """
        own = [p for _, p in self._parameters()]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        if len(own) != len(saved):
            raise ValueError(
                f"state_dict has {len(saved)} parameters, the optimizer {len(own)}: build the same groups first"
            )
        pairs = []
        for p, index in zip(own, saved, strict=True):
            self.state_here(p)  # Accelerate moves the model, and then loads what it has moved of its own
            theirs, ours = state_dict["state"].get(index, {}), self.state[p]
            shapes = [
                {key: tuple(X.shape) if isinstance(X, Tensor) else type(X).__name__ for key, X in state.items()}
                for state in (theirs, ours)
            ]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"state of parameter {index} is {shapes[0]} in state_dict and {shapes[1]} here: "
                    "build the optimizer with the same rank, proj_type, rule, combine, dtypes of state and basis, and moments "
                    "at a refresh"
                )
            pairs.append((ours, theirs))
        _check_order(self.param_groups, state_dict["param_groups"])
        state = self.state
        super().load_state_dict({**state_dict, "state": {}})
        self.state = state
        for ours, theirs in pairs:
            for key, value in ours.items():
                value.copy_(placed_as(value, theirs[key]))
        self._steps = {p: int(self.state[p]["step"]) for p in own}
        for p in self._index:
            self._timetable.load(p, self.state[p])


def _memory(rule: Rule, dtype: torch.dtype | None, transposed: bool = False) -> Memory:
    bits = None if dtype is None else LOW_BITS.get(dtype)
    return rule, Store(bits, transposed), torch.float32 if bits else dtype


def _check_order(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> None:
    """ValueError where both sides have names of parameters, the same ones, in another order."""
    here, there = ([name for group in groups for name in group.get("param_names", ())] for groups in (ours, theirs))
    if here != there and sorted(here) == sorted(there):
        first, second = next(pair for pair in zip(here, there, strict=True) if pair[0] != pair[1])
        raise ValueError(
            f"state_dict has the same parameters in another order, {second} where {first} is here: build the same groups first"
        )


def _check_dtypes(
    state: torch.dtype | None,
    rule: Rule,
    dense_state: torch.dtype | None,
    dense_rules: Sequence[Rule],
    basis: torch.dtype | None,
) -> None:
    for name, dtype, low in (
        ("state_dtype", state, (torch.int8, INT4)),
        ("dense_state_dtype", dense_state, (torch.int8, INT4)),
        ("basis_dtype", basis, (INT4,)),
    ):
        if dtype is not None and dtype not in (*WIDE, *low):
            fewer = " or ".join(map(str, low))
            raise ValueError(f"{name}={dtype} is not supported: use torch.float32, torch.bfloat16, {fewer}")
    used = [("state_dtype", state, rule), *(("dense_state_dtype", dense_state, r) for r in dense_rules)]
    for name, dtype, r in used:
        if dtype in LOW_BITS and not stores_in_few_bits(r):
            raise ValueError(
                f"{name}={dtype} has no moment to store with {type(r).__name__}, whose state is small: "
                f"use {name}=torch.float32, or Adam, Lion, SGDMomentum or Muon"
            )
