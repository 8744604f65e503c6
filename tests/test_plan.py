"""Planned memory is measured memory: by allocator events of torch.profiler, never by the planner's own instrument."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run, tiny_words
from tiny import SIZES, tiny_config, write_tokenizer
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import GPT2Config

from subspan import options, simulation
from subspan.budget import Space, parse_size, search
from subspan.live import LiveBytes, workspace
from subspan.memory import peak_memory
from subspan.optim.int8 import Int8Weight
from subspan.optim.presets import FULL_RANK, PRESETS
from subspan.optim.quant import quantize
from subspan.plan import Planner, plan_memory, planned_and_measured, with_preset
from subspan.report.figures import compare_methods
from subspan.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from subspan.training.models import build_model
from subspan.training.optimizers import build_optimizer

SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 2}
STEPS = 3


def make_config(
    dtype: str = "float32",
    *,
    micro_batch: int = 2,
    accumulation: int = 1,
    checkpointing: bool = False,
    autocast: bool = False,
    overrides: Any = None,
    **optim: Any,
) -> TrainConfig:
    """A small LLaMA whose moments are large enough for few bits; T = 3, so that 3 steps see every refresh."""
    overrides = {**SHAPE, "vocab_size": 600, **(overrides or {})}
    return TrainConfig(
        ModelConfig(dtype=dtype, overrides=overrides, activation_checkpointing=checkpointing),  # type: ignore[arg-type]
        DataConfig(seq_len=64),
        OptimConfig(**{"rank": 48, "update_proj_gap": STEPS, **optim}),
        RunConfig(batch_size=micro_batch * accumulation, micro_batch=micro_batch, autocast=autocast),
    )


def allocated(work: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What `work` returns, and the bytes of the allocator's events in order: positive when taken, negative when given back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, record_function("work"):
        result = work()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    return result, [size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")]


def highest(sizes: list[int]) -> int:
    now = most = 0
    for size in sizes:
        now += size
        most = max(most, now)
    return most


def real_model(config: TrainConfig) -> Any:
    model = build_model(
        "llama-9m", dtype=config.model.dtype, overrides=config.model.overrides, int8=config.int8_weights
    ).train()
    if config.model.activation_checkpointing:
        model.activation_checkpointing_enable()
    return model


# ------------------------------------------------------------------------------------------------- planned = measured


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_planned_optimizer_bytes_are_allocated_bytes(preset: str, dtype: str) -> None:
    check_optimizer_bytes(make_config(dtype, preset=preset))


@pytest.mark.parametrize(
    "optim",
    [
        *({"state_dtype": dtype} for dtype in ("float32", "bfloat16", "int8", "int4")),
        *({"basis_dtype": dtype} for dtype in ("float32", "bfloat16", "int4")),
        {"state_dtype": "int8", "dense_state_dtype": "int4"},
        {"state_dtype": "int8", "dense_rule": "adafactor"},
        {"preset": "qgalore", "proj_type": "reverse_std"},
        {"preset": "galore_lion", "state_dtype": "int4", "gradients": "update"},
        {"preset": "galore", "targets": ["layers.1.*proj", "embed"], "rank": 7},
    ],
    ids=str,
)
def test_planned_optimizer_bytes_are_allocated_bytes_for_every_dtype(optim: dict[str, Any]) -> None:
    check_optimizer_bytes(make_config("bfloat16", **optim))


def check_optimizer_bytes(config: TrainConfig) -> None:
    """And those of the weights, from the number that a plan starts from."""
    build_optimizer(real_model(config), config)  # tables that are made once a process
    model, weights = allocated(lambda: real_model(config))
    optimizer, state = allocated(lambda: build_optimizer(model, config))
    assert Planner().least(config) == sum(weights) + sum(state) - optimizer.grad_norm.nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "galore", "gradients": "hold"},
        {"preset": "galore", "gradients": "project"},
        {"preset": "galore8bit", "gradients": "update"},
        {"preset": "qgalore", "gradients": "update", "checkpointing": True},
        {"preset": "paper", "gradients": "project", "accumulation": 3},
        {"preset": "adamw8bit", "gradients": "hold", "accumulation": 2},
        {"preset": "fira", "gradients": "hold", "accumulation": 2},
        {"preset": "apollo_mini", "gradients": "update", "rank": 1},
        {"preset": "galore8bit", "gradients": "project", "moments": "transport"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_planned_peak_is_the_measured_peak(settings: dict[str, Any], dtype: str) -> None:
    """Of the trainer's loop over 3 steps, within 3 %: attention and LAPACK have blocks of work that are no part of a plan."""
    config = make_config(dtype, **settings)

    def work() -> None:
        model = real_model(config)
        optimizer: Any = build_optimizer(model, config)
        sequences = config.run.micro_batch or 1
        for _ in range(STEPS):
            for _ in range(config.run.batch_size // sequences):
                ids = torch.randint(600, (sequences, config.data.seq_len))
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.prepare()
            optimizer.step()
            optimizer.zero_grad()

    work()  # what is made once a process
    _, sizes = allocated(work)
    plan = plan_memory(config)
    assert plan.peak == pytest.approx(highest(sizes), rel=0.03)
    assert plan.weights + plan.optimizer == Planner().least(config)
    assert plan.peak == sum(size for _, size in plan.rows()[:-1])


def test_planned_peak_under_autocast() -> None:
    config = make_config(preset="galore", gradients="hold", autocast=True, micro_batch=8)

    def work() -> None:
        model = real_model(config)
        optimizer: Any = build_optimizer(model, config)
        ids = torch.randint(600, (8, config.data.seq_len))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.prepare()
        optimizer.step()

    work()
    _, sizes = allocated(work)
    assert plan_memory(config).peak == pytest.approx(highest(sizes), rel=0.03)


def test_attention_makes_no_mask() -> None:
    """As in a run: one for each block would be most of the activations of long sequences."""
    config = make_config(preset="adamw", micro_batch=2)
    config.data.seq_len = 512

    def work() -> None:
        model = real_model(config)
        ids = torch.randint(600, (2, config.data.seq_len))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    work()
    _, sizes = allocated(work)
    plan = plan_memory(config)
    assert plan.peak - plan.optimizer == pytest.approx(highest(sizes), rel=0.01)


MATRIX = torch.ones(300, 200, dtype=torch.bfloat16)
OPERATIONS: dict[str, Callable[[], Any]] = {
    "qr": lambda: torch.linalg.qr(torch.ones(300, 200)),
    "norm in a wider dtype": lambda: torch.linalg.vector_norm(MATRIX, dtype=torch.float32),
    "sum in a wider dtype": lambda: MATRIX.sum(0, dtype=torch.float32),
    "mixed dtypes": lambda: MATRIX + torch.ones(300, 200),
    "mixed dtypes in place": lambda: MATRIX.mul_(torch.ones(300, 200)),
    "mixed dtypes, broadcast": lambda: MATRIX.add(torch.ones(200)),
    "where": lambda: torch.where(MATRIX > 0, MATRIX, 0),
    "no mixture": lambda: MATRIX.add_(MATRIX),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_workspaces_are_what_the_kernels_take(name: str) -> None:
    work = OPERATIONS[name]
    _, sizes = allocated(work)
    with LiveBytes([MATRIX]) as live:
        work()
    # The plan holds a kernel's workspaces all at once, LAPACK's own of 32 columns among them.
    assert live.peak == pytest.approx(highest(sizes), rel=0.02, abs=30_000)


def test_svd_has_the_documented_workspace() -> None:
    """?gesdd's own work is no event of the allocator: 4 l^2 + 7 l floats and 8 l integers, beside a copy of the matrix."""
    G = torch.ones(30, 20)
    _, sizes = allocated(lambda: torch.linalg.svd(G, full_matrices=False))
    result = torch.ops.aten._linalg_svd.default(G)
    own = 4 * (4 * 20**2 + 7 * 20) + 4 * 8 * 20
    planned = workspace(torch.ops.aten._linalg_svd.default, (G,), {}, result)
    assert planned == own + G.nbytes
    assert highest(sizes) == pytest.approx(sum(X.nbytes for X in result) + G.nbytes, abs=200)


# ----------------------------------------------------------------------------------------------------- the short cuts


def test_many_sequences_follow_from_two_and_three() -> None:
    planner, config = Planner(), make_config("bfloat16", micro_batch=3)
    planner.plan(config)
    (key,) = planner._models
    settings = {"seq_len": 64, "checkpointing": False, "autocast": False, "position_ids": False}
    with planner.fake:
        two, three, seven = (
            simulation.watch_passes(planner._fake_model(key, config), sequences=n, **settings)  # type: ignore[arg-type]
            for n in (2, 3, 7)
        )
    assert two.scaled(three, 5) == seven
    assert two.scaled(simulation.replace(three, forward=1), 5) is None


def test_a_few_parts_take_as_much_as_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of several parts; INT8 weights, dense moments in codes."""
    wide = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 1, "vocab_size": 5000}
    configs = [
        make_config("bfloat16", overrides=wide, preset=preset, gradients=gradients, rank=400)
        for preset, gradients in (("qgalore", "update"), ("galore8bit", "hold"))
    ]
    short = [plan_memory(config) for config in configs]
    monkeypatch.setattr(simulation, "_few_parts", contextlib.nullcontext)
    for config, plan in zip(configs, short, strict=True):
        whole = plan_memory(config)
        assert (plan.weights, plan.optimizer, plan.peak_at) == (whole.weights, whole.optimizer, whole.peak_at)
        assert plan.peak == pytest.approx(whole.peak, abs=2000)  # the norms of the parts, 4 bytes each


def test_a_compiled_step_is_planned_as_an_eager_one() -> None:
    config, compiled = (make_config("bfloat16", preset="galore8bit", compile=flag) for flag in (False, True))
    assert build_optimizer(real_model(compiled), compiled).compile  # type: ignore[attr-defined]
    assert plan_memory(compiled) == plan_memory(config)


def test_refreshes_are_planned_as_they_are_staggered() -> None:
    """`project` keeps whole gradients of what is refreshed together: with a long T, of one matrix."""
    due = {}
    for mode in ("hold", "project", "update"):
        planner, config = Planner(), make_config(preset="galore", gradients=mode, update_proj_gap=100)
        planner.plan(config)
        (update,) = planner._updates.values()
        due[mode] = len(update.due)
    assert due == {"hold": 14, "project": 1, "update": 1}


def test_one_planner_plans_like_many() -> None:
    planner = Planner()
    configs = [
        make_config(
            preset=preset,
            gradients=gradients,
            accumulation=accumulation,
            checkpointing=checkpointing,
            overrides={"num_hidden_layers": 1},
        )
        for preset in ("galore", "qgalore")
        for gradients, accumulation in (("update", 1), ("project", 2))
        for checkpointing in (False, True)
    ]
    together = [planner.plan(config) for config in configs]
    assert together == [plan_memory(config) for config in configs]
    peaks = [plan.peak for plan in together]
    assert peaks[1] < peaks[0]
    assert peaks[4] < peaks[0]


# ------------------------------------------------------------------------------------------------ what can be planned


def test_a_large_model_takes_no_memory_and_leaves_nothing_behind() -> None:
    before = peak_memory()
    plan = plan_memory(
        TrainConfig(ModelConfig("llama-1b", dtype="bfloat16"), optim=OptimConfig(preset="galore8bit", rank=512))
    )
    assert plan.parameters == 1_339_082_752
    assert plan.weights > 2.4 * 2**30
    assert peak_memory() - before < 2**29
    codes, _ = quantize(torch.randn(4, 256), 8, True, 256)
    assert type(codes) is torch.Tensor
    assert len(list(Int8Weight.from_float(torch.zeros(4096, 4096)).blocks(0))) == 16


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "mixtral"])
def test_any_model_of_transformers_by_its_folder(kind: str, tmp_path: Path) -> None:
    """GPT-2: Conv1D layers, tied embeddings; Qwen 2: biases and grouped queries; Mixtral: experts stacked in one weight, whose
    products have a meta kernel in bf16 alone."""
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2},
        "qwen2": {**SIZES, "num_key_value_heads": 1},
        "mixtral": {**SIZES, "num_key_value_heads": 1, "num_local_experts": 4},
    }
    made = transformers.AutoConfig.for_model(kind, vocab_size=320, **small[kind])
    made.save_pretrained(tmp_path)
    config = make_config(preset="galore8bit", rank=16)
    config.model = ModelConfig(str(tmp_path))
    model = build_model(str(tmp_path))
    plan = plan_memory(config)
    assert plan.parameters == model.num_parameters()
    assert plan.weights == sum(X.nbytes for X in (*model.parameters(), *model.buffers()))
    _, sizes = allocated(lambda: build_optimizer(model, config))
    assert plan.optimizer == sum(sizes) - 4


def test_lora_trains_its_adapters_alone() -> None:
    pytest.importorskip("peft")
    planner, config = Planner(), make_config(preset="adamw", gradients="hold", rank=8)
    plan, full = planner.plan(config, lora=True), planner.plan(config)
    adapters = sum(8 * (m + n) for m, n in [(128, 128)] * 4 + [(352, 128)] * 3) * SHAPE["num_hidden_layers"]
    assert plan.parameters == full.parameters + adapters
    assert plan.moments == pytest.approx(8 * adapters, rel=0.01)  # and a counter each
    assert plan.peak < full.peak


def test_modes_differ_as_they_should() -> None:
    peaks = {}
    for mode in ("hold", "project", "update"):
        plan = plan_memory(make_config("bfloat16", preset="galore8bit", gradients=mode, update_proj_gap=200))
        peaks[mode] = plan.peak
        full = sum(p.numel() for p in real_model(make_config()).parameters()) * 2
        waiting = plan.phases["step"].gradients
        # Beside gradients wait their norms, 0-d; in `update` mode these alone.
        assert {"hold": waiting > full, "project": 4096 < waiting < full, "update": waiting < 4096}[mode]
    assert peaks["project"] < peaks["hold"]  # in so small a model the parts of an update are larger than gradients


# ------------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24G", 24 * 2**30),
        ("24", 24 * 2**30),
        ("24 GB", 24 * 10**9),
        ("1.5mib", 3 * 2**19),
        ("2TiB", 2**41),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "24 PB", "-3GiB", "0GiB", "1e3GiB", "0.0000001mb"])
def test_other_sizes_are_errors(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"budget={text!r}") + ".*24GiB"):
        parse_size(text)


def test_a_search_finds_what_fits_best_first() -> None:
    planner, config = Planner(), make_config("bfloat16", micro_batch=1, overrides={"num_hidden_layers": 1})
    space = Space(presets=("adamw", "galore8bit", "qgalore"), ranks=(64, 16), micro_batches=(4, 2, 1))
    everything = search(config, 2**40, space, planner)
    assert [(fit.config.optim.preset, fit.config.optim.rank) for fit in everything] == [
        ("adamw", 64),
        *((preset, rank) for preset in ("galore8bit", "qgalore") for rank in (64, 16)),
    ]
    for fit in everything:
        assert fit.config.run.micro_batch == 4
        assert not fit.config.model.activation_checkpointing
        assert (fit.config.optim.gradients, fit.config.optim.proj_type) == ("project", "std")
        assert fit.plan == plan_memory(fit.config)
    budget = min(fit.plan.peak for fit in everything) - 1
    for fit in search(config, budget, space, planner):
        assert fit.plan.peak <= budget
        run = fit.config.run
        larger = make_config("bfloat16", micro_batch=2 * run.batch_size)  # the next micro-batch would not have fitted
        larger.optim, larger.model = fit.config.optim, fit.config.model
        assert run.batch_size == 4 or planner.plan(larger).peak > budget


def test_a_search_leaves_out_what_a_run_cannot_have() -> None:
    """Clipping, which needs all gradients together, and adapters, which are not projected."""
    config = make_config("bfloat16", micro_batch=1, overrides={"num_hidden_layers": 1})
    config.optim.max_grad_norm = 1.0
    planner, space = Planner(), Space(presets=("adamw", "galore8bit"), ranks=(16,), micro_batches=(1,))
    found = search(config, 2**40, space, planner)
    assert {fit.config.optim.gradients for fit in found} == {"project"}
    with pytest.raises(ValueError, match="closest is"):
        search(config, 2**20, space, planner)
    config.optim, config.model.baseline = OptimConfig(preset="adamw", rank=16), "lora"
    assert [fit.config.model.baseline for fit in search(config, 2**40, space, planner)] == ["lora", None]
    assert len(compare_methods(config, planner)) == 6


def test_a_preset_drops_what_it_cannot_have() -> None:
    """A search for a budget tries presets that the user never named."""
    given = OptimConfig(betas=[0.9, 0.95], eps=1e-6, stochastic_rounding=False, align=True, adaptive_refresh=0.6)
    for preset in PRESETS:
        optim = with_preset(given, preset)
        assert optim.preset == preset
        assert with_preset(optim, "qgalore").stochastic_rounding is None
    assert with_preset(given, "subspan").align is False


def test_adapters_keep_their_rank_in_a_search() -> None:
    config = TrainConfig(
        model=ModelConfig(name="llama-2m", baseline="lora"),
        optim=OptimConfig(preset="adamw", rank=8),
        run=RunConfig(batch_size=1),
    )
    pytest.importorskip("peft")
    space = Space(presets=("adamw",), micro_batches=(1,), checkpointing=(False,))
    (fit,) = search(config, 2**30, space)
    assert fit.config.optim.rank == 8
    assert str(fit).startswith("lora, rank 8, adamw, gradients ")


def test_a_budget_that_nothing_fits_says_what_is_missing() -> None:
    with pytest.raises(
        ValueError, match=r"closest is .*micro-batch 1, activation checkpointing at [\d.]+ GiB, [\d.]+ GiB more"
    ):
        search(make_config("bfloat16"), 2**20, Space(ranks=(8,)))


def test_micro_batches_of_a_step_leave_update_out() -> None:
    config = make_config("bfloat16", accumulation=4, micro_batch=1, preset="galore8bit")
    space = Space(presets=("galore8bit",), ranks=(16,), micro_batches=(2, 1))
    (fit,) = search(config, 2**40, space)
    assert (fit.config.optim.gradients, fit.config.run.batch_size, fit.config.run.micro_batch) == ("project", 8, 2)


# ------------------------------------------------------------------------------------------------------- command line

SMALL = ["plan", "--model", "llama-9m", "--vocab-size", "500", "--seq-len", "32"]


def test_the_command_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL, "--preset", "galore8bit", "--rank", "32", "--micro-batch", "1") == 0
    shown = capsys.readouterr().out
    assert "llama-9m, 6,584,576 parameters, bfloat16, 1 x 32 tokens" in shown
    assert "galore8bit, rank 32 (std), gradients project" in shown
    for row in ("weights", "gradients", "optimizer: basis", "optimizer: moments", "activations", "temporaries", "peak"):
        assert re.search(rf"^  {row} +\d+\.\d+ GiB$", shown, re.MULTILINE)
    assert "cards of 8, 12, 16, 24, 32, 40, 48, 80 GB" in shown


def test_every_preset_is_planned_from_any_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: llama-2m}\noptim: {moments: transport, rank: 8}\nrun: {diagnostics: true}\n")
    parser, _ = options.parsers()
    for words, presets in (
        (["--model", "llama-2m"], PRESETS),
        (["--config", str(recipe)], ("fira", "adamw", "subspan")),
    ):
        arguments = parser.parse_args(["plan", *words]).plan
        moments = options.plan_config(arguments)[0].optim.moments
        for arguments.preset in presets:
            optim = options.plan_config(arguments)[0].optim
            of_bases = None if arguments.preset in FULL_RANK else moments
            assert optim == OptimConfig(arguments.preset, rank=optim.rank, moments=of_bases)  # nothing of another one's


def test_updates_in_the_backward_pass_are_planned_from_a_recipe_that_clips_and_accumulates(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {name: llama-2m}\noptim: {max_grad_norm: 1.0}\nrun: {batch_size: 8, micro_batch: 2, eval_every: 0}\n"
    )
    parser, _ = options.parsers()
    for words, (clip, batch, micro_batch) in (
        ([], (1.0, 8, 2)),
        (["--gradients", "hold"], (1.0, 8, 2)),
        (["--gradients", "update"], (None, 2, 2)),
        (["--gradients", "update", "--micro-batch", "4"], (None, 4, 4)),
    ):
        config, _ = options.plan_config(parser.parse_args(["plan", "--config", str(recipe), *words]).plan)
        assert (config.optim.max_grad_norm, config.run.batch_size, config.micro_batch) == (clip, batch, micro_batch)


def test_the_vocabulary_is_that_of_the_run(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "words", special=False)
    recipe, rows = tmp_path / "recipe.yaml", []
    parser, _ = options.parsers()
    for model, data, words in (
        ("", "vocab_size: 600", []),
        ("", f"tokenizer: {tmp_path / 'words'}", []),
        ("overrides: {vocab_size: 700}", "vocab_size: 600", []),
        ("overrides: {vocab_size: 700}", "vocab_size: 600", ["--vocab-size", "800"]),
        ("overrides: {vocab_size: 700}", f"tokenizer: {tmp_path / 'words'}", ["--vocab-size", "800"]),
    ):
        recipe.write_text(f"model:\n  name: llama-2m\n  {model}\ndata:\n  {data}\n")
        config, vocab_size = options.plan_config(parser.parse_args(["plan", "--config", str(recipe), *words]).plan)
        rows.append(config.model.overrides.get("vocab_size") or vocab_size)
    assert rows == [600, len(tokenizer), 700, 800, 800]
    config, vocab_size = options.plan_config(parser.parse_args(["plan", "--model", "llama-2m"]).plan)
    assert config.data.vocab_size == vocab_size == 32000  # so that the command of the page trains what was planned
    GPT2Config(vocab_size=600, n_layer=1, n_embd=16, n_head=2).save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"vocab_size=800: .* has its own"):
        options.plan_config(parser.parse_args(["plan", "--model", str(tmp_path / "own"), "--vocab-size", "800"]).plan)


def test_a_peak_on_a_gpu_is_one_of_tensors(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    words = [
        planned_and_measured(config, 300, 2**30, device)[1] for device in ("NVIDIA H100 80GB HBM3", "cpu, 2 threads")
    ]
    assert [text.endswith("Python and its libraries") for text in words] == [False, True]


def test_json_in_both_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for words in (
        ["--micro-batch", "2", "--activation-checkpointing=true"],
        ["--micro_batch=2", "--activation_checkpointing", "true"],
    ):
        assert run(*SMALL, *words, "--accumulation", "3", "--json") == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    plan = answers[0]
    assert (plan["micro_batch"], plan["accumulation"], plan["rank"]) == (2, 3, 64)
    assert plan["peak"] == sum(
        plan[c] for c in ("weights", "gradients", "basis", "moments", "activations", "temporaries")
    )
    assert plan["peak"] == max(phase["total"] for phase in plan["phases"].values())


@pytest.mark.parametrize(
    ("preset", "said"), [("adamw", "lr 0.003, dense_lr 0.03"), ("muon", "no rates of lora with muon")]
)
def test_adapters_are_advised_with_the_optimizer_that_was_measured(
    preset: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"model": {"name": "llama-2m", "baseline": "lora"}, "optim": {"preset": preset, "rank": 8}}
    (tmp_path / "lora.yaml").write_text(json.dumps(recipe))
    assert run("plan", "--config", str(tmp_path / "lora.yaml"), "--vocab-size", "300", "--seq-len", "8") == 0
    assert f"  start with            {said}" in capsys.readouterr().out


def test_a_budget_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--budget", "90MiB", "--preset", "galore8bit", "--rank", "32", "--micro-batch", "4"]
    assert run(*words) == 0
    *lines, start = capsys.readouterr().out.splitlines()[2:]
    assert start.startswith("  start with            lr ")
    assert ["galore8bit, rank 32 (std), gradients project, micro-batch 4 " in line for line in lines] == [True]
    assert run(*words, "--json") == 0
    fits = json.loads(capsys.readouterr().out)["fits"]
    assert len(fits) == len(lines)
    assert all(fit["peak"] <= 90 * 2**20 for fit in fits)


def test_a_recipe_is_planned_and_a_run_says_what_was_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_words(tmp_path)
    assert run("plan", *words[1:], "--rank", "4", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["rank"], plan["micro_batch"], plan["seq_len"]) == (4, 4, 32)
    assert plan["parameters"] == 2 * 300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert run(*words) == 0
    assert re.search(r"memory  planned 0\.\d+ GiB of tensors at most, in \w+; measured \d", capsys.readouterr().out)


def test_a_plan_leaves_4_bit_bases_as_they_are(tmp_path: Path) -> None:
    """In a process of its own: what quantizing keeps for later must not be made of the planner's fake tensors."""
    code = (
        "import torch; from tiny import tiny_config; from pathlib import Path; from subspan.plan import plan_memory; "
        "from subspan.optim.quant import init_basis, read_basis, write_basis; "
        f"plan_memory(tiny_config(Path({str(tmp_path)!r}), optim={{'preset': 'qgalore'}}), 300); "
        "state = init_basis((8, 4), 'cpu'); Q = torch.linalg.qr(torch.randn(8, 4)).Q; write_basis(state, Q); "
        "print(float((read_basis(state, 4, torch.float32) - Q).abs().max()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 0.2


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_figure_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("peft")
    path = tmp_path / f"memory.{ending}"
    words = tiny_words(tmp_path)
    assert run("plan", *words[1:], "--figure", str(path)) == 0
    assert path.stat().st_size > 5000
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["plan"], "--model"),
        ([*SMALL, "--nodes", "2", "--gpus-per-node", "3", "--shard", "4"], "shard=4 does not divide the 6"),
        ([*SMALL, "--nodes", "0", "--gpus-per-node", "2"], "nodes=0"),
        ([*SMALL, "--shard", "0"], "shard=0"),
        ([*SMALL, "--shard", "2", "--figure", "memory.png"], "figure="),
        ([*SMALL, "--shard", "2", "--preset", "qgalore"], "model.int8"),
        (["plan", "--model", "llama-9M"], "did you mean llama-9m"),
        (["plan", "--model", "no/such/model"], "no/such/model"),
        ([*SMALL, "--preset", "galor"], "preset='galor'"),
        ([*SMALL, "--rank", "0"], "rank=0"),
        ([*SMALL, "--rank", "many"], "--rank"),
        ([*SMALL, "--budget", "1MiB", "--preset", "galore8bit", "--rank", "8"], "closest is galore8bit, rank 8"),
        ([*SMALL, "--budget", "much"], "budget='much'"),
        ([*SMALL, "--figure", "memory.gif"], "memory.gif"),
        ([*SMALL, "--figure", "no/folder/memory.png"], "no/folder"),
        ([*SMALL, "--preset", "galore_adafactor", "--state-dtype", "int8"], "state_dtype=torch.int8"),
        ([*SMALL, "--gradients", "update", "--accumulation", "2"], "gradients=update"),
        (["plan", "--config", "no.yaml"], "no.yaml"),
    ],
)
def test_a_wrong_plan_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], named: str) -> None:
    assert run(*words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("subspan: error: ")
    assert shown.count("\n") == 1
    assert named in shown


@pytest.mark.parametrize("module", ["matplotlib", "peft"])
def test_a_missing_extra_is_one_line(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    monkeypatch.chdir(tmp_path)
    assert run(*SMALL, "--figure", "memory.svg") == 2
    shown = capsys.readouterr().err
    assert 'pip install "subspan[plan]"' in shown
    assert shown.count("\n") == 1
