"""Parameter groups: which parameters of a model are projected, chosen by name, and what a group may hold."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from subspan.checks import check_whole
from subspan.optim import int8
from subspan.optim.projectors import check_proj_type

Named = Sequence[tuple[str, Tensor]]

VIEWS = ("matrix", "conv", "batch")
"""How a weight is read as a matrix: as it is, first dimension x the rest, or a batch of matrices."""

KEYS = ("rank", "update_proj_gap", "scale", "proj_type", "view", "full_rank")
"""Of a group, beside torch's own and `name`; others are somebody else's, unless they look like one of these."""

MATRIX_MODULES = ("Linear", "Conv1D")
"""Class names whose `weight` is a matrix by default: torch's Linear and transformers' Conv1D (GPT-2's layout, (in, out))."""

IN_BLOCK = re.compile(r"\.\d+\.")
"""Repeated blocks are numbered: model.layers.0.self_attn..., h.0.attn..., encoder.layer.0.output...."""

ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")
"""Routers of mixtures of experts: small, sensitive, kept dense."""

EXPERTS = re.compile(r"(^|\.)experts\.")
"""Weights of all experts in one tensor (experts, ..., ...), as transformers has them: a batch of matrices."""


def param_groups(
    model: nn.Module,
    *,
    rank: int | None,
    targets: Sequence[str] | None = None,
    views: Mapping[str, str] | None = None,
    scale: float = 0.25,
    update_proj_gap: int = 200,
    proj_type: str = "std",
    lr: float | None = None,
    dense_lr: float | None = None,
    split: bool = False,
    verbose: bool = True,
) -> list[dict[str, Any]]:
    """The parameter groups of `model` for a `ProjectedOptimizer`: projected matrices, dense parameters, dense vectors.

    By default the linear layers inside the model's numbered blocks are projected: attention and MLP of any transformers
    model (LLaMA, GPT-2, BERT, RoBERTa, Qwen, Gemma, Phi, Mixtral, ...), experts that are stacked in one weight too. Embeddings,
    head, poolers, classifiers, routers, norms and biases stay dense; so does everything frozen stay out.

    Args:
        rank: rank of the basis; None: nothing is projected, the full-rank baseline in the same three groups. The first then has
            full_rank=True: the optimizer's `rule` steps it, `dense_rule` the others.
        targets: regular expressions searched in parameter names, instead of the default. Each must match at least one
            trainable weight of two or more dimensions. A named embedding or head is projected too.
        views: regular expression -> "conv" (first dimension x the rest) or "batch" (stacked matrices), for weights of more
            than two dimensions; stacked experts are "batch" by themselves.
        scale, update_proj_gap, proj_type: keys of the projected group.
        lr: learning rate of the projected group, dense_lr: of both dense groups; None: the optimizer's.
        split: with rank=None, groups of their own for what rules treat differently that tell inputs from outputs (`ColumnNorm`):
            "head", the last layer, and "projected (in, out)" and "dense (in, out)", weights of Conv1D and Embedding modules.
            The last layer is the model's output embedding, tied or not, or else the last linear layer outside of the blocks.
        verbose: print `describe_groups`.

    Returns groups of (name, parameter) pairs. Vectors (norms, biases) get weight_decay=0. Empty groups are left out.

    Raises ValueError: a pattern without a match, nothing to project, nothing to train.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model has no trainable parameter: set requires_grad=True on what shall be trained")
    if targets is None:
        chosen = default_targets(model, 1 if rank is None else 2) | {n for n, p in trainable if _stacks_experts(n, p)}
    else:
        chosen = _targeted(trainable, targets)
    if not chosen and rank is not None:
        raise ValueError(
            "targets=None found no linear layer in numbered blocks that is trained and has two rows and columns: name the "
            "weights, as in targets=['attn', 'mlp'], or set requires_grad=True on them"
        )
    if split and (rank is not None or views):
        raise ValueError(f"split=True is for rank=None without views, not rank={rank!r}, views={views!r}: drop it")
    viewed = _views(trainable, chosen, views or {})
    shared = {"scale": scale, "update_proj_gap": update_proj_gap, "proj_type": proj_type}
    groups: list[dict[str, Any]] = []
    for view in VIEWS:
        params = [(name, p) for name, p in trainable if name in chosen and viewed.get(name, "matrix") == view]
        groups.append(
            {"params": params, "name": "projected" if view == "matrix" else f"projected ({view})", **_given(lr)}
        )
        groups[-1] |= {"full_rank": True} if rank is None else {"rank": rank, **shared}
        groups[-1] |= {"view": view} if rank is not None or view == "conv" else {}
    rest = [(name, p) for name, p in trainable if name not in chosen]
    groups.append({"params": [(n, p) for n, p in rest if p.ndim >= 2], "name": "dense", **_given(dense_lr)})
    vectors = [(n, p) for n, p in rest if p.ndim < 2]
    groups.append({"params": vectors, "name": "no_decay", "weight_decay": 0.0, **_given(dense_lr)})
    if split:
        groups = _split(model, groups, chosen)
    groups = [group for group in groups if group["params"]]
    if verbose:
        print(describe_groups(groups))
    return groups


def quantize_weights(model: nn.Module, names: Iterable[str] | None = None, group_size: int = int8.GROUP_SIZE) -> None:
    """Keep weights of `model` in 8 bits (`int8.Int8Weight`), in place and one by one. Call it before `param_groups`.

    names: of parameters, weights of Linear, Embedding or Conv1D modules; None: those that `param_groups` projects by default.
    group_size: values along a row that share a scale.

    Raises ValueError: a name that `model.named_parameters()` has not, a parameter that is no floating matrix.
    """
    int8.quantize_weights(model, default_targets(model) if names is None else names, group_size)


def describe_groups(groups: Sequence[Mapping[str, Any]]) -> str:
    """The grouping as text: a line a group with its settings, then a line for each kind of parameter in it."""
    lines = []
    for group in groups:
        pairs = _pairs(group)
        count = sum(p.numel() for _, p in pairs)
        keys = ("rank", "proj_type", "scale", "update_proj_gap") if "rank" in group else ()
        settings = [f"{key} {group[key]}" for key in (*keys, "lr", "weight_decay") if key in group]
        title = group.get("name", "projected" if "rank" in group else "dense")
        if "rank" not in group:
            title = title.replace("projected", "matrices (full rank)")
        lines.append(f"{title}: {len(pairs)} tensors, {count / 1e6:.2f} M parameters" + ", ".join(["", *settings]))
        kinds: dict[tuple[str, tuple[int, ...]], int] = {}
        for name, p in pairs:
            kind = (re.sub(r"\d+", "*", name), tuple(p.shape))
            kinds[kind] = kinds.get(kind, 0) + 1
        for (pattern, shape), times in kinds.items():
            lines.append(f"  {times:4d} x {' x '.join(map(str, shape)) or 'scalar':<16} {pattern}")
    return "\n".join(lines)


def _pairs(group: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """(name, parameter) pairs of a group, before or after an optimizer took the names out of `params`."""
    if "param_names" in group:
        return list(zip(group["param_names"], group["params"], strict=True))
    return [item if isinstance(item, tuple) else (f"parameter.{i}", item) for i, item in enumerate(group["params"])]


def _split(model: nn.Module, groups: list[dict[str, Any]], chosen: set[str]) -> list[dict[str, Any]]:
    """The groups of `param_groups(split=True)`."""
    modules = {name: m for name, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}
    turned = {m.weight for m in modules.values() if _is(m, "Embedding", "Conv1D")}
    rest = {m.weight for name, m in modules.items() if _is(m, "Linear") and f"{name}.weight" not in chosen}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    trained = [p for group in groups for _, p in group["params"]]
    last = {output.weight} if output is not None else {*[p for p in trained if p in rest][-1:]}
    made = []
    for group in groups:
        parts: dict[str, list[tuple[str, Tensor]]] = {group["name"]: []}
        for name, p in group["params"]:
            own = f"{group['name']} (in, out)" if p in turned else group["name"]
            parts.setdefault("head" if p in last else own, []).append((name, p))
        made += [{**group, "name": name, "params": params} for name, params in parts.items()]
    return made


def _is(module: nn.Module, *names: str) -> bool:
    """Whether the module's class, or one that it was made of, has one of these names."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def _given(lr: float | None) -> dict[str, float]:
    return {} if lr is None else {"lr": lr}


def default_targets(model: nn.Module, least: int = 2) -> set[str]:
    """Names of the weights that `param_groups` projects by default: of the trainable linear layers in numbered blocks, with at
    least so many rows and columns. Adapters of rank 1 have one."""
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if _is(module, *MATRIX_MODULES) and IN_BLOCK.search(f".{name}.") and not ROUTER.search(name)
    }
    return {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and name in matrices and p.ndim == 2 and min(p.shape) >= least
    }


