"""`subspan.compat.install()`: code written for galore_torch, and transformers' own GaLore, unchanged. In processes of their own,
since what `import galore_torch` means is one thing in a process."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

NAMES = ("galore_adamw", "galore_adamw_8bit", "galore_adafactor")

PRELUDE = """
import importlib.util, json, sys, torch
import subspan.compat
"""

TRAINER = (
    PRELUDE
    + """
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import is_galore_torch_available

is_galore_torch_available()  # is kept
subspan.compat.install()

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(0, 8, (32, 16), generator=torch.manual_seed(0))]

def trained(**given):
    torch.manual_seed(0)
    settings = dict(learning_rate=0.02, lr_scheduler_type="constant", max_steps=4, per_device_train_batch_size=8)
    settings |= dict(logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, optim_target_modules=["attn", "mlp"])
    args = TrainingArguments(sys.argv[1], **{**settings, **given})
    trainer = Trainer(model=LlamaForCausalLM(LlamaConfig(**SIZES)), args=args, train_dataset=ROWS)
    trainer.train()
    return trainer

def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]

def ranks(trainer):
    return [[group.get("rank"), len(group["params"])] for group in trainer.optimizer.optimizer.param_groups]
"""
)


def result_of(script: str, *arguments: str) -> Any:
    """What a script prints as its last line."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_galore_torch_is_subspan_from_then_on() -> None:
    script = """
    before = importlib.util.find_spec("galore_torch")
    subspan.compat.install()
    subspan.compat.install()  # does no harm
    spec = importlib.util.find_spec("galore_torch")
    import galore_torch
    from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
    from galore_torch.adamw import AdamW
    from galore_torch.adamw8bit import AdamW8bit
    from galore_torch.adafactor import Adafactor
    p = torch.nn.Parameter(torch.ones(4, 6))
    group = {"params": [p], "rank": 2, "update_proj_gap": 10, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdamW([group], lr=0.1)
    p.square().sum().backward()
    optimizer.step()
    same = (GaLoreAdamW is AdamW, GaLoreAdamW8bit is AdamW8bit, GaLoreAdafactor is Adafactor)
    missing = importlib.util.find_spec("galore_torch.galore_projector")
    print(json.dumps([spec.origin, all(same), GaLoreAdamW.__module__, float(p.sum()) < 24, missing is None]))
    """
    origin, same, module, moved, missing = result_of(PRELUDE + textwrap.dedent(script))
    assert Path(origin).name == "compat.py"
    assert (same, module, moved, missing) == (True, "subspan.compat", True, True)


def test_a_galore_torch_that_is_in_use_is_refused() -> None:
    script = """
    import galore_torch
    try:
        subspan.compat.install()
    except ValueError as error:
        print(json.dumps(str(error)))
    """
    assert "call subspan.compat.install() before" in result_of(PRELUDE + textwrap.dedent(script))


def test_all_names_of_transformers_train(tmp_path: Path) -> None:
    """And the options reach the groups: those of optim_args, or transformers' own."""
    script = """
    names = [name + end for name in sys.argv[2:] for end in ("", "_layerwise")]
    options = dict(optim_args="rank=8, update_proj_gap=2, scale=0.5", max_grad_norm=0)  # layer by layer nothing is clipped
    found = {name: losses(trained(optim=name, **options)) for name in names}
    found["ranks"] = ranks(trained(optim="galore_adamw", optim_args="rank=8"))
    found["own ranks"] = ranks(trained(optim="galore_adamw"))
    print(json.dumps(found))
    """
    found = result_of(TRAINER + textwrap.dedent(script), str(tmp_path), *NAMES)
    assert found.pop("ranks") == [[None, 7], [8, 14]]
    assert found.pop("own ranks") == [[None, 7], [128, 14]]
    assert len(found) == 6
    for name in NAMES:
        first, last = found[name][0], found[name][-1]
        assert last < first - 0.1, name
        # The same steps, taken in the backward pass.
        assert found[f"{name}_layerwise"] == pytest.approx(found[name], rel=1e-5), name


def test_transformers_ways_of_naming_modules_and_its_learning_rates(tmp_path: Path) -> None:
    """What transformers' own tests of GaLore look at: lists, a regular expression, all-linear; a logged rate that is the real
    one with and without a schedule; evaluation between steps; that accumulation is refused layer by layer, and only there."""
    script = """
    every = dict(optim="galore_adamw", optim_args="rank=4")
    found = {}
    for name, targets in {
        "list": ["attn", "mlp"],
        "regular expression": r".*\\.(q_proj|down_proj)",
        "all-linear": "all-linear",
        "one kind": [r"model.layers.*.self_attn.q_proj"],
    }.items():
        found[name] = ranks(trained(**every, optim_target_modules=targets, max_steps=1))[1][1]
    rates = {}
    for schedule in ("constant", "cosine"):
        trainer = trained(**every, lr_scheduler_type=schedule, warmup_steps=2, max_steps=6)
        rates[schedule] = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    found["rates"] = rates
    found["accumulated"] = losses(trained(**every, gradient_accumulation_steps=2))
    try:
        trained(optim="galore_adamw_layerwise", gradient_accumulation_steps=2)
    except ValueError as error:
        found["refused"] = str(error)
    print(json.dumps(found))
    """
    found = result_of(TRAINER + textwrap.dedent(script), str(tmp_path))
    assert [found[name] for name in ("list", "regular expression", "all-linear", "one kind")] == [14, 4, 15, 2]
    assert found["rates"]["constant"] == [0.02] * 6
    cosine = found["rates"]["cosine"]
    assert cosine[:3] == pytest.approx([0.0, 0.01, 0.02])
    assert cosine[2:] == sorted(cosine[2:], reverse=True)
    assert found["accumulated"][-1] < found["accumulated"][0]
    assert "does not support gradient accumulation" in found["refused"]
