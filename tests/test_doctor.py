"""`subspan doctor` and `subspan --version`, and that both, as the library, need torch alone."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest

import subspan
from subspan import doctor
from subspan.cli import main

FOUND: dict[str, Any] = {
    "subspan": "0.1.0",
    "python": "3.11.7",
    "torch": "2.13.0",
    "system": "Linux x86_64",
    "cores": 8,
    "threads": 8,
    "devices": [
        {"device": "cpu", "name": "Some CPU", "free": 2**33, "total": 2**34, "float32": 4e11, "bfloat16": 8e11},
        {"device": "cuda:0", "name": "Some GPU", "free": None, "total": None, "float32": 2e13, "bfloat16": 9e14},
    ],
    "compiler": "/usr/bin/g++",
    "c_compiler": "/usr/bin/gcc",
    "triton": True,
    "backends": ["gloo", "nccl"],
    "extras": {"hf": {"transformers": "5.23.0"}, "train": {"transformers": "5.23.0", "rich": "15.0.0"}},
}
CPU, GPU = FOUND["devices"]


def test_a_machine_with_everything_needs_no_advice() -> None:
    assert doctor.advise(FOUND) == []
    shown = doctor.describe({**FOUND, "advice": []})
    assert "Some GPU, ? of ? GiB free, float32 20,000.0, bfloat16 900,000.0 GFLOP/s" in shown
    assert "8.0 of 16.0 GiB free" in shown
    assert "rich 15.0.0, transformers 5.23.0" in shown
    assert "all is there" in shown


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"devices": [{**CPU, "bfloat16": 4e10}, GPU]}, "products in bfloat16 take 10 times as long"),
        ({"devices": [CPU, {**GPU, "bfloat16": None}]}, "Some GPU has no bfloat16: train with --model.dtype float32"),
        ({"devices": [CPU, {**GPU, "float32": None, "bfloat16": None}]}, "Some GPU computes nothing now"),
        ({"devices": [CPU]}, "no accelerator"),
        ({"threads": 1}, "OMP_NUM_THREADS=8"),
        ({"compiler": None}, "install g\\+\\+, or name one in CXX"),
        ({"triton": False}, "no triton"),
        ({"c_compiler": None}, "no C compiler, which triton wants"),
        (
            {"extras": {"train": {"rich": None, "yaml": None, "numpy": "2"}}},
            'train: rich, yaml missing: pip install "subspan\\[train\\]"',
        ),
    ],
)
def test_what_will_be_slow_is_said_with_what_helps(change: dict[str, Any], advice: str) -> None:
    (line,) = doctor.advise({**FOUND, **change})
    assert re.search(advice, line)


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["float32"] > 0
    assert found["devices"][0]["total"] > found["devices"][0]["free"] > 0
    assert found["advice"] == doctor.advise(found)
    main(["doctor"])
    assert f"subspan      {subspan.__version__}" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out == f"subspan {subspan.__version__}\n"


def test_extras_are_those_of_the_package() -> None:
    known = importlib.metadata.metadata("subspan").get_all("Provides-Extra") or []
    assert set(doctor._extras()) == {*doctor.EXTRAS} & {*known}
    assert doctor._extras()["train"]["jsonargparse"] == importlib.metadata.version("jsonargparse")
    assert doctor._version("no-such-package") is None


def test_torch_alone_is_enough() -> None:
    """For the library, for --version and for doctor: whatever torch itself does not depend on cannot be imported."""
    program = """
    import importlib.metadata, re, sys

    needed, known = {"subspan"}, ["torch"]
    while known:
        name = known.pop().lower().replace("_", "-")
        if name not in needed:
            needed.add(name)
            lines = importlib.metadata.requires(name) or []
            known += [re.match(r"[\\w.-]+", line)[0] for line in lines if "extra ==" not in line and "platform" not in line]
    for top, owners in importlib.metadata.packages_distributions().items():
        if not {owner.lower().replace("_", "-") for owner in owners} & needed:
            sys.modules[top] = None
    import torch, subspan
    try:
        import numpy
        raise SystemExit("numpy is there")
    except ModuleNotFoundError:
        pass
    model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(8, 6)]))
    optimizer = subspan.GaLoreAdamW8bit(subspan.param_groups(model, rank=2), lr=0.1)
    for _ in range(3):
        model[0][0](torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    from subspan.cli import main
    main(["--version"])
    main(["doctor"])
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"subspan {subspan.__version__}" in done.stdout
    assert "What to know" in done.stdout
