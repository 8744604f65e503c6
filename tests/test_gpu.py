"""On a GPU: what the CPU does, without waiting for the host, in memory that can be counted. Skipped where there is none."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config
from torch import Tensor, nn

import subspan
from subspan.optim import quant
from subspan.optim.presets import FULL_GRADIENT, PRESETS
from subspan.training.config import OptimConfig
from subspan.training.optimizers import make_optimizer
from subspan.training.trainer import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
MODES = [
    (preset, gradients)
    for preset in PRESETS
    for gradients in ("hold", "project", "update")
    if not (gradients == "project" and preset in FULL_GRADIENT)
]
MIB = 2**20
DEVICE = "cuda"


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Anything that makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Blocks to project, wide, tall and square, and a head; large enough for codes."""
    torch.manual_seed(0)
    blocks = nn.ModuleList([nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 64)])
    return nn.ModuleDict({"blocks": blocks, "head": nn.Linear(64, 72)}).to(dtype)


def forward(model: Any, x: Tensor) -> Tensor:
    for block in model["blocks"]:
        x = torch.tanh(block(x))
    loss: Tensor = model["head"](x).square().mean()
    return loss


def optimizer_of(model: nn.Module, preset: str, gradients: str, **options: Any) -> Any:
    clip = None if gradients == "update" else 0.5
    # An SVD's signs are the library's choice, so moments that are kept part at its refresh: it has none here.
    gap = {} if preset == "ldadam" else {"update_proj_gap": 10 if preset == "paper" else 4}
    config = OptimConfig(preset=preset, gradients=gradients, rank=8, lr=0.003, max_grad_norm=clip, **gap, **options)  # type: ignore[arg-type]
    return make_optimizer(model, config, seed=0, stagger=1)


def batches(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 32, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    forward(model, x).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("preset", "gradients"), MODES)
def test_steps_are_those_of_the_cpu(preset: str, gradients: str) -> None:
    """In fp64, so that no rounding turns a basis, an order or a sign; moments in codes may fall on either side of an edge."""
    there = {}
    for device in ("cpu", DEVICE):
        model = net(torch.float64).to(device)
        optimizer = optimizer_of(model, preset, gradients)
        for x in batches(6, torch.float64).to(device):
            step(model, optimizer, x)
        there[device] = {name: p.detach().cpu() for name, p in model.named_parameters()}
    start = dict(net(torch.float64).named_parameters())
    for name, p in there["cpu"].items():
        moved, apart = (p - start[name]).norm(), (there[DEVICE][name] - p).norm()
        assert moved > 0
        assert apart < 0.02 * moved, f"{name}: {apart / moved:.2g} of the way"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("preset", "gradients"), MODES)
def test_no_step_waits_for_the_gpu(preset: str, gradients: str, dtype: torch.dtype) -> None:
    """Backward pass, clipping and step; a refresh looks at the gradient, LDAdam's after the first does not."""
    model = net(dtype).to(DEVICE)
    optimizer = optimizer_of(model, preset, gradients)
    x = batches(1, dtype)[0].to(DEVICE)
    for _ in range(5):  # the first refresh, and that of the fifth step
        step(model, optimizer, x)
    with no_sync() if gradients == "update" or preset != "ldadam" else contextlib.nullcontext():
        step(model, optimizer, x)
    if preset == "ldadam" and gradients == "hold":
        forward(model, x).backward()
        optimizer.max_grad_norm = None  # of which prepare() looks at the gradients
        with no_sync():
            optimizer.step()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_those_of_the_cpu(bits: Any, signed: bool) -> None:
    X = torch.randn(96, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 96)[:, None]
    X = X if signed else X.square()
    codes, scale = quant.quantize(X, bits, signed, 128)
    codes_there, scale_there = quant.quantize(X.to(DEVICE), bits, signed, 128)
    assert torch.equal(scale_there.cpu(), scale)
    assert (codes_there.cpu() != codes).float().mean() < 1e-4  # on an edge, to within the last bit of a quotient
    there = quant.dequantize(codes.to(DEVICE), scale.to(DEVICE), bits, signed, 128)
    assert torch.equal(there.cpu(), quant.dequantize(codes, scale, bits, signed, 128))


