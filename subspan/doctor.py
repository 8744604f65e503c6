"""`subspan doctor`: what this machine has for training, and what will be slow on it and why. It needs torch alone."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Sequence
from typing import Any

import torch

import subspan
from subspan.memory import GIB, available_memory

EXTRAS = ("hf", "train", "baselines", "finetune", "plan", "report")
"""Those that users want; `dev` is for this repository."""

SIDE = 512  # of the matrices that are multiplied


def main(argv: Sequence[str]) -> None:
    """The words behind `subspan doctor`."""
    parser = argparse.ArgumentParser(prog="subspan doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = examine()
    print(json.dumps(found, indent=2) if parser.parse_args(argv).json else describe(found))


def examine() -> dict[str, Any]:
    """What is there. Bytes; speeds in operations a second, measured with one product of small matrices; None: not known."""
    accelerator = _accelerator()
    devices = [_device(torch.device("cpu"))]
    if accelerator:
        devices += [
            _device(torch.device(accelerator, i)) for i in range(torch.get_device_module(accelerator).device_count())
        ]
    found: dict[str, Any] = {
        "subspan": subspan.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices,
        "compiler": _compiler(),
        "c_compiler": _c_compiler(),
        "triton": importlib.util.find_spec("triton") is not None,
        "backends": _backends(),
        "extras": _extras(),
    }
    return {**found, "advice": advise(found)}


def advise(found: dict[str, Any]) -> list[str]:
    """What will be slow or missing with what `examine` found, and what helps: one line each."""
    lines = []
    for device in found["devices"]:
        fast, slow = device["float32"], device["bfloat16"]
        if fast is None:
            lines.append(f"{device['name']} computes nothing now: is its memory free, does its driver fit torch's?")
        elif slow is None:
            lines.append(f"{device['name']} has no bfloat16: train with --model.dtype float32")
        elif slow < fast / 1.5:
            lines.append(
                f"{device['name']}: products in bfloat16 take {fast / slow:.0f} times as long as in float32 (measured): "
                "train with --model.dtype float32, without --run.autocast"
            )
    if len(found["devices"]) == 1:
        lines.append(
            "no accelerator: a model of 10 M parameters trains in minutes, one of 100 M in hours; `subspan plan` plans any size"
        )
    if found["threads"] < found["cores"]:
        lines.append(
            f"torch uses {found['threads']} of {found['cores']} cores: set OMP_NUM_THREADS={found['cores']}, or --run.threads"
        )
    if found["compiler"] is None:
        lines.append(
            "no C++ compiler: torch.compile cannot work on the CPU, --optim.compile stays eager: install g++, or name one in CXX"
        )
    if len(found["devices"]) > 1 and not found["triton"]:
        lines.append("no triton: torch.compile cannot work on the accelerator, --optim.compile stays eager")
    elif len(found["devices"]) > 1 and found["c_compiler"] is None:
        lines.append(
            "no C compiler, which triton wants: --optim.compile stays eager on the accelerator: install gcc, or name one in CC"
        )
    named: set[str] = set()
    for extra, packages in found["extras"].items():  # a later one has most of an earlier one's
        if missing := [name for name, version in packages.items() if version is None and name not in named]:
            lines.append(f'{extra}: {", ".join(missing)} missing: pip install "subspan[{extra}]"')
            named |= {*missing}
    return lines


def describe(found: dict[str, Any]) -> str:
    """The same for people."""
    rows = [
        ("subspan", f"{found['subspan']}, Python {found['python']}, torch {found['torch']}, {found['system']}"),
        ("cores", f"{found['cores']}, torch uses {found['threads']} threads"),
    ]
    for device in found["devices"]:
        free, total = (f"{size / GIB:.1f}" if size is not None else "?" for size in (device["free"], device["total"]))
        speeds = [
            f"{name} {speed / 1e9:,.1f}" for name in ("float32", "bfloat16") if (speed := device[name]) is not None
        ]
        each = " a thread" if device["device"] == "cpu" else ""
        text = f"{device['name']}, {free} of {total} GiB free, {', '.join(speeds)} GFLOP/s{each}"
        rows.append((device["device"], text))
    rows.append(("compiler", f"{found['compiler'] or 'none'}{', triton' if found['triton'] else ''}"))
    rows.append(("processes", ", ".join(found["backends"]) or "torch.distributed is not there"))
    there = {name: version for packages in found["extras"].values() for name, version in packages.items() if version}
    for extra, packages in found["extras"].items():
        missing = len(packages.keys() - there.keys())
        rows.append((f"[{extra}]", f"{missing} of {len(packages)} packages missing" if missing else "complete"))
    rows.append(("packages", ", ".join(f"{name} {version}" for name, version in sorted(there.items())) or "none"))
    notes = found["advice"] or ["nothing: all is there"]
    return "\n".join(
        [*(f"  {name:<12} {value}" for name, value in rows), "", "What to know", *(f"  - {line}" for line in notes)]
    )


def _accelerator() -> str | None:
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None else None


def _device(device: torch.device) -> dict[str, Any]:
    free: int | None
    total: int | None
    if device.type == "cpu":
        name, free, total = _processor(), available_memory(), _host_memory()
    else:
        module = torch.get_device_module(device)
        name = getattr(module, "get_device_name", str)(device)
        try:
            free, total = module.mem_get_info(device)
        except (AttributeError, RuntimeError):
            free = total = None
    speeds = {str(dtype).removeprefix("torch."): _speed(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return {"device": str(device), "name": name, "free": free, "total": total, **speeds}


def _speed(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second of a product, the best of three, on one thread of a CPU: more would wait for a core that is busy.
    None where it is not computed: no such product in this dtype, no memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        A = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
        seconds = []
        for _ in range(4):  # the first one warms up
            begin = time.perf_counter()
            (A @ A)[0, 0].item()
            seconds.append(time.perf_counter() - begin)
    except RuntimeError:
        return None
    finally:
        torch.set_num_threads(threads)
    return 2 * SIDE**3 / min(seconds[1:])


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    kind = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor() or platform.machine()} ({kind})"


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _compiler() -> str | None:
    """The C++ compiler that torch.compile takes."""
    names = [os.environ.get("CXX"), "clang++" if platform.system() == "Darwin" else "g++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _c_compiler() -> str | None:
    """The C compiler that triton takes."""
    names = [os.environ.get("CC"), "gcc", "clang"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _backends() -> list[str]:
    if not torch.distributed.is_available():
        return []
    there = {"gloo": torch.distributed.is_gloo_available, "nccl": torch.distributed.is_nccl_available}
    return [name for name, available in there.items() if available()]


def _extras() -> dict[str, dict[str, str | None]]:
    """Extra -> package -> its version, None where it is not installed."""
    try:
        wanted = importlib.metadata.requires("subspan") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return {}
    extras: dict[str, dict[str, str | None]] = {}
    for extra in EXTRAS:
        lines = [line for line in wanted if re.search(rf"extra == ['\"]{extra}['\"]", line)]
        names = [re.match(r"[\w.-]+", line)[0] for line in lines]  # type: ignore[index]
        if names:
            extras[extra] = {name: _version(name) for name in names}
    return extras


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
