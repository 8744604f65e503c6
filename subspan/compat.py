"""galore_torch's classes and parameter-group keys, unchanged, on Subspan's optimizer.

    from subspan.compat import GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor       # instead of: from galore_torch import ...

    subspan.compat.install()        # or: from here on `import galore_torch` means Subspan, in code that cannot be changed as well

These follow the reference's conventions: exact SVD at every `update_proj_gap` steps from the current gradient, eps before the
bias correction (1e-6), weight decay after the update, state and basis in the parameter's dtype (Adafactor's moments in fp32),
square matrices on the right. They do not follow its defects: state is plain tensors that resume, `reverse_std` works on every
shape, wrong values are errors, a gradient with nan kills neither the run nor a basis, a closure may call backward.
`subspan.GaLoreAdamW` follows torch.optim.AdamW instead.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from subspan.optim.optimizer import ProjectedOptimizer
from subspan.optim.projectors import SVD
from subspan.optim.rules import Adafactor, Adam, Rule

REQUIRED_KEYS = ("rank", "update_proj_gap", "scale", "proj_type")


class _Compat(ProjectedOptimizer):
    """ProjectedOptimizer with the reference's conventions."""

    clips_alone = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        rule: Rule,
        weight_decay: float,
        decay_after_update: bool,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            rule=rule,
            projector=SVD(),
            weight_decay=weight_decay,
            decay_after_update=decay_after_update,
            state_dtype=state_dtype,
            mask_null=False,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group.get("dim", 2) != 2:
            raise ValueError(
                f"dim={param_group['dim']!r} (the reference's Tucker projector, which never worked) is not supported: "
                "drop dim and give the group view='conv' or view='batch'"
            )
        missing = [key for key in REQUIRED_KEYS if key not in param_group]
        if "rank" in param_group and missing:
            raise ValueError(
                f"a group with rank also needs {', '.join(missing)}, as in galore_torch: add them to the group"
            )
        super().add_param_group(param_group)


class GaLoreAdamW(_Compat):
    """galore_torch.GaLoreAdamW. `no_deprecation_warning` is accepted: there is none to silence."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
    ) -> None:
        rule = Adam(tuple(betas), eps, uncorrected_eps=True, bias_correction=correct_bias)  # type: ignore[arg-type]
        super().__init__(params, lr, rule, weight_decay, decay_after_update=True)


class GaLoreAdamW8bit(_Compat):
    """galore_torch.GaLoreAdamW8bit: moments in 8 bits, eps after the bias correction, on the CPU as well.

    Its moments are coded in blocks along the rank, where bitsandbytes goes through R row by row: the same code book, other
    blocks. `optim_bits` and `args` have no effect, as in the reference, nor has `is_paged`: there is no paging.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
    ) -> None:
        for name, value, only in (
            ("amsgrad", amsgrad, False),
            ("min_8bit_size", min_8bit_size, 4096),
            ("percentile_clipping", percentile_clipping, 100),
            ("block_wise", block_wise, True),
        ):
            if value != only:
                raise ValueError(f"{name}={value!r} is not supported: use {name}={only!r}")
        rule = Adam(tuple(betas), eps)  # type: ignore[arg-type]
        super().__init__(params, lr, rule, weight_decay, decay_after_update=True, state_dtype=torch.int8)


class GaLoreAdafactor(_Compat):
    """galore_torch.GaLoreAdafactor in the setting that everybody uses: a given lr, no first moment, no parameter scaling.

    relative_step, scale_parameter and warmup_init must not be switched on, beta1 must be None: otherwise ValueError. The first
    two are on by default in the reference, which then refuses every lr, and so transformers' "galore_adafactor_layerwise".
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool | None = None,
        relative_step: bool | None = None,
        warmup_init: bool = False,
    ) -> None:
        for name, value in (("scale_parameter", scale_parameter), ("relative_step", relative_step)):
            if value:
                raise ValueError(f"{name}=True is not supported: set {name}=False and give lr")
        if warmup_init:
            raise ValueError("warmup_init=True is not supported: use a learning rate scheduler with warm-up")
        if beta1 is not None:
            raise ValueError(f"beta1={beta1!r} is not supported: use beta1=None, or GaLoreAdamW for a first moment")
        if lr is None:
            raise ValueError("lr=None is not supported: give a learning rate, such as lr=1e-3")
        # eps[1] bounds the scale of scale_parameter=True and has no effect without it
        super().__init__(
            params,
            lr,
            Adafactor(eps[0], clip_threshold, decay_rate),
            weight_decay,
            decay_after_update=False,
            state_dtype=torch.float32,
        )


MODULES: dict[str, dict[str, Any]] = {
    "galore_torch": {
        "GaLoreAdamW": GaLoreAdamW,
        "GaLoreAdamW8bit": GaLoreAdamW8bit,
        "GaLoreAdafactor": GaLoreAdafactor,
    },
    "galore_torch.adamw": {"AdamW": GaLoreAdamW},
    "galore_torch.adamw8bit": {"AdamW8bit": GaLoreAdamW8bit},
    "galore_torch.adafactor": {"Adafactor": GaLoreAdafactor},
}
"""The reference's modules, and what `install` puts there."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes them."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        return ModuleSpec(fullname, self, origin=__file__, is_package=fullname == "galore_torch")

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(MODULES[module.__name__])


def install() -> None:
    """From now on `import galore_torch` gives Subspan's classes, whether galore_torch is installed or not.

    So code written for it runs unchanged, transformers' `TrainingArguments(optim="galore_adamw", ...)` too, on a CPU as well;
    `importlib.util.find_spec("galore_torch")` finds it. Call it before the first `import galore_torch`; twice does no harm.

    Raises ValueError if the real galore_torch has been imported: whoever did would go on with it.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if (real := sys.modules.get("galore_torch")) is not None:
        raise ValueError(
            f"galore_torch is imported already, from {real.__file__}: call subspan.compat.install() before whatever imports it"
        )
    sys.meta_path.insert(0, _Finder())
    utils: Any = sys.modules.get("transformers.utils.import_utils")
    if utils is not None:  # transformers keeps the answer to whether galore_torch is there
        utils.is_galore_torch_available.cache_clear()