def test_state_goes_from_gpu_to_cpu_and_back() -> None:
    model = net().to(DEVICE)
    optimizer = optimizer_of(model, "galore8bit", "hold")
    xs = batches(8)
    for x in xs[:5].to(DEVICE):
        step(model, optimizer, x)
    here = net()
    here.load_state_dict(model.state_dict())
    other = optimizer_of(here, "galore8bit", "hold")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(here.parameters(), model.parameters(), strict=True):
        for key, value in other.state[p].items():
            assert value.device.type == "cpu", key
            assert torch.equal(value, optimizer.state[q][key].cpu()), key
    back = net().to(DEVICE)
    back.load_state_dict(here.state_dict())
    again = optimizer_of(back, "galore8bit", "hold")
    again.load_state_dict(other.state_dict())
    for x in xs[5:].to(DEVICE):
        step(model, optimizer, x)
        step(back, again, x)
    for p, q in zip(model.parameters(), back.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("preset", ["galore", "galore8bit", "galore_lion"])
def test_compiled_rules(preset: str) -> None:
    ends = []
    for compiled in (False, None, True):
        model = net().to(DEVICE)
        optimizer = optimizer_of(model, preset, "hold", compile=compiled)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*taken eagerly")
            for x in batches(6).to(DEVICE):
                step(model, optimizer, x)
        ends.append([p.detach() for p in model.parameters()])
    start = list(net().parameters())
    for eager, usual, fused, first in zip(*ends, start, strict=True):
        assert (eager - fused).norm() < 0.02 * (eager.cpu() - first).norm()
        assert torch.equal(usual, fused if preset == "galore8bit" else eager)


def peak_of(work: Any) -> int:
    """Bytes that `work` takes beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(("preset", "most"), [("galore", 1.3), ("galore8bit", 1.3), ("qgalore", 1.3)])
def test_a_step_takes_no_temporary_of_the_size_of_a_weight(preset: str, most: float) -> None:
    """most: fp32 matrices of R's shape."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4096, 8192, bias=False, dtype=torch.bfloat16)])}).to(
        DEVICE
    )
    [p] = model.parameters()
    config = OptimConfig(preset=preset, rank=512, lr=0.001, update_proj_gap=100)  # type: ignore[arg-type]
    optimizer = make_optimizer(model, config, seed=0, stagger=1)
    p.grad = torch.randn_like(p)
    optimizer.step()
    low_rank = 4 * 512 * 8192
    assert peak_of(optimizer.step) < most * low_rank + 24 * MIB  # blocks; the weight itself has 64 MiB


def test_gradients_of_update_do_not_live_together() -> None:
    """16 matrices of 8 MiB: a backward pass holds one or two gradients at a time, not all."""
    torch.manual_seed(0)
    layers = [nn.Linear(1448, 1448, bias=False) for _ in range(16)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(layers)}).to(DEVICE)
    optimizer = make_optimizer(model, OptimConfig(preset="galore8bit", gradients="update", rank=64), seed=0)
    x = torch.randn(8, 1448, device=DEVICE)

    def pass_() -> None:
        y = x
        for layer in model["blocks"]:  # type: ignore[union-attr]
            y = layer(y)
        y.square().mean().backward()

    pass_()
    optimizer.step()
    assert peak_of(pass_) < 5 * 8 * MIB


@pytest.mark.parametrize("gradients", ["hold", "project", "update"])
def test_trainer(tmp_path: Path, gradients: str) -> None:
    """A run, and the same one stopped halfway and resumed."""
    optim = {"preset": "galore8bit", "gradients": gradients}
    config = tiny_config(
        tmp_path, optim=optim, run={"device": DEVICE, "checkpoint_every": 10, "diagnostics": gradients != "update"}
    )
    whole = train(config)
    assert whole["device"] == torch.cuda.get_device_name()
    assert whole["valid_loss"] < whole["first_loss"] - 1
    assert whole["peak_memory_bytes"] > 0
    for left in ("summary.json", "checkpoints/step_00000020"):
        path = tmp_path / "run" / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = train(dataclasses.replace(config, resume="auto"))
    assert resumed["valid_loss"] == pytest.approx(whole["valid_loss"], rel=1e-3)


def test_trainer_in_bf16_compiled_with_clipping(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        model={"dtype": "bfloat16", "compile": True, "activation_checkpointing": True},
        optim={"preset": "qgalore", "gradients": "project", "max_grad_norm": 1.0},
        run={"device": DEVICE, "batch_size": 8, "micro_batch": 4, "profile": 2},
    )
    result = train(config)
    assert result["valid_loss"] < result["first_loss"] - 0.5
    assert not result["skipped_steps"]


def test_nan_leaves_everything_alone() -> None:
    model = net().to(DEVICE)
    optimizer = optimizer_of(model, "galore8bit", "hold")
    x = batches(1)[0].to(DEVICE)
    step(model, optimizer, x)
    before = [p.detach().clone() for p in model.parameters()]
    forward(model, x).backward()
    with torch.no_grad():
        next(model.parameters()).grad[0, 0] = float("nan")  # type: ignore[index]
    optimizer.max_grad_norm = 1.0
    with no_sync():
        optimizer.step()
    for p, q in zip(model.parameters(), before, strict=True):
        assert (p - q).abs().max() < 0.1  # False of nan


def test_bases_of_hard_gradients() -> None:
    """Zero but for a column, of low rank, and more rank asked for than there is: orthonormal and finite."""
    torch.manual_seed(0)
    for G in (torch.zeros(512, 700).index_fill_(1, torch.tensor([3]), 1.0), torch.randn(512, 4) @ torch.randn(4, 700)):
        for projector in (subspan.SubspaceIteration(), subspan.RandomizedSVD(), subspan.SVD()):
            Q = projector.basis(G.to(DEVICE), "left", 128, None, 0)
            off = (Q.mT @ Q - torch.eye(128, device=DEVICE)).abs().max()
            assert off < 1e-5, projector  # False of nan
