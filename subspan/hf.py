"""Subspan inside transformers.Trainer and its children (TRL's SFTTrainer), and inside Accelerate.

    args = TrainingArguments("runs/a", learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=100, max_grad_norm=1.0)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        optimizer_cls_and_kwargs=subspan.hf.optimizer(args, preset="galore", rank=256),
        callbacks=[subspan.hf.SubspanCallback()],
    )

The first of the two lines is enough: learning rate, schedule, accumulation, clipping, the logged norm, checkpoints and resume are
Trainer's own and right. The callback adds what Trainer does not tell: grouping, memory, what refreshes find.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from subspan.diagnostics import Diagnostics
from subspan.extras import require
from subspan.memory import MemoryTable, count_memory, peak_memory
from subspan.optim.groups import describe_groups
from subspan.optim.int8 import Int8Weight
from subspan.optim.optimizer import ProjectedOptimizer
from subspan.plan import MemoryPlan, planned_and_measured
from subspan.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from subspan.training.evaluation import EvalResult
from subspan.training.optimizers import make_optimizer
from subspan.training.runlog import json_ready, lines_until
from subspan.training.trainer import describe_device, versions

require("transformers", "hf")
require("accelerate", "hf")
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import parse_flag_from_env  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

Build = Callable[[nn.Module], ProjectedOptimizer]

FROM_ARGUMENTS = {"lr": "learning_rate", "weight_decay": "weight_decay", "max_grad_norm": "max_grad_norm"}
"""Settings of a recipe's `optim` that Trainer has its own names for."""

_CONFIGS: WeakKeyDictionary[ProjectedOptimizer, OptimConfig] = WeakKeyDictionary()


