"""The training loop and what a run leaves behind. `train` reads top to bottom."""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from subspan.diagnostics import Diagnostics
from subspan.extras import require
from subspan.memory import count_memory, peak_memory
from subspan.optim.dtensors import whole
from subspan.optim.groups import describe_groups
from subspan.optim.marks import mark
from subspan.optim.optimizer import ProjectedOptimizer
from subspan.optim.presets import FULL_RANK
from subspan.training.baselines import add_baseline, merge, restart_adapters, restart_factor, restarts
from subspan.training.checkpoint import Checkpointer, load
from subspan.training.config import RunConfig, TrainConfig, save_config
from subspan.training.data import StreamDataset, make_loader
from subspan.training.evaluation import Batch, EvalResult, check_documents_apart, evaluate, to_device, trained_tokens
from subspan.training.models import build_model, compile_blocks, model_config, save_pretrained
from subspan.training.optimizers import build_optimizer, groups_of
from subspan.training.processes import Processes, make_mesh, shard_model
from subspan.training.profile import SKIPPED, StepProfiler
from subspan.training.resume import (
    CHECKPOINTS,
    Interrupted,
    Progress,
    Stopped,
    StopSignal,
    check_text,
    find_start,
    keep_old_config,
    text_identity,
)
from subspan.training.runlog import RunLog, Silence, write_summary
from subspan.training.text import check_vocabulary, load_data, tokenizer_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OptimizerFactory = Callable[[nn.Module, TrainConfig], Optimizer]

MAX_SKIPPED = 10
"""Steps in a row that may be skipped for a loss or gradient that is not finite before the run stops."""


def train(config: TrainConfig, build_optimizer: OptimizerFactory = build_optimizer) -> dict[str, Any]:
    """Train as `config` says, fill the run folder `config.run.out`, and return what its summary.json holds.

    build_optimizer: what makes the optimizer. A benchmark gives its own and gets the same data, schedule and loop.

    Raises ValueError (one line) for anything in `config` that does not fit the text, the model, the machine or the checkpoint,
    before the run folder is touched; Stopped when Ctrl-C or SIGTERM asked for it, with everything saved;
    FloatingPointError when `MAX_SKIPPED` steps in a row are not finite.

    Of several processes (config.parallel) all train, and the first one writes and speaks.
    """
    processes = Processes(config.parallel)
    try:
        return _train(config, build_optimizer, processes)
    finally:
        processes.leave()


