"""galore_torch's classes and parameter-group keys, unchanged, on Subspan's optimizer.

    from subspan.compat import GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor       # instead of: from galore_torch import ...

These follow the reference's conventions: exact SVD at every `update_proj_gap` steps from the current gradient, eps before the
bias correction (1e-6), weight decay after the update, state and basis in the parameter's dtype, square matrices on the
right. They do not follow its defects: state is plain tensors that resume, `reverse_std` works on every shape, wrong values
are errors, a gradient with nan kills neither the run nor a basis, a closure may call backward.
`subspan.GaLoreAdamW` follows torch.optim.AdamW instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from subspan.optim.optimizer import ProjectedOptimizer
from subspan.optim.projectors import SVD
from subspan.optim.rules import Adafactor, Adam, Rule

REQUIRED_KEYS = ("rank", "update_proj_gap", "scale", "proj_type")


class _Compat(ProjectedOptimizer):
    """ProjectedOptimizer with the reference's conventions."""

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

    The signature's defaults are the reference's; relative_step, scale_parameter and warmup_init must be switched off (as
    transformers' Trainer does), beta1 left at None: otherwise ValueError.
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
        scale_parameter: bool = True,
        relative_step: bool = True,
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
            params, lr, Adafactor(eps[0], clip_threshold, decay_rate), weight_decay, decay_after_update=False
        )
