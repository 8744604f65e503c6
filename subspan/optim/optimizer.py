"""ProjectedOptimizer: a projector (where to look) and a rule (how to step) as one ordinary torch optimizer.

For every parameter of a group with a `rank`, once a step (docs/theory.md; arXiv 2403.03507, Algorithm 2):

    A = orient(G)                      (d, k)
    Q = projector.basis(G, ...)        (d, r)    only every `update_proj_gap` steps
    R = Q^T A                          (r, k)
    U = rule.update(R)                 (r, k)    moments live here
    W <- (1 - lr decay) W - lr scale orient(Q U)          in place (update.py), no full-size temporary

or, with a `combine` (combine.py), orient(D) of D = combine(A, Q, R, U) (d, k) instead of orient(Q U).

A group without a `rank` is dense: U = rule.update(G), W <- (1 - lr decay) W - lr U.

What is kept of a parameter is state.py's part, in what form quant.py's, how a basis is replaced refreshing.py's, and how long
gradients live (`gradients`) backward.py's.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
from torch import Tensor

from subspan.optim.backward import Backward, Gradients, check_dense
from subspan.optim.combine import Combine
from subspan.optim.dtensors import local, settle_gradient
from subspan.optim.feedback import Feedback
from subspan.optim.groups import as_matrix
from subspan.optim.int8 import Int8Weight
from subspan.optim.marks import mark
from subspan.optim.norms import gauge, norm_of
from subspan.optim.projectors import Projector, SubspaceIteration, orient, project
from subspan.optim.refresh import Refresh
from subspan.optim.refreshing import RefreshingOptimizer
from subspan.optim.rules import Adam, Rule
from subspan.optim.update import update_weight

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from subspan.optim.copies import Copies

_HOOKS = re.compile(r"step|_opt_called|_optimizer_\w+_hooks")
"""What torch, and its schedulers, leave at one optimizer, and `__setstate__` makes anew where it is needed."""

Prepared = tuple[dict[str, Any], Tensor, Tensor, Tensor, Tensor]
"""A group, a parameter of it, its R (its gradient if it is dense), the norm of R, what of R counts."""


class ProjectedOptimizer(RefreshingOptimizer):
    """Trains projected parameters in a low-rank subspace of their gradient and dense parameters as usual.

    Args:
        params: parameters, (name, parameter) pairs or groups, as for any torch optimizer; `param_groups` makes them from a
            model. Keys of a group: `lr`, `weight_decay`; `rank` (its presence is what projects the group), `update_proj_gap` T
            (200), `scale` (0.25), `proj_type` (std, reverse_std, left, right), `view` for weights of more than two dimensions:
            "conv" (first dimension x the rest) or "batch" (leading dimensions are a batch of matrices).
        lr: learning rate, a float (a 0-d CPU tensor is accepted).
        rule: `Adam()`, `Adafactor()`, `Lion()`, `SGDMomentum()`, `SignSGD()`, `Muon()`, `ColumnNorm()`.
        dense_rule: rule of dense parameters, such as Adafactor() for large embeddings; None: `rule`, which always steps groups
            with full_rank=True.
        rules: rules of single groups without a rank, by the group's `name`, before `rule` and `dense_rule`.
        projector: `SubspaceIteration()`, `SVD()`, `RandomizedSVD()`, `Random()`.
        refresh: see `Refresh`.
        combine: what becomes of the part of a gradient outside the subspace: `Fira()`, `Frugal()`, `Apollo()`; None (GaLore): it
            is left out. They need the full gradient, so not gradients="project".
        feedback: `Feedback()`: what a step leaves out of a gradient is added to the next one (LDAdam), for Adam whose moments
            are transported; wants update_proj_gap=1 and scale=1. Needs the full gradient too. None: it is left out.
        weight_decay: decoupled, as in torch.optim.AdamW: W <- (1 - lr decay) W before the update; `scale` does not touch it.
        decay_after_update: decay the new update as well, as galore_torch does.
        gradients: "hold", "project" or "update", see backward.py. In `project` full gradients are projected and freed during
            the backward pass; micro-batches, clipping and schedulers work as usual, but only `zero_grad()` of the
            optimizer, not the model's, forgets gradients before a step. In `update` weights change during the backward
            pass; step() then only ends the step. Same state_dict in all three.
        max_grad_norm: clip to this norm, that of (R of projected, G of dense parameters); None: no clipping. Dense gradients
            are clipped in place, as torch.nn.utils.clip_grad_norm_ does; those of projected parameters stay as they are.
            Not in `update`, where no step sees all gradients.
        state_dtype: dtype of the rule's state: torch.float32, torch.bfloat16, or torch.int8 and torch.int4 for moments in
            codes, two of the latter a byte (quant.py; tensors of fewer than 4096 elements and vectors stay in fp32); None: the
            parameter's.
        dense_state_dtype: the same for dense parameters; None: as state_dtype, where the dense rule can hold it, else fp32.
        basis_dtype: dtype of the basis, torch.int4 for packed codes; None: the parameter's.
        stochastic_rounding: round updates of bf16 weights at random, so that small ones add up instead of being lost: the mean of
            the rounded weight is the exact one. fp32 weights are exact without; INT8 weights (int8.py) are always rounded so.
        average_over: the process group whose processes train copies of the model on different data: low-rank gradients are
            averaged over it, r/d of what whole gradients would send, with gradients="project" while the backward pass goes on.
            Gradients of dense parameters are left to DistributedDataParallel, from which `ignore_projected` keeps the others.
            Each process has a gradient of every projected parameter in each step; what else looks at gradients before `step()`
            (torch.nn.utils.clip_grad_norm_, GradScaler) sees those of one process: clip with `max_grad_norm`.
            None: gradients are those of all data already, or sharded by fully_shard.
        compile: make one pass over memory of a rule and its moments with torch.compile, for Adam, Lion, SGDMomentum and rules
            like them; the first step then takes longer. Eager, after a warning, where there is no compiler. Adam on fp32
            moments takes one pass without it, by torch's own kernel. None: for moments in codes on a GPU, where launches of
            the eager pass take more time than its arithmetic (benchmarks/train_7b_gpu).
        mask_null: count rows of R that hold only rounding noise as zero (`live_directions`). A dtype: that of the products which
            gradients come from, torch.bfloat16 for fp32 weights under torch.autocast, whose noise is larger; True: their own.

    State is tensors only and exists from construction: `step` and those of `Timetable` (0-d, CPU), `basis` (d, r), the rule's,
    the combine's (0-d), `error` (k, d) of a feedback; what is in codes is two tensors, `exp_avg.codes` (uint8) and
    `exp_avg.scale` (fp32), (k, r) and (k, ceil(r / block)).
    `grad_norm` is a 0-d tensor, the norm of the last step before clipping; reading it is the caller's host sync, `step()`
    makes none outside refreshes. A gradient that is not finite counts as zero (decided per parameter, with `max_grad_norm`
    over all of them; in `update` its parameter is left out) and is never used for a basis; a loop that would rather skip such a
    step calls `prepare()` first.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rule: Rule | None = None,
        dense_rule: Rule | None = None,
        rules: Mapping[str, Rule] | None = None,
        projector: Projector | None = None,
        refresh: Refresh | None = None,
        combine: Combine | None = None,
        feedback: Feedback | None = None,
        gradients: Gradients = "hold",
        weight_decay: float = 0.0,
        decay_after_update: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: torch.dtype | None = torch.float32,
        dense_state_dtype: torch.dtype | None = None,
        basis_dtype: torch.dtype | None = None,
        mask_null: bool | torch.dtype = True,
        stochastic_rounding: bool = False,
        average_over: ProcessGroup | None = None,
        compile: bool | None = None,
    ) -> None:
        rule = Adam() if rule is None else rule
        dense_rule = rule if dense_rule is None else dense_rule
        rules = dict(rules or {})
        for r in (rule, dense_rule, *rules.values()):
            if compile is not False and not _hashable(r):
                if compile:
                    raise ValueError(
                        f"compile=True tells rules apart by their hash, which {r} lacks: make it a frozen dataclass of numbers "
                        "and tuples"
                    )
                compile = False
        if gradients not in get_args(Gradients):
            raise ValueError(f"gradients={gradients!r} is unknown: use 'hold', 'project' or 'update'")
        refresh = Refresh() if refresh is None else refresh
        if feedback is not None:
            feedback.check(rule, refresh, combine, gradients, average_over)
        if combine is not None and gradients == "project":
            raise ValueError(
                f"combine={combine!r} needs full gradients, of which gradients='project' keeps projections: use "
                "gradients='hold', or 'update' without micro-batches and clipping"
            )
        if combine is not None and average_over is not None:
            raise ValueError(
                f"combine={combine!r} needs full gradients of all data, of which average_over sends projections: use "
                "DistributedDataParallel for the whole model, or fully_shard, and average_over=None"
            )
        self.projector = SubspaceIteration() if projector is None else projector
        self.gradients = gradients
        self.decay_after_update = decay_after_update
        self.max_grad_norm = max_grad_norm
        self.mask_null = mask_null
        self.stochastic_rounding = stochastic_rounding
        self.compile = compile
        self.grad_norm: Tensor = torch.zeros((), dtype=torch.float32, device="cpu")
        self.refresh_seconds = 0.0
        self.prepared: list[Prepared] | None = None
        self._seen: dict[
            Tensor, tuple[weakref.ref[Tensor], int]
        ] = {}  # the gradients, and their versions, that it is made of
        self.copies: Copies | None = None
        if average_over is not None:
            from subspan.optim.copies import Copies

            self.copies = Copies(average_over)
        self._backward: Backward | None = None
        super().__init__(
            params,
            lr,
            rule=rule,
            dense_rule=dense_rule,
            rules=rules,
            refresh=replace(refresh, first=refresh.first or ("gradient" if gradients == "hold" else "random")),
            combine=combine,
            feedback=feedback,
            weight_decay=weight_decay,
            state_dtype=state_dtype,
            dense_state_dtype=dense_state_dtype,
            basis_dtype=basis_dtype,
        )
        self._hook()

    clips_alone: ClassVar[bool] = True
    """Whether `max_grad_norm` is for trainers to set (subspan.hf); False: they clip p.grad, as of any optimizer."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; checks the group's values and creates the state of its parameters."""
        super().add_param_group(param_group)
        if self._backward:
            self._backward.attach()

    @property
    def max_grad_norm(self) -> float | None:
        """See the class; may be set between two steps, as trainers do that clip."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None and not value > 0:
            raise ValueError(f"max_grad_norm={value!r} must be positive: use None for no clipping")
        if self.gradients == "update" and value is not None:
            raise ValueError(
                f"max_grad_norm={value!r} needs the norm of all gradients, which gradients='update' never sees together: use "
                "gradients='project' or drop max_grad_norm"
            )
        self._max_grad_norm = value

    def release(self) -> None:
        """Take the hooks of `project` and `update` off the parameters, and forget what they kept: for a model that goes on
        without this optimizer while something still refers to it. `zero_grad()` and `step()` put them back."""
        self.prepared, self._seen = None, {}
        if self._backward:
            self._backward.detach()

    # --------------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. `closure` is run with gradients enabled, its value returned."""
        if hasattr(self, "grad_scale"):
            for left in ("grad_scale", "found_inf"):  # the scaler takes them away after a step, not after an error
                vars(self).pop(left, None)
            if self.copies:
                raise ValueError(
                    "GradScaler looks at gradients before average_over has averaged them, so that processes would decide apart: "
                    "use bfloat16, which needs no scaler"
                )
            raise ValueError(
                f"GradScaler cannot unscale the gradients that gradients={self.gradients!r} took during the backward pass: "
                "use bfloat16, which needs no scaler, or gradients='hold'"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._stale():
            self.prepared = None
        if self.max_grad_norm is not None and self.prepared is None:
            self.prepare()
        if self.prepared is None:
            self._check_gradients()
        norms = list(self._backward.updated.values()) if self._backward else []
        # Without anything to wait for, R lives for one parameter only.
        for group, p, R, norm, live in self._low_rank_gradients() if self.prepared is None else self.prepared:
            norms.append(norm)
            factor = None
            if self.max_grad_norm is not None:  # the norm that decides is that of all
                norm = self.grad_norm.to(R.device)
                # As torch.nn.utils.clip_grad_norm_. Of nan 0, which a combine multiplies the zeros of a broken gradient by.
                factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0).nan_to_num(0.0)
                live = live & (norm < math.inf)
            self.apply(group, p, R, live, factor)
            if self.gradients == "update":
                p.grad = None
        self.grad_norm = self._total(norms)
        self._end_step()
        return loss

    @torch.no_grad()
    def prepare(self, loss: Tensor | None = None) -> Tensor:
        """All of `step()` that comes before the first weight changes; returns `grad_norm`.

        For a loop that skips a step whole when its loss or a gradient is not finite, with nothing changed, no basis either:

            norm = optimizer.prepare(loss)
            if torch.isfinite(norm + loss):     # one host sync
                optimizer.step()
            optimizer.zero_grad()

        Bases that are due are refreshed here, only if every gradient, and `loss` where it is given, is finite (a host sync, on
        steps with a refresh). In `update` mode the hooks have refreshed and updated already: the norm is what they saw.
        """
        if self.prepared is not None and self.gradients == "project":
            return self.grad_norm  # asked again: the low-rank gradients are taken already, and no others can have come
        self._check_gradients()
        refresh = True
        if self.copies:
            self.copies.wait()
        if any(p.grad is not None and self.refresh_due(p) for p in self._index):
            seen = [self._norm(p, local(p.grad)) for _, p in self._parameters() if p.grad is not None]
            seen += [self._norm(p, R) for p, R in (self._backward.low_rank.items() if self._backward else ())]
            total = self._total(seen if loss is None else [*seen, loss.detach().float()])
            refresh = bool(self._everywhere(total).isfinite())
        self.prepared = list(self._low_rank_gradients(refresh))
        norms = list(self._backward.updated.values()) if self._backward else []
        self.grad_norm = self._total([*norms, *(norm for *_, norm, _ in self.prepared)])
        if self.gradients == "hold":
            self._seen = {p: (weakref.ref(G), G._version) for p, G in self._held()}
        return self.grad_norm

    def _stale(self) -> bool:
        """Whether, in `hold`, gradients came or changed since `prepare()`; in the other modes a backward pass raises."""
        if self.prepared is None or self.gradients != "hold":
            return False
        now = dict(self._held())
        seen = self._seen
        return now.keys() != seen.keys() or any(
            seen[p][0]() is not G or seen[p][1] != G._version for p, G in now.items()
        )

    def _held(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _, p in self._parameters():
            if p.grad is not None:
                yield p, p.grad

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """With `average_over`: backward passes inside leave averaging to a later one, or to step(). For all but the last
        micro-batch of a step, as DistributedDataParallel's; results are the same without, for more traffic."""
        if self.copies:
            self.copies.syncing = False
        try:
            yield
        finally:
            if self.copies:
                self.copies.syncing = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; forgets the low-rank gradients of `project` mode too."""
        super().zero_grad(set_to_none)
        self._end_step()

    def project(self, group: dict[str, Any], p: Tensor, refresh: bool = True) -> Tensor:
        """R (r, k) of a projected parameter, after the refresh if one is due; of a dense one p.grad itself. Of a sharded one,
        this process' part."""
        assert p.grad is not None
        if "rank" not in group:
            return as_matrix(local(p.grad).contiguous(), group) if "view" in group else local(p.grad)
        if refresh and self.refresh_due(p):
            with mark("refresh"):
                self._refresh_basis(group, p, p.grad)
        R = self.low_rank_gradient(group, p, p.grad)
        if self.copies:
            self.copies.average(R)
        return R

    def low_rank_gradient(self, group: dict[str, Any], p: Tensor, G: Tensor, R: Tensor | None = None) -> Tensor:
        """Q^T A (r, k) of p's gradient G, added to R if there is one. For moments in codes it lies as they do."""
        with mark("project"):
            G = as_matrix(local(G).contiguous(), group)
            A, Q = orient(G, self.side(p)), self.basis(p, G.dtype)
            turned = self.memory(group)[1].bits is not None
            shards = self._shards[p]
            if shards is not None and shards.axis == "d":
                new = shards.reduce(project(A, shards.mine_of(Q), turned))
                return new if R is None else R.add_(new)
            if R is None:
                R = project(A, Q, turned)
                return R if self.feedback is None else self.feedback.low_rank(self.state_here(p), Q.float(), R)
            X, left, right = (R.mT, A.mT, Q) if turned else (R, Q.mT, A)
            (X.addmm_ if X.ndim == 2 else X.baddbmm_)(left, right)
            return R

    def gauge(self, group: dict[str, Any], p: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of what p is updated with, R or, with a combine, its gradient; and what of R counts (norms.py)."""
        norm, live = gauge(R, "rank" in group, self.mask_null, self._shards[p])
        if self.combine is not None and "rank" in group:
            assert p.grad is not None
            norm = self._norm(p, local(p.grad))
            live = live & (norm < math.inf)
        return norm, live

    def _norm(self, p: Tensor, X: Tensor) -> Tensor:
        """The norm of all of p's gradient, or low-rank gradient, from this process' part X."""
        shards = self._shards[p]
        return norm_of(X) if shards is None else shards.norm(norm_of(X))

    def apply(
        self,
        group: dict[str, Any],
        p: Tensor,
        R: Tensor,
        live: Tensor,
        factor: Tensor | None = None,
        use: Tensor | None = None,
    ) -> None:
        """Update p from its low-rank gradient R (r, k), or from its gradient if it is dense; R is used up.

        live: bool tensor that broadcasts to R; where it is False, R counts as zero. factor: 0-d, multiplies R.
        use: 0-d bool tensor on p's device. If it is False, and R zero, weight, moments and basis stay as they are; only the
        count of steps, which the host keeps too, goes on.
        """
        state, shards = self.state_here(p), self._shards[p]
        state["step"].add_(1)
        self._steps[p] += 1
        lr = float(group["lr"])
        keep = 1 - lr * group["weight_decay"]
        size = lr * keep if self.decay_after_update else lr
        rule, store, _ = self.memory(group)
        compiled = p.device.type == "cuda" and store.bits is not None if self.compile is None else self.compile
        generator = None
        if isinstance(p, Int8Weight) or (self.stochastic_rounding and p.dtype == torch.bfloat16):
            generator = torch.Generator(device=p.device).manual_seed(self._rounding_seed(p))
        W, side, Q, combine, gradient = local(p), None, None, None, None
        if "rank" in group or "view" in group:
            W = as_matrix(W, group)
        if "rank" in group:
            side, Q = self.side(p), self.basis(p, p.dtype)
            if shards is not None and shards.axis == "d":
                Q = shards.mine_of(Q)
            size *= group["scale"]
            if self.combine is not None:
                assert p.grad is not None
                combine, gradient = self.combine, as_matrix(local(p.grad).contiguous(), group)
            if self.feedback is not None:
                assert p.grad is not None
                A = orient(as_matrix(p.grad.contiguous(), group), side)
                self.feedback.keep(state, A, self.basis(p), R, live.any())
        update_weight(
            W,
            R,
            state,
            rule,
            store,
            count=self._steps[p] - self._timetable.reset.get(p, 0),
            side=side,
            Q=Q,
            size=size,
            keep=keep,
            live=live,
            factor=factor,
            use=use,
            generator=generator,
            combine=combine,
            gradient=gradient,
            compiled=compiled,
            shards=shards,
        )

    def _low_rank_gradients(self, refresh: bool = True) -> Iterator[Prepared]:
        """What `Prepared` says of every parameter with a gradient, each as it is asked for."""
        taken = self._backward.low_rank if self._backward else {}
        for group, p in self._parameters():
            if p in taken:
                R = taken.pop(p)
                if self.copies:
                    self.copies.settle(p, R)
            elif p.grad is not None:
                R = self.project(group, p, refresh)
            else:
                continue
            if self.gradients == "project" and "rank" in group:
                p.grad = None
            yield group, p, R, *self.gauge(group, p, R)

    def _check_gradients(self) -> None:
        """ValueError for gradients that no step can use."""
        for _, p in self._parameters():
            if self._backward:
                self._backward.check(p)
        for p, G in self._held():
            check_dense(G)
            settle_gradient(p)
        if self.copies:
            self._check_complete()

    def _check_complete(self) -> None:
        """ValueError where a gradient that other processes may have is missing: averages would be taken of different ones."""
        taken = (self._backward.low_rank.keys() | self._backward.updated.keys()) if self._backward else set()
        missing = [p for p in self._index if p.requires_grad and p.grad is None and p not in taken]
        if missing and len(missing) < len(self._index):
            raise ValueError(
                f"{len(missing)} of {len(self._index)} projected parameters have no gradient, the first of shape "
                f"{tuple(missing[0].shape)}: average_over needs one of each in every step, on every process: freeze what is "
                "unused, or let it take part, times 0"
            )

    def _everywhere(self, X: Tensor) -> Tensor:
        """The largest of a number (0-d) on all processes, so that all decide alike."""
        if self.copies:
            return self.copies.max(X)
        shards = next((shards for shards in self._shards.values() if shards is not None), None)
        return X if shards is None else shards.max_everywhere(X)

    @staticmethod
    def _total(norms: Sequence[Tensor]) -> Tensor:
        """The norm of all, from the norms of the parts, on the device of the first."""
        if not norms:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        return total

    def _end_step(self) -> None:
        self.prepared, self._seen = None, {}
        if self._backward:
            self._backward.clear()
            self._backward.attach()

    # ------------------------------------------------------------------------------------------- state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the state that exists since construction; dtypes stay this optimizer's.

        Raises ValueError when groups, ranks or state shapes differ: nothing is loaded then.
        """
        if self._backward and (self._backward.low_rank or self.prepared is not None):
            raise ValueError(
                "gradients wait for step(), in the basis of now: call zero_grad() before load_state_dict()"
            )
        super().load_state_dict(state_dict)
        self.prepared, self._seen = None, {}  # in other bases

    def _hook(self) -> None:
        if self.gradients != "hold" or self.copies:
            self._step_supports_amp_scaling = True  # GradScaler then tells step() that it is there, which raises
        if self.gradients != "hold":
            self._backward = Backward(self)
            self._backward.attach()

    def __getstate__(self) -> dict[str, Any]:
        # torch's keeps only groups and state: a deep copy would lose rule and projector. Hooks belong to this object alone, and
        # so does the `step` that a scheduler has put before the class's, which would go on stepping this one.
        own = {key: value for key, value in self.__dict__.items() if not _HOOKS.fullmatch(key)}
        return {**own, "_backward": None, "prepared": None, "_seen": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._backward is None:
            self._hook()


def _hashable(rule: Rule) -> bool:
    try:
        hash(rule)
    except TypeError:
        return False
    return True
