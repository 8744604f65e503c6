"""Does a run on several processes survive the death of one of them? torchrun starts all again, from the last checkpoint.

    python benchmarks/kill_test/workers.py --kills 10 --seed 0

The run of run.py on two processes that hold half of the model each, once without a break; then the same again, in which one of
the two, drawn at random, is killed with SIGKILL at random moments. Nobody starts anything by hand. At the end losses, gradient
norms and exported weights must be the unbroken run's. What was counted goes to results_workers.json, and into README.md.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from corruption import Violation
from run import check, compare_ends, configure, read_log, write_text

HERE = Path(__file__).parent
COUNT = 2


def start(config: Path, out: Path, restarts: int) -> subprocess.Popen[bytes]:
    words = [
        "torchrun",
        "--standalone",
        "--nproc-per-node",
        str(COUNT),
        "--max-restarts",
        str(restarts),
        "-m",
        "subspan",
        "train",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *words[1:], "--config", str(config), "--resume", "auto"]
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    with config.with_suffix(".log").open("wb") as stream:
        return subprocess.Popen(torchrun, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **environment})


def workers(process: subprocess.Popen[bytes]) -> list[int]:
    """The processes that train, as long as they do."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found}
    return sorted(pid for pid, command in commands.items() if b"subspan" in command)


def steps_logged(out: Path) -> int:
    return max((dict(line)["step"] for line in read_log(out)), default=0)


def kill_workers(process: subprocess.Popen[bytes], out: Path, steps: int, kills: int, draw: random.Random) -> list[int]:
    """The steps at which one was killed: moments are spread over the run, from before its first step to its last third."""
    at: list[int] = []
    for i in range(kills):
        wanted = int((i + draw.random()) * 0.9 * steps / kills)
        while process.poll() is None and (steps_logged(out) < wanted or len(workers(process)) < COUNT):
            time.sleep(0.01)
        time.sleep(draw.random() * 3)  # anywhere in loading, a step or a save
        check(process.poll() is None, f"the run ended before kill {i + 1}")
        alive = workers(process)
        if not alive:
            continue
        os.kill(draw.choice(alive), signal.SIGKILL)
        at.append(steps_logged(out))
        print(f"kill {i + 1}/{kills} after step {at[-1]}", flush=True)
        gone = set(alive)
        while process.poll() is None and gone & set(workers(process)):
            time.sleep(0.05)  # torchrun ends the others, and starts all again
    return at


def main(kills: int = 10, seed: int = 0) -> None:
    """Train, kill, compare.

    Args:
        kills: how many; the run has six times as many steps
        seed: of the moments
    """
    folder, steps, begin = Path(tempfile.mkdtemp(prefix="kill_workers_")), 6 * kills, time.perf_counter()
    write_text(folder / "text.txt")
    try:
        for name in ("unbroken", "killed"):
            path = configure(folder, name, steps=steps, gradients="project", keep=2)
            values = yaml.safe_load(path.read_text())
            values["parallel"] = {"shard": COUNT, "replicate": 1}
            values["run"]["batch_size"] = 8
            path.write_text(yaml.safe_dump(values))
            process = start(path, folder / name, restarts=kills if name == "killed" else 0)
            try:
                at = kill_workers(process, folder / name, steps, kills, random.Random(seed)) if name == "killed" else []
                code = process.wait()
            finally:
                process.kill()
            check(code == 0, f"{name}: code {code}, see {path.with_suffix('.log')}")
        compare_ends(folder / "killed", folder / "unbroken")
    except Violation as violation:
        raise SystemExit(f"VIOLATION, see {folder}: {violation}") from None
    result: dict[str, Any] = {
        "processes": COUNT,
        "kills": len(at),
        "killed_after_step": at,
        "steps": steps,
        "log_lines_equal": len(read_log(folder / "killed")),
        "exported_weights_equal": True,
        "seconds": round(time.perf_counter() - begin),
        "versions": json.loads((folder / "killed" / "summary.json").read_text())["versions"],
    }
    (HERE / "results_workers.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = [(key.replace("_", " "), value) for key, value in result.items() if key != "versions"]
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])
    readme = HERE / "README.md"
    text = re.sub(
        r"(<!-- workers -->\n).*?(<!-- end -->)", rf"\g<1>{table}\n\g<2>", readme.read_text(), flags=re.DOTALL
    )
    readme.write_text(text)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