def _train(config: TrainConfig, build_optimizer: OptimizerFactory, processes: Processes) -> dict[str, Any]:
    run, say = config.run, processes.say
    out, checkpoint = processes.first_does(lambda: find_start(config))
    device = processes.device(find_device(run.device))
    if run.threads:
        torch.set_num_threads(run.threads)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(run.seed)

    model_config(config.model.name, config.model.overrides)  # a wrong name should not have to wait for the text
    if processes.count > 1:  # the others then find tokens and tokenizer in the cache
        processes.first_does(lambda: load_data(config.data, tokenizer_name(config)) and None)
    corpus = load_data(config.data, tokenizer_name(config), rank=processes.rank, world_size=processes.count)
    assert corpus.train is not None
    micro_batch = config.micro_batch
    accumulation = config.accumulation
    valid = corpus.valid_loader(micro_batch, run.eval_sequences)

    build = functools.partial(
        build_model,
        config.model.name,
        vocab_size=len(corpus.tokenizer),
        seq_len=config.data.seq_len,
        dtype=config.model.dtype,
        overrides=config.model.overrides,
        attn_implementation=config.model.attn_implementation,
        int8=config.int8_weights,
    )
    sharded, pretrained = config.parallel.shard > 1, config.model.pretrained
    model = build(device="meta") if sharded else build(device=device, pretrained=pretrained)
    add_baseline(model, config)
    model.train()
    check_vocabulary(model, corpus.tokenizer)
    if config.model.activation_checkpointing:
        newer = getattr(model, "activation_checkpointing_enable", None)  # the older name is deprecated
        (newer or model.gradient_checkpointing_enable)()
    if config.model.compile:
        compile_blocks(model)

    if sharded:
        shard_model(model, groups_of(model, config.optim), make_mesh(config.parallel, device.type))
        processes.fill(model, functools.partial(build, device="cpu", pretrained=pretrained), device)
    if config.data.keep_documents_apart:
        check_documents_apart(model, micro_batch, config.data.seq_len, device)
    optimizer = build_optimizer(model, config)
    copy = processes.copy(model, optimizer)  # averages gradients after a backward pass
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    gradients = getattr(optimizer, "gradients", "hold")
    if gradients != "hold" and getattr(model, "_compiled_call_impl", None):
        say(
            f"warning: a model compiled as a whole keeps every gradient alive in spite of {gradients=}: compile its blocks"
        )

    if isinstance(optimizer, ProjectedOptimizer):
        projected = [p for group in optimizer.param_groups if "rank" in group for p in group["params"]]
        if late := sum(optimizer.first_refresh(p) >= run.steps for p in projected):
            say(
                f"warning: {late} of {len(projected)} matrices keep their random first basis in a run of {run.steps} steps: "
                "lower optim.update_proj_gap, over which first refreshes are spread, or use optim.gradients=hold"
            )

    progress = Progress(text=text_identity(config, corpus.sha256, corpus.tokens))
    if checkpoint:
        saved = Progress(**load(checkpoint, model, optimizer, processes))
        check_text(checkpoint, saved.text, progress.text)
        if saved.step > run.steps:
            raise ValueError(f"run.steps={run.steps} is less than the {saved.step} steps of {checkpoint}: raise it")
        progress = saved
        optimizer.refresh_seconds = saved.refresh_seconds  # type: ignore[attr-defined]
    stream = corpus.train if isinstance(corpus.train, StreamDataset) else None
    if stream and progress.stream:
        stream.load_state_dict(progress.stream)
    profiled = bool(run.profile) and run.steps - progress.step >= run.profile + SKIPPED + 1
    if run.profile and not profiled and not checkpoint:  # what is resumed may be too near its end
        raise ValueError(
            f"run.profile={run.profile} needs {SKIPPED + 1} steps before the first that counts, and the run has "
            f"{run.steps}: raise run.steps or lower run.profile"
        )
    start, workers = 0 if stream else progress.samples, config.data.num_workers
    loader = make_loader(
        corpus.train,
        batch_size=micro_batch,
        seed=run.seed,
        start=start,
        rank=processes.rank,
        world_size=processes.count,
        num_workers=workers,
        pin_memory=device.type != "cpu",
    )
    batches = iter(loader)  # endless

    if run.profile and not profiled and progress.step < run.steps:
        say(f"warning: run.profile={run.profile}: too few steps are left for it, none is profiled")
    say(f"text   {corpus.description}")
    weights = config.model.dtype + (", attention and MLP in int8" if config.int8_weights else "")
    changed = "".join(f" {key}={value}" for key, value in config.model.overrides.items())
    say(f"model  {config.model.name}{changed}, {count_parameters(model):,} parameters, {weights}, {device}\n")
    say(f"{describe_groups(optimizer.param_groups)}\n")
    of = f" of each of {processes.count} processes" if processes.count > 1 else ""
    say(f"memory{of}, without activations\n{count_memory(model, optimizer)}\n", flush=True)

    if progress.step < run.steps and not (run.eval_every and progress.step % run.eval_every == 0):
        progress.evaluated = (
            progress.step
        )  # none comes again: that at the end of a run which is extended stays in the log
    before = {"start": progress.step, "evaluated": progress.evaluated}
    log = (RunLog if processes.first else Silence)(out, steps=run.steps, log_every=run.log_every, **before)
    checkpointer = Checkpointer(out / CHECKPOINTS, keep=run.keep_checkpoints, say=log.say, processes=processes)
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
        for line in keep_old_config(config, out, progress.step) if checkpoint else ():
            say(line)
        save_config(config, out / "config.yaml")  # before all else: it makes the folder one that --resume auto knows
        if progress.step < run.steps:
            (out / "summary.json").unlink(missing_ok=True)  # of a run that ended earlier
    watch = Diagnostics(optimizer, model) if run.diagnostics and isinstance(optimizer, ProjectedOptimizer) else None
    profiler = StepProfiler(out, run.profile, device, log.say) if profiled and processes.first else None
    with log, profiler or nullcontext(), StopSignal(log.say, processes.largest) as stop:

        def validate(step: int) -> EvalResult:
            dealt = processes.deal(stop.until_asked(valid))
            result = evaluate(model, dealt, autocast=run.autocast, total=processes.sum)
            log.evaluation(step, tokens=progress.tokens, valid_loss=result.loss, perplexity=result.perplexity)
            progress.evaluated = step
            return result

        def evaluation_due() -> bool:
            due = run.eval_every and progress.step % run.eval_every == 0 and progress.step < run.steps
            return bool(due and progress.evaluated < progress.step)

        def draw() -> tuple[list[Batch], list[int], int]:
            """The micro-batches of the next step, the tokens that each of them trains on, and their sum over all processes."""
            progress.stream = stream.state_dict() if stream else None
            drawn = [next(batches) for _ in range(accumulation)]
            counts = [trained_tokens(batch["labels"]) for batch in drawn]
            return drawn, counts, processes.total(sum(counts))

        def save() -> None:
            progress.peak = max(progress.peak, peak_memory(device))
            progress.refresh_seconds = getattr(optimizer, "refresh_seconds", None)
            log.sync()
            checkpointer.save(progress.step, model, optimizer, dataclasses.asdict(progress))

        def save_and_stop(signal_number: int) -> Stopped:
            save()
            checkpointer.wait()
            return Stopped(out, progress.step, run.steps, signal_number)

        if evaluation_due():  # it was cut short by a request to stop
            with suppress(Interrupted):
                validate(progress.step)
            if (asked := stop.asked()) is not None:
                raise save_and_stop(asked)
        upcoming = draw()
        for step in range(progress.step + 1, run.steps + 1):
            begin = time.perf_counter()
            with mark("step"):
                if restarts(step, config):
                    restart_adapters(model, optimizer, run.seed * 1_000_003 + step)
                for group, peak in zip(optimizer.param_groups, peak_lrs, strict=True):
                    group["lr"] = peak * lr_factor(step, run) * restart_factor(step, config)

                micro_batches, counts, tokens = upcoming
                loss = torch.zeros((), device=device)
                for i, (batch, count) in enumerate(zip(micro_batches, counts, strict=True)):
                    if not count and processes.count == 1:
                        continue  # the mean over no tokens is not a number
                    with copy.sync(last=i + 1 == accumulation):
                        with mark("forward"), torch.autocast(device.type, torch.bfloat16, enabled=run.autocast):
                            output = copy.model(**to_device(batch, device), use_cache=False)
                            mean = output.loss if count else 0 * output.logits.sum()
                        part = mean * (count / max(tokens, 1))  # the parts add up to the mean over the step's tokens
                        loss += part.detach()
                        if gradients == "update" and not processes.sum(loss.clone()).isfinite():
                            break  # the backward pass would change weights: here alone the loss is looked at before it
                        with mark("backward"):
                            (part * processes.count).backward()  # of which the average is the sum of the parts
                loss = processes.sum(loss)

                # Before the sync: while an accelerator works on this step, the next one is made ready.
                with mark("data"):
                    upcoming = draw()
                if watch:
                    watch.before()
                # The only host sync of a step, refreshes aside.
                norm = optimizer.prepare(loss) if hasattr(optimizer, "prepare") else gradient_norm(parameters)
                loss_value, norm_value = torch.stack([loss, norm.to(device)]).tolist()
                finite = math.isfinite(loss_value) and math.isfinite(norm_value)
                if finite:
                    _clip(optimizer, parameters, norm_value, config.optim.max_grad_norm)
                    optimizer.step()
                rows = watch.after() if watch else []
                optimizer.zero_grad()
                if config.parallel.check_every and step % config.parallel.check_every == 0:
                    processes.check_copies(model, optimizer)

            duration = time.perf_counter() - begin
            progress.step = step
            progress.seconds += duration  # of training: evaluation is not counted
            progress.tokens += tokens if finite else 0
            progress.skipped += not finite
            progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
            progress.first_loss = loss_value if progress.first_loss is None else progress.first_loss
            progress.samples += run.batch_size
            log.step(
                step,
                tokens=progress.tokens,
                loss=loss_value,
                lr=optimizer.param_groups[0]["lr"],
                grad_norm=norm_value,
                tokens_per_second=tokens / duration,
                peak_memory_bytes=peak_memory(device),
                seconds=progress.seconds,
                skipped=progress.skipped,
            )
            if rows:
                log.refreshes(step, rows)
            if profiler:
                profiler.step()
            if not finite:
                partly = gradients == "update" and math.isfinite(loss_value)
                what = (
                    "parameters whose gradient is not finite were not updated"
                    if partly
                    else "skipped, nothing was updated"
                )
                log.say(f"step {step}: loss {loss_value:g}, gradient norm {norm_value:g}: {what}")
            if progress.skipped_in_a_row == MAX_SKIPPED:
                raise FloatingPointError(
                    f"loss or gradient was not finite for {MAX_SKIPPED} steps in a row, up to step {step}: "
                    "lower --optim.lr, set --optim.max_grad_norm 1.0, or use --model.dtype float32"
                )
            if step == 1 and config.optim.preset not in FULL_RANK and tokens < config.optim.rank:
                log.say(
                    f"warning: a step trains on {tokens} tokens, fewer than optim.rank={config.optim.rank}: its gradient "
                    "cannot fill the subspace, raise --run.batch_size or lower --optim.rank"
                )
            if evaluation_due():
                with suppress(Interrupted):
                    validate(step)
            if (asked := stop.asked()) is not None:
                raise save_and_stop(asked)
            if run.checkpoint_every and (step % run.checkpoint_every == 0 or step == run.steps):
                save()
        try:
            result = validate(run.steps)
        except Interrupted:
            raise save_and_stop(stop.asked() or 0) from None
        try:
            checkpointer.wait()
        except OSError as error:
            log.say(str(error))  # the result is still to be written, so this is no reason to end

    summary = {
        "valid_loss": result.loss,
        "perplexity": result.perplexity,
        "valid_tokens": result.tokens,
        "first_loss": progress.first_loss,
        "steps": run.steps,
        "skipped_steps": progress.skipped,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "tokens_per_second": progress.tokens / progress.seconds,
        "refresh_seconds": getattr(optimizer, "refresh_seconds", None),
        "parameters": count_parameters(model),
        "bytes": dataclasses.asdict(count_memory(model, optimizer)),
        "peak_memory_bytes": max(progress.peak, peak_memory(device)),
        "device": describe_device(device),
        "corpus": {"sha256": corpus.sha256, "description": corpus.description},
        "versions": versions(),
        "config": dataclasses.asdict(config),
    }
    if processes.first:
        write_summary(out / "summary.json", summary)
    if run.export:
        try:
            _export(model, corpus.tokenizer, out / "model", processes, pretrained)
        except (OSError, require("safetensors", "train").SafetensorError) as error:  # a full disk, most of the time
            raise OSError(
                f"the trained model could not be written to {out / 'model'} ({error}): make room, then the same "
                "command with --resume auto writes it from the last checkpoint"
            ) from error
    return summary


