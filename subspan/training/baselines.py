"""Baselines that change the model instead of the optimizer: LoRA, ReLoRA, and weights that are products of two thin ones.

    lora          W0 + (alpha / r) B A, W0 frozen, A and B trained (arXiv 2106.09685, through peft)
    relora        the same; every `merge_every` steps B A is added to W0, A drawn anew, B and the moments of both set to zero, and
                  the learning rate warms up again (arXiv 2307.05695)
    factorized    W = B A, nothing else

for the linear layers that GaLore would project, at rank `optim.rank`. Embeddings, norms and head are trained as usual, as in the
tables of arXiv 2403.03507, unless `model.train_rest` is false. An exported model is an ordinary one again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from subspan.extras import require
from subspan.optim.groups import default_targets
from subspan.training.config import TrainConfig
from subspan.training.finetune_config import FinetuneConfig


class Factorized(nn.Module):
    """A linear layer with weight B A: A (r, n), B (m, r)."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        (m, n), options = layer.weight.shape, {"dtype": layer.weight.dtype, "device": layer.weight.device}
        rank = min(rank, m, n)
        self.A = nn.Linear(n, rank, bias=False, **options)
        self.B = nn.Linear(rank, m, bias=layer.bias is not None, **options)
        if layer.bias is not None:
            self.B.bias = layer.bias
        # The best approximation of what the layer was: of a fresh one too, whose scale it keeps (arXiv 2105.01029).
        U, S, Vh = torch.linalg.svd(layer.weight.detach().float(), full_matrices=False)
        with torch.no_grad():
            self.A.weight.copy_(S[:rank].sqrt().unsqueeze(-1) * Vh[:rank])
            self.B.weight.copy_(U[:, :rank] * S[:rank].sqrt())

    def forward(self, X: Tensor) -> Tensor:
        Y: Tensor = self.B(self.A(X))
        return Y

    def merged(self) -> nn.Linear:
        """The same layer with one weight."""
        n, m = self.A.weight.shape[1], self.B.weight.shape[0]
        with torch.device("meta"):
            layer = nn.Linear(n, m, bias=False)
        layer.weight = nn.Parameter((self.B.weight.float() @ self.A.weight.float()).to(self.B.weight.dtype))
        layer.bias = self.B.bias
        return layer


def add_baseline(model: nn.Module, config: TrainConfig | FinetuneConfig, head: Collection[str] = ()) -> None:
    """Change `model`, in place, as `config.model.baseline` says; nothing if it is None.

    head: names of parameters that are trained whatever `config.model.train_rest` says.

    Raises ValueError: the model has no linear layers in numbered blocks, or of a kind that cannot be factorized.
    """
    kind, rank = config.model.baseline, config.optim.rank
    if kind is None:
        return
    layers = [name.removesuffix(".weight") for name in sorted(default_targets(model))]
    if not layers:
        raise ValueError(
            f"model.baseline={kind} finds no linear layer in numbered blocks of {config.model.name}: drop it"
        )
    turned = [name for name in layers if not isinstance(model.get_submodule(name), nn.Linear)]  # GPT-2's Conv1D
    if turned and kind == "factorized":
        raise ValueError(
            f"model.baseline=factorized cannot factorize {turned[0]} of {config.model.name}, which is no nn.Linear: use lora"
        )
    if kind == "factorized":
        for name in layers:
            _replace(model, name, Factorized(model.get_submodule(name), rank))  # type: ignore[arg-type]
        chosen = {name for name, _ in model.named_parameters() if name.rpartition(".")[0].rpartition(".")[0] in layers}
    else:
        peft = require("peft", "baselines")
        adapters = peft.LoraConfig(
            r=rank,
            lora_alpha=config.model.lora_alpha,
            lora_dropout=config.model.lora_dropout,
            target_modules=layers,
            fan_in_fan_out=bool(turned),
        )
        peft.inject_adapter_in_model(adapters, model)
        chosen = {name for name, p in model.named_parameters() if any(name.startswith(f"{layer}.") for layer in layers)}
    for name, p in model.named_parameters():
        if name not in chosen:
            p.requires_grad_(config.model.train_rest or name in head)


def merge(model: nn.Module) -> None:
    """Make ordinary linear layers of all that `add_baseline` made."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Factorized):
            _replace(model, name, module.merged())
        elif hasattr(module, "lora_A"):
            layer: Any = module
            layer.merge(safe_merge=True)
            _replace(model, name, layer.get_base_layer())


@torch.no_grad()
def restart_adapters(model: nn.Module, optimizer: Any, seed: int) -> None:
    """ReLoRA: adapters go into the frozen weights and begin anew, with them their moments. `seed` decides what they are then."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in (module for module in model.modules() if hasattr(module, "lora_A")):
            weight: Tensor = layer.get_base_layer().weight  # type: ignore[operator]
            weight.add_(layer.get_delta_weight("default").to(weight.dtype))  # type: ignore[operator]
            layer.reset_lora_parameters("default", init_lora_weights=True)  # type: ignore[operator]
            for adapter in (layer.lora_A, layer.lora_B):
                optimizer.forget(adapter["default"].weight)  # type: ignore[index, union-attr]


def restarts(step: int, config: TrainConfig) -> bool:
    """Whether adapters begin anew before `step`: the first one after every `merge_every`, in a run that was extended too."""
    return config.model.baseline == "relora" and step > 1 and (step - 1) % config.model.merge_every == 0


def restart_factor(step: int, config: TrainConfig) -> float:
    """What the learning rate of `step` is multiplied by: it warms up linearly over `rewarm_steps` after each restart."""
    every = config.model.merge_every
    if config.model.baseline != "relora" or step <= every:
        return 1.0
    return min(1.0, ((step - 1) % every + 1) / max(config.model.rewarm_steps, 1))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