def _stacks_experts(name: str, p: Tensor) -> bool:
    return p.ndim == 3 and EXPERTS.search(name) is not None and IN_BLOCK.search(f".{name}") is not None


def _targeted(trainable: Named, targets: Sequence[str]) -> set[str]:
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets={targets!r} must be a list of patterns, as in targets=['attn', 'mlp']")
    chosen: set[str] = set()
    for pattern in targets:
        found = {name for name, p in trainable if p.ndim >= 2 and _search("targets", pattern, name)}
        if not found:
            raise ValueError(f"targets: pattern {pattern!r} matches no trainable weight matrix{_examples(trainable)}")
        chosen |= found
    return chosen


def _views(trainable: Named, chosen: set[str], views: Mapping[str, str]) -> dict[str, str]:
    viewed = {name: "batch" for name, p in trainable if name in chosen and _stacks_experts(name, p)}
    for pattern, view in views.items():
        if view not in ("conv", "batch"):
            raise ValueError(f"views: {pattern!r} -> {view!r} is unknown: use 'conv' or 'batch'")
        found = [name for name, p in trainable if name in chosen and p.ndim > 2 and _search("views", pattern, name)]
        if not found:
            raise ValueError(
                f"views: pattern {pattern!r} matches no target of more than two dimensions: add it to targets"
            )
        viewed |= dict.fromkeys(found, view)
    for name, p in trainable:
        if name in chosen and p.ndim > 2 and name not in viewed:
            raise ValueError(
                f"{name} of shape {tuple(p.shape)} is no matrix: give views={{{name!r}: 'conv'}} (first x rest) or 'batch'"
            )
    return viewed


