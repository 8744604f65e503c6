"""Bytes are counted from the tensors, and agree with the paper's formula."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import subspan
from subspan.memory import available_memory, count_memory, peak_memory


def blocks(*shapes, device="cpu", dtype=torch.float32):
    """A model of numbered blocks, each one linear layer without bias, (m, n) its weight."""
    return nn.ModuleList([nn.Linear(n, m, bias=False, device=device, dtype=dtype) for m, n in shapes])


def test_galore_state_is_m_r_plus_2_n_r():
    """Table 1 of arXiv 2403.03507: m <= n, basis m r, moments 2 n r."""
    model = nn.Module()
    model.layers = blocks((16, 40), (40, 16), (24, 24))
    optimizer = subspan.GaLoreAdamW(subspan.param_groups(model, rank=8, verbose=False))
    table = count_memory(model, optimizer)
    weights = 16 * 40 * 2 + 24 * 24
    counters = 3 * 4 * 4  # of each parameter: step, refreshes, last_refresh, stretch
    assert table.weights == table.gradients == 4 * weights
    assert table.basis == 4 * 8 * (16 + 16 + 24)
    assert table.moments == 4 * 2 * 8 * (40 + 40 + 24) + counters
    assert table.adam_full_rank == 8 * weights
    assert table.optimizer == table.basis + table.moments
    assert dict(table.rows())["total"] == 2 * table.weights + table.optimizer


def test_a_large_model_is_counted_on_the_meta_device():
    """4096 x 11008 at r=1024: 4.2 M of basis and 22.5 M of moments, nothing allocated."""
    model = nn.Module()
    model.layers = blocks((4096, 11008), device="meta", dtype=torch.bfloat16)
    groups = subspan.param_groups(model, rank=1024, verbose=False)
    table = count_memory(model, subspan.GaLoreAdamW(groups))
    assert table.weights == 2 * 4096 * 11008
    assert table.basis == 2 * 4096 * 1024
    assert table.moments == 4 * 2 * 1024 * 11008 + 16


def test_frozen_weights_have_no_gradient():
    model = nn.Module()
    model.layers = blocks((16, 40), (40, 16))
    model.layers[0].requires_grad_(False)
    table = count_memory(model, subspan.GaLoreAdamW(subspan.param_groups(model, rank=8, verbose=False)))
    assert table.gradients == table.weights // 2


def test_the_table_names_its_columns():
    model = nn.Module()
    model.layers = blocks((1024, 1024))
    text = str(count_memory(model, subspan.GaLoreAdamW(subspan.param_groups(model, rank=256, verbose=False))))
    assert "weights                 0.0039 GiB" in text
    assert "optimizer: basis        0.0010 GiB" in text
    assert "38% of full-rank Adam's in fp32 (0.0078 GiB)" in text  # (256 + 2 x 256) / (2 x 1024)


def test_peak_memory_grows_with_an_allocation():
    """In a process of its own: in this one an earlier test may have had a higher peak."""
    code = (
        "import torch; from subspan.memory import peak_memory; before = peak_memory(); "
        "block = torch.ones(64 * 2**20); print(peak_memory() - before)"
    )
    grown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert 200 * 2**20 < int(grown) < 300 * 2**20  # of 256 MiB


def test_an_accelerator_without_a_peak_says_what_it_has_given_out(monkeypatch):
    """Apple's: `torch.mps` has no max_memory_allocated."""
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(driver_allocated_memory=lambda: 7))
    assert peak_memory("mps") == 7


def system(root: Path, files: dict[str, str]) -> Path:
    """A folder like / with these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_available_memory_is_the_least_of_three_limits(tmp_path, monkeypatch):
    assert available_memory(tmp_path) is None
    root = system(tmp_path, {"proc/meminfo": "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:   5000 kB\n"})
    assert available_memory(root) == 5000 * 1024

    group = "sys/fs/cgroup/jobs"
    system(root, {"proc/self/cgroup": "4:memory:/old\n0::/jobs/mine\n", f"{group}/mine/memory.max": "max\n"})
    assert available_memory(root) == 5000 * 1024
    system(
        root,
        {f"{group}/mine/memory.current": "10\n", f"{group}/memory.max": "900000", f"{group}/memory.current": "500000"},
    )
    assert available_memory(root) == 400_000
    system(root, {f"{group}/memory.stat": "anon 400000\ninactive_file 100000\n"})  # file cache gives way
    assert available_memory(root) == 500_000

    system(root, {"proc/self/statm": "2 1 1 1 0 1 0\n"})
    page = resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (6 * page, 6 * page))
    assert available_memory(root) == 4 * page
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (page, page))
    assert available_memory(root) == 0


def test_available_memory_of_this_machine():
    room = available_memory()
    if room is None:
        pytest.skip("the system does not tell")
    assert 0 < room < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