def optimizer(
    args: TrainingArguments, preset: str = "galore", **optim: Any
) -> tuple[Callable[[], Build], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, for every preset of `subspan train`.

    args: the same that Trainer gets. learning_rate (that of projected parameters, and of all without a `dense_lr`), weight_decay,
        max_grad_norm, seed, and Adam's betas and epsilon where they are not Trainer's defaults, are taken from it.
    optim: further fields of a recipe's `optim` (`OptimConfig`): rank, update_proj_gap, scale, dense_lr, targets, gradients,
        state_dtype, ... `gradients` is "project" by default, and "hold" where it must be: presets that need full gradients,
        fp16, DistributedDataParallel.

    Clipping: `max_grad_norm` is applied, and `grad_norm` logged, by the optimizer, which alone sees low-rank gradients
    (`clip_in_optimizer`).

    Raises ValueError for settings that do not go together, here and not at the first step.
    """
    _config(args, preset, optim)
    clip_in_optimizer()

    def build(model: nn.Module) -> ProjectedOptimizer:
        if any(isinstance(p, Int8Weight) for p in model.parameters()):
            raise ValueError(
                "model has INT8 weights, which Trainer cannot save: use `subspan train`, or leave out quantize_weights"
            )
        config = _config(args, preset, optim)  # of now: a search for hyperparameters changes `args`
        if config.gradients != "hold" and args.torch_compile:
            print(
                f"subspan: torch_compile=True compiles the model as a whole, which keeps every gradient alive in spite of "
                f"gradients={config.gradients!r}: to save their memory, compile the blocks, "
                "`for block in model.model.layers: block.compile()`"
            )
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        made = make_optimizer(model, config, args.seed, autocast=autocast)
        _CONFIGS[made] = config
        return made

    return (lambda: build), {}


def _config(args: TrainingArguments, preset: str, optim: dict[str, Any]) -> OptimConfig:
    for name, theirs in FROM_ARGUMENTS.items():
        if name in optim:
            raise ValueError(f"{name}={optim[name]!r}: Trainer has {theirs} for it, set it in TrainingArguments")
    for name, instead in (("optim_target_modules", "targets=[...]"), ("optim_args", "rank=..., update_proj_gap=...")):
        if getattr(args, name, None) is not None:
            raise ValueError(
                f"{name}={getattr(args, name)!r} is for Trainer's own GaLore: drop it and give {instead} to subspan.hf.optimizer"
            )
    for name in ("fsdp", "deepspeed"):
        launched = f"ACCELERATE_USE_{name.upper()}"  # by `accelerate launch`
        asked = getattr(args, name, None)
        told = f"{name}={asked!r}" if asked else f"{launched}={os.environ.get(launched)}"
        if asked or parse_flag_from_env(launched):
            raise ValueError(
                f"{told} takes parameters apart after the optimizer was made: use `subspan train --parallel.shard N`"
            )
    given = {"preset": preset, **optim}
    if (betas := (args.adam_beta1, args.adam_beta2)) != (0.9, 0.999):
        given.setdefault("betas", list(betas))
    if args.adam_epsilon != 1e-8:
        given.setdefault("eps", args.adam_epsilon)
    whole = args.fp16 or args.world_size > 1  # GradScaler and DistributedDataParallel want whole gradients
    if whole and given.setdefault("gradients", "hold") != "hold":
        raise ValueError(
            f"gradients={given['gradients']!r} leaves none for fp16's GradScaler or for DistributedDataParallel: "
            "use gradients='hold', and bf16 for fp16"
        )
    known = [f.name for f in fields(OptimConfig)]
    for name in optim.keys() - known:
        near = difflib.get_close_matches(name, known, 1)
        raise ValueError(
            f"{name}={optim[name]!r} is no field of OptimConfig: {f'{near[0]} is near' if near else ', '.join(known)}"
        )
    try:
        config = OptimConfig(lr=args.learning_rate, weight_decay=args.weight_decay, **given)
    except ValueError as error:
        raise ValueError(str(error).replace("optim.", "")) from None
    if config.gradients == "update":
        if args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradients='update' changes weights in every backward pass, and gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps} has several in a step: use gradients='project'"
            )
        if args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm} (1.0 is Trainer's default) needs the norm of all gradients, which "
                "gradients='update' never sees together: use TrainingArguments(max_grad_norm=0), or gradients='project'"
            )
    return config


@functools.cache
def clip_in_optimizer() -> None:
    """From now on `Accelerator.clip_grad_norm_` lets a ProjectedOptimizer that it has prepared clip its own gradients.

    torch's function, which it calls otherwise, sees only `p.grad`, and with gradients="project" those of dense parameters
    alone. The optimizer gets `max_norm` as its `max_grad_norm` and clips in `step()`; what is returned is `prepare()`'s norm,
    of (R of projected, G of dense parameters), before clipping. `clip_grad_value_`, which low-rank gradients have no meaning
    for, raises unless gradients="hold"; `free_memory`, with which Trainer begins, forgets what a training that was cut off has
    left. For an accelerator with other optimizers nothing changes. `optimizer(...)` calls this; a loop of your own with
    Accelerate does so before it clips.
    """
    original, by_value, free = Accelerator.clip_grad_norm_, Accelerator.clip_grad_value_, Accelerator.free_memory

    def own_of(accelerator: Accelerator) -> list[ProjectedOptimizer]:
        found = [projected(wrapped) for wrapped in accelerator._optimizers]
        return [own for own in found if own is not None and own.clips_alone]

    @functools.wraps(original)
    def clip_grad_norm_(
        self: Accelerator, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2
    ) -> Tensor | None:
        inner = own_of(self)
        if not inner:
            theirs: Tensor | None = original(self, parameters, max_norm, norm_type)
            return theirs
        if len(self._optimizers) > 1 or norm_type != 2:
            raise ValueError(
                f"norm_type={norm_type} of {len(self._optimizers)} optimizers: a ProjectedOptimizer clips by its own Euclidean "
                "norm alone, give it max_grad_norm=... and drop clip_grad_norm_"
            )
        (own,) = inner
        if not self.sync_gradients:  # its step() will be left out too
            return own.grad_norm
        self.unscale_gradients()
        clips = 0 < max_norm < math.inf
        if clips and own.gradients == "update":
            raise ValueError(
                f"max_norm={max_norm} needs the norm of all gradients, which gradients='update' never sees together: "
                "use gradients='project', or drop clip_grad_norm_"
            )
        own.max_grad_norm = max_norm if clips else None
        return own.prepare()

    @functools.wraps(by_value)
    def clip_grad_value_(self: Accelerator, parameters: Iterable[Tensor], clip_value: float) -> None:
        if taken := [own.gradients for own in own_of(self) if own.gradients != "hold"]:
            raise ValueError(
                f"clip_value={clip_value} cannot clip gradients that gradients={taken[0]!r} took during the backward pass: use "
                "clip_grad_norm_, or gradients='hold'"
            )
        by_value(self, parameters, clip_value)

    @functools.wraps(free)
    def free_memory(self: Accelerator, *objects: Any) -> Any:
        for own in own_of(self):
            own.zero_grad()
        return free(self, *objects)

    Accelerator.clip_grad_norm_ = clip_grad_norm_
    Accelerator.clip_grad_value_ = clip_grad_value_
    Accelerator.free_memory = free_memory


def projected(optimizer: Any) -> ProjectedOptimizer | None:
    """The ProjectedOptimizer that `optimizer` is, or that Accelerate has wrapped; None if there is none."""
    while not isinstance(optimizer, ProjectedOptimizer):
        if (optimizer := getattr(optimizer, "optimizer", None)) is None:
            return None
    return optimizer


class SubspanCallback(TrainerCallback):
    """Tells what Trainer does not: parameter groups and memory before the first step, planned and measured memory after the last;
    and leaves `metrics.jsonl`, `trainer.json` (settings) and `summary.json` in `output_dir`, so that `subspan report OUTPUT_DIR`
    draws the run.

    diagnostics: write what every refresh finds (`subspan.diagnostics`): captured energy, angles, stable ranks. Not with
        gradients="update", which leaves no gradient to read.
    """

    def __init__(self, diagnostics: bool = False) -> None:
        self.diagnostics = diagnostics
        self.tokens = 0
        self.seconds = 0.0  # of steps: evaluations and checkpoints are not counted, as in `subspan train`
        self.largest = (0, 0)  # micro-batch: sequences, tokens of each
        self.evaluated = ""  # the metric that is the validation loss
        self.undo = ExitStack()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        own = projected(optimizer)
        if own is None or model is None:
            raise ValueError(
                f"callbacks: SubspanCallback found {type(optimizer).__name__}, no optimizer of Subspan: "
                "give Trainer optimizer_cls_and_kwargs=subspan.hf.optimizer(args, ...)"
            )
        clip_in_optimizer()
        self.undo.close()  # of a training that has ended with an error
        own.zero_grad()  # its hooks are back, low-rank gradients of before are gone
        self.model, self.optimizer, self.first = model, own, state.is_world_process_zero
        self.processes = args.world_size
        self.memory: MemoryTable = count_memory(model, own)
        self.watch = Diagnostics(own, model) if self.diagnostics else None
        if self.watch:
            self.undo.callback(_before_prepare(own, self.watch.before))
        self.undo.callback(model.register_forward_pre_hook(self._saw, with_kwargs=True).remove)
        self.out = Path(str(args.output_dir))
        self.path = self.out / "metrics.jsonl"
        before = lines_until(self.path, state.global_step, state.global_step) if self.path.is_file() else []
        before = before if state.global_step else []  # of another run
        rows = [json.loads(line) for line in before]
        self.tokens = max((row.get("tokens", 0) for row in rows), default=0)
        self.seconds = max((row.get("seconds", 0.0) for row in rows), default=0.0)
        self.at_log = (self.tokens, self.seconds)
        if not self.first:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(before), encoding="utf-8")
        (self.out / "summary.json").unlink(missing_ok=True)  # this run has not finished
        config = _CONFIGS.get(own)  # none of an optimizer that Trainer was given ready
        settings = {"optim": config and asdict(config), "arguments": args.to_sanitized_dict()}
        (self.out / "trainer.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        peaks = [{**group, "lr": group.get("initial_lr", group["lr"])} for group in own.param_groups]  # before warm-up
        print(f"{describe_groups(peaks)}\n\nmemory, without activations\n{self.memory}\n", flush=True)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds += time.perf_counter() - self.begin

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        rows = self.watch.after() if self.watch else []
        if rows:
            self._write({"step": state.global_step + 1, "refreshes": rows})  # it is counted after this call

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        tokens, since = self.at_log
        self.at_log = (self.tokens, self.seconds)
        named = {"loss": "loss", "lr": "learning_rate", "grad_norm": "grad_norm"}
        self._write(
            {
                "step": state.global_step,
                **self._counted(),
                **{name: logs[theirs] for name, theirs in named.items() if theirs in logs},
                **(
                    {"tokens_per_second": (self.tokens - tokens) / (self.seconds - since)}
                    if self.seconds > since and self.tokens
                    else {}
                ),
                "peak_memory_bytes": peak_memory(args.device),
                "seconds": self.seconds,
            }
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        losses = {name: value for name, value in (metrics or {}).items() if name.endswith("_loss")}
        if losses and hasattr(self, "path"):  # not by evaluate() alone, before any training
            # Of several data sets the first, in one curve; metrics of the caller's own come before Trainer's.
            self.evaluated = self.evaluated or ("eval_loss" if "eval_loss" in losses else next(iter(losses)))
            if (loss := losses.get(self.evaluated)) is not None:
                perplexity = EvalResult(loss, tokens=0).perplexity
                self._write(
                    {"step": state.global_step, **self._counted(), "valid_loss": loss, "perplexity": perplexity}
                )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.undo.close()
        self.optimizer.release()  # the model may be trained on by another
        if not self.first:
            return
        peak, device = peak_memory(args.device), describe_device(args.device)
        plan, words = self._plan(args, peak, device)
        summary = {
            "steps": state.global_step,
            **self._counted(),
            "seconds": self.seconds,
            "refresh_seconds": self.optimizer.refresh_seconds,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "bytes": asdict(self.memory),
            "plan": plan and plan.as_dict(),
            "peak_memory_bytes": peak,
            "device": device,
            "versions": versions(),
        }
        (self.out / "summary.json").write_text(json.dumps(json_ready(summary), indent=2) + "\n", encoding="utf-8")
        print(f"memory  {words}", flush=True)

    def _counted(self) -> dict[str, int]:
        """Tokens, where any could be counted: not in a model that is compiled as a whole."""
        return {"tokens": self.tokens} if self.tokens else {}

    def _saw(self, model: nn.Module, positional: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Before a forward pass: its shape is counted, which costs no sync."""
        ids = inputs.get("input_ids", positional[0] if positional else None)
        # In a compiled model the count would be a new constant, and a new compilation, in every step.
        if torch.compiler.is_compiling() or not (model.training and isinstance(ids, Tensor) and ids.ndim == 2):
            return
        self.tokens += ids.numel() * self.processes
        self.largest = max(self.largest, (ids.shape[0], ids.shape[1]), key=math.prod)

    def _plan(self, args: TrainingArguments, peak: int, device: str) -> tuple[MemoryPlan | None, str]:
        """Planned memory beside measured, in words; of a causal language model, and after a step in this process."""
        measured = f"measured {peak / 2**30:.3f} GiB"
        optim = _CONFIGS.get(self.optimizer)
        if optim is None or not math.prod(self.largest):
            return None, measured
        with tempfile.TemporaryDirectory() as folder:
            try:
                config = self._config(args, optim, folder)
            except Exception as error:  # a model that the planner does not know: the training is over and good
                return None, f"{measured} (no plan: {' '.join(str(error).split()) or type(error).__name__})"
            plan, words = planned_and_measured(config, None, peak, device)
            parameters = sum(p.numel() for p in self.model.parameters())
            if plan and (plan.parameters, plan.optimizer) != (parameters, self.memory.optimizer):
                return (
                    None,
                    f"{measured} (no plan: of causal language models alone, all of whose parameters are trained)",
                )
            return plan, words

    def _config(self, args: TrainingArguments, optim: OptimConfig, folder: str) -> TrainConfig:
        """What `subspan train` would be told; `folder` gets the model's own configuration."""
        self.model.config.save_pretrained(folder)
        sequences, seq_len = self.largest
        flags = ("is_activation_checkpointing", "is_gradient_checkpointing")  # the older name is deprecated
        checkpointing = bool(next((getattr(self.model, flag) for flag in flags if hasattr(self.model, flag)), False))
        model = ModelConfig(
            name=folder,
            dtype=str(self.model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            attn_implementation="eager" if self.model.config._attn_implementation == "eager" else None,
            activation_checkpointing=checkpointing,
        )
        run = RunConfig(
            batch_size=sequences * args.gradient_accumulation_steps,
            micro_batch=sequences,
            autocast=bool(args.bf16) and self.model.dtype != torch.bfloat16,
        )
        return TrainConfig(model, DataConfig(seq_len=seq_len), optim, run)

    def _write(self, row: dict[str, Any]) -> None:
        if self.first:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(json_ready(row)) + "\n")


def _before_prepare(optimizer: ProjectedOptimizer, look: Callable[[], None]) -> Callable[[], None]:
    """Have `look` called before each `prepare()` of this optimizer, which refreshes bases: Trainer has no event there. Returns
    what ends that."""
    prepare = optimizer.prepare

    def looked(loss: Tensor | None = None) -> Tensor:
        look()
        return prepare(loss)

    optimizer.prepare = looked  # type: ignore[method-assign]
    return lambda: delattr(optimizer, "prepare")