# -------------------------------------------------------------------------------------------- schedule and small parts


def lr_factor(step: int, run: RunConfig) -> float:
    """Share of the peak lr at `step`, 1 to run.steps: linear to 1 at warmup_steps, then cosine to min_lr_ratio at the last."""
    return warm_up_and_decay(step, run.steps, run.warmup_steps, run.min_lr_ratio)


def warm_up_and_decay(step: int, steps: int, warmup_steps: int, min_lr_ratio: float, *, linear: bool = False) -> float:
    """The same by parts; linear: a straight line instead of the cosine."""
    if step <= warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    share = 1 - progress if linear else (1 + math.cos(math.pi * progress)) / 2
    return min_lr_ratio + (1 - min_lr_ratio) * share


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, 0-d fp32."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms or [torch.zeros((), device=parameters[0].device)]))
    return total


def find_device(name: str) -> torch.device:
    """The device `name`; auto is cuda where there is one, else cpu. ValueError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"run.device={name!r} cannot be used ({reason}): use auto or cpu") from None


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _clip(optimizer: Optimizer, parameters: Sequence[Tensor], norm: float, max_norm: float | None) -> None:
    """Clip for optimizers that do not clip themselves, as ours do."""
    if max_norm and not hasattr(optimizer, "max_grad_norm") and norm > max_norm:
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(max_norm / (norm + 1e-6))


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, processes: Processes, pretrained: bool
) -> None:
    """Write what AutoModelForCausalLM and AutoTokenizer load, safetensors; generation then ends where the text did."""
    merge(model)
    state: dict[str, Tensor] | None = None
    if processes.parallel.shard > 1:
        state = {}
        for name, X in model.state_dict().items():
            full = whole(X)  # of all processes; one at a time, since the model may not fit on one device
            if processes.first:
                state[name] = full.cpu()
            del full
    if not processes.first:
        return
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not pretrained or not ends:  # a configuration's own are pieces of another tokenizer
        for config in (model.config, model.generation_config):
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    elif tokenizer.eos_token_id not in ends:
        model.generation_config.eos_token_id = [*ends, tokenizer.eos_token_id]
    save_pretrained(model, folder, state)
    tokenizer.save_pretrained(folder)


def versions() -> dict[str, str]:
    """Of Python, torch and transformers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": require("transformers", "train").__version__,
    }