def _search(argument: str, pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{argument}: pattern {pattern!r} is no regular expression: {error}") from None


def _examples(trainable: Named) -> str:
    names = [name for name, p in trainable if p.ndim >= 2]
    middle = names[len(names) // 2 : len(names) // 2 + 2]
    return f": names look like {', '.join(middle)}" if middle else ""


# ------------------------------------------------------------------------------------------- values of a group


def as_matrix(X: Tensor, group: dict[str, Any]) -> Tensor:
    """A parameter or its gradient as a matrix or a batch of matrices: a view of the same memory."""
    shape = matrix_shape(X.shape, group)
    if shape == X.shape:
        return X
    if not X.is_contiguous():
        raise ValueError(
            f"a weight of shape {tuple(X.shape)} is not contiguous any more: leave the model's memory format as it is"
        )
    return X.view(shape)


def matrix_shape(shape: Sequence[int], group: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of that view."""
    if group.get("view", "matrix") == "conv":
        return (shape[0], math.prod(shape[1:]))
    return tuple(shape) if len(shape) <= 3 else (math.prod(shape[:-2]), *shape[-2:])


def check_group(group: dict[str, Any], names: list[str]) -> None:
    """ValueError for a value or a parameter that its group cannot have."""
    for key in group.keys() - KEYS:
        if near := difflib.get_close_matches(key, KEYS, 1, cutoff=0.8):
            raise ValueError(f"{key!r} is no key of a parameter group, {near[0]!r} is: correct it")
    for key in ("lr", "weight_decay"):
        value = float(group[key])
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{key}={value!r} must be a number of at least 0")
    for name, p in zip(names, group["params"], strict=True):
        if not p.is_floating_point():
            raise ValueError(f"{name} of dtype {p.dtype} cannot be trained: use a real floating dtype")
    if "rank" in group:
        check_whole("rank", group["rank"], minimum=1)
        check_whole("update_proj_gap", group["update_proj_gap"], minimum=1)
        check_proj_type(group["proj_type"])
        if isinstance(group["scale"], (str, bool)) or not math.isfinite(group["scale"]):
            raise ValueError(f"scale={group['scale']!r} must be a number: 0.25 is the paper's")
    elif "view" not in group:
        return
    view = group.get("view", "matrix")
    if view not in VIEWS:
        raise ValueError(f"view={view!r} is unknown: use one of {', '.join(VIEWS)}")
    for name, p in zip(names, group["params"], strict=True):
        shape = tuple(p.shape)
        if p.numel() == 0:
            raise ValueError(f"{name} of shape {shape} is empty: leave it out of groups with a rank or a view")
        if p.ndim < 2:
            raise ValueError(f"{name} of shape {shape} is no matrix: put it in a group without rank and view")
        if p.ndim > 2 and view == "matrix":
            raise ValueError(
                f"{name} of shape {shape} is no matrix: set view='conv' (first x rest) or view='batch' in its group"
            )
        if p.ndim == 2 and view == "batch":
            raise ValueError(f"{name} of shape {shape} is one matrix: drop view='batch' from its group")
        if not p.is_contiguous():
            raise ValueError(
                f"{name} of shape {shape} is not contiguous: call .contiguous() before building the optimizer"
            )
