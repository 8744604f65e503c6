"""Does a run survive `kill -9` at any moment? Killed again and again, it must end as if nothing had happened, bit for bit.

    python benchmarks/kill_test/run.py --kills 50 --seed 0 --gradients project

Trains a small LLaMA once without a break and keeps all its checkpoints: the reference. Then the same run again, killed with
SIGKILL at random moments and started each time with the same command and `--resume auto`. After every kill each folder that
is called step_* must verify and hold the reference's bytes; at the end the log and the exported weights must be the
reference's. Last, checkpoints of that run are damaged on purpose (corruption.py). The first violation ends the script with
exit code 1 and leaves its folder to look at. Numbers go to results/ beside this file, and from there into README.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from corruption import Violation, corrupt
from safetensors.torch import load_file
from torch import Tensor

from subspan.training.checkpoint import verify
from subspan.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, save_config

HERE = Path(__file__).parent
EVERY = 4  # steps between two checkpoints
KEEP = 2  # checkpoints that the killed run keeps: the older ones go, so that deleting is killed too
PATIENCE = 300.0  # seconds without anything new after which a process is called stuck

# Moments are counted from one of these; the share of the kills that each gets, the rest are in training.
SHARES = {"saving": 0.34, "saved": 0.06, "start": 0.08, "resume": 0.08, "opened": 0.08, "end": 0.1}

SIZES = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "attention_dropout": 0.1,  # draws random numbers: their state is part of a run
}
WORDS = ["the", "cat", "dog", "bird", "house", "tree", "sees", "finds", "likes", "old", "small", "red", "and", "then"]


# ------------------------------------------------------------------------------------------------------------ the run


def write_text(path: Path, documents: int = 200) -> None:
    """Documents of 60 words, each word mostly followed by the same next one: easy to learn, the same every time."""
    draw = random.Random(0)
    texts = []
    for _ in range(documents):
        index, words = draw.randrange(len(WORDS)), []
        for _ in range(60):
            words.append(WORDS[index])
            index = (index * 3 + 1) % len(WORDS) if draw.random() < 0.8 else draw.randrange(len(WORDS))
        texts.append(" ".join(words))
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")


def configure(folder: Path, name: str, *, steps: int, gradients: Any, keep: int) -> Path:
    """Write folder/NAME.yaml for a run in folder/NAME with a cache of its own: making it is killed too."""
    whole = gradients == "update"  # takes one backward pass a step and cannot clip
    config = TrainConfig(
        model=ModelConfig(overrides=SIZES),
        data=DataConfig(
            files=str(folder / "text.txt"),
            vocab_size=512,
            seq_len=64,
            valid_fraction=0.2,
            cache_dir=str(folder / f"{name}_cache"),
            num_workers=1,
        ),
        optim=OptimConfig(
            lr=0.01, rank=8, update_proj_gap=5, gradients=gradients, max_grad_norm=None if whole else 1.0
        ),
        run=RunConfig(
            out=str(folder / name),
            steps=steps,
            warmup_steps=steps // 10,
            batch_size=6,
            micro_batch=None if whole else 2,
            eval_every=15,
            checkpoint_every=EVERY,
            keep_checkpoints=keep,
            log_every=1,  # a line a step: what moments are counted in
            device="cpu",
            threads=1,
        ),
    )
    path = folder / f"{name}.yaml"
    save_config(config, path)
    return path


class Life:
    """One process that trains, and when what happened to it: `times`, event -> moments on the clock."""

    def __init__(self, config: Path, out: Path, steps: int, number: int, resume: bool) -> None:
        self.out, self.last = out, f"step {steps}/{steps} "
        # Of a run that has its last checkpoint only the evaluation and the export are left.
        self.trained = (out / "checkpoints" / f"step_{steps:08}").is_dir()
        self.log = config.with_suffix(f".{number:03}.log")
        self.times: dict[str, list[float]] = {
            event: [] for event in ("start", "resume", "opened", "step", "saving", "saved", "end", "exit")
        }
        self.at_start = self._signature()
        self.known = set(self._names())
        words = [sys.executable, "-m", "subspan", "train", "--config", str(config)]
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                words + ["--resume", "auto"] * resume,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,  # so that its children can be killed with it
            )
        self.times["start"].append(time.perf_counter())
        self.lines = self.log.open()
        self.partial = ""

    def poll(self) -> int | None:
        """See what is new; the exit code once the process has ended."""
        code = self.process.poll()
        now = time.perf_counter()
        if not self.times["opened"] and self._signature() != self.at_start:
            self.times["opened"].append(now)
            if self.trained:
                self.times["end"].append(now)
        names = self._names()
        for name in sorted(names - self.known, key=lambda name: name.lstrip(".")):
            if name.startswith("step_"):
                self.times["saved"].append(now)
            elif name.endswith(".tmp"):
                self.times["saving"].append(now)
        self.known = names  # what was removed may come again: a leftover's name is used by the next save
        *lines, self.partial = (self.partial + self.lines.read()).split("\n")
        for line in lines:
            if line.startswith("resume: "):
                self.times["resume"].append(now)
            elif re.match(r"step \d+/", line):
                self.times["step"].append(now)
                if line.startswith(self.last):
                    self.times["end"].append(now)
        if code is not None:
            self.times["exit"].append(now)
        return code

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.poll()

    def close(self) -> None:
        """Whatever happens to this script, leave no process behind."""
        if self.process.poll() is None:
            self.kill()
        self.lines.close()

    def phase(self) -> str:
        """What the kill hit, by what it left on the disk where that tells."""
        ending = "final evaluation and export"
        if not self.times["step"]:
            if self.times["end"]:
                return ending
            if self.times["opened"]:
                return "opening the run folder"
            return "loading" if self.times["resume"] else "starting"
        names = self._names()  # leftovers of earlier lives were removed before the first step
        if any(name.endswith(".tmp") for name in names):
            return "saving"
        if any(name.endswith(".gone") for name in names):
            return "deleting an old checkpoint"
        return ending if self.times["end"] else "training"

    def _signature(self) -> Any:
        try:
            return (self.out / "metrics.jsonl").stat().st_mtime_ns
        except FileNotFoundError:
            return self.out.is_dir()

    def _names(self) -> set[str]:
        folder = self.out / "checkpoints"
        return set(os.listdir(folder)) if folder.is_dir() else set()


# ------------------------------------------------------------------------------------------------------------ moments


@dataclasses.dataclass
class Moment:
    """When to kill: after the `count`-th `event` of a life, and then `fraction` of what `event` takes."""

    event: str
    count: int
    fraction: float

    def is_over(self, life: Life, durations: dict[str, float]) -> bool:
        for event, count in ((self.event, self.count), ("end", 1)):  # a life that gets to the end is killed there
            times = life.times[event]
            if len(times) >= count and time.perf_counter() >= times[count - 1] + self.fraction * durations[event]:
                return True
        return False


def make_plan(kills: int, draw: random.Random) -> list[str]:
    """The event of every kill: at first the moments that come once, at last the end of the run."""
    events = {event: max(1, round(share * kills)) for event, share in SHARES.items()}
    ends, first = events.pop("end"), ["opened", "step", "saving"]  # before config.yaml, before and in the first save
    pool = [event for event, count in events.items() for _ in range(count)]
    pool += ["step"] * (kills - ends - len(pool))
    for event in first:
        if event in pool:
            pool.remove(event)
    draw.shuffle(pool)
    return [*first, *pool, *["end"] * ends][:kills]


def make_moment(plan: list[str], index: int, done: int, steps: int, draw: random.Random) -> Moment:
    """The moment of kill `index`, for a run with a checkpoint of step `done`: the steps left are shared by the lives left."""
    event, fraction = plan[index], draw.random()
    lives = sum(event in ("step", "saving", "saved") for event in plan[index:])
    mean = (steps - done) / max(lives, 1)
    if event == "step":
        longest = EVERY - 1 if index == 1 else steps - done - 1
        return Moment(event, max(1, min(1 + int(draw.uniform(0, 2 * mean)), longest)), fraction)
    if event in ("saving", "saved"):
        count = 1 if index == 2 else 1 + int(draw.uniform(0, 2 * mean / EVERY))
        return Moment(event, max(1, min(count, (steps - done) // EVERY)), fraction)
    if event == "opened":  # most of it is in the beginning; the very first moment once, with no config.yaml yet
        return Moment(event, 1, fraction**3 if index else 0.0)
    return Moment(event, 1, fraction)


def measure(life: Life, durations: dict[str, float]) -> None:
    """Take over how long things took in this life, as far as it got."""
    times = life.times
    for event, until in (("start", "step"), ("resume", "step"), ("opened", "step"), ("end", "exit")):
        if times[event] and times[until] and (until == "step" or life.process.returncode == 0):
            durations[event] = times[until][0] - times[event][0]
    if len(times["step"]) > 2:
        durations["step"] = statistics.median(b - a for a, b in zip(times["step"], times["step"][1:], strict=False))
    if pairs := list(zip(times["saving"], times["saved"], strict=False)):
        durations["saving"] = statistics.median(saved - saving for saving, saved in pairs)


# ------------------------------------------------------------------------------------------------------------- checks


def check(good: bool, message: str) -> None:
    if not good:
        raise Violation(message)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor], what: str) -> None:
    check(one.keys() == other.keys(), f"{what}: other names: {sorted(one.keys() ^ other.keys())}")
    for name, X in one.items():
        Y = other[name]
        equal = X.dtype == Y.dtype and X.shape == Y.shape
        equal = equal and X.reshape(-1).view(torch.uint8).equal(Y.reshape(-1).view(torch.uint8))
        check(equal, f"{what}: {name} differs")


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors; the manifest without what depends on the machine's speed."""
    try:
        manifest = verify(path)
    except ValueError as error:
        raise Violation(str(error)) from None
    for key in ("seconds", "refresh_seconds"):
        manifest["progress"].pop(key)
    return manifest, {name: X for file in path.glob("*.safetensors") for name, X in load_file(file).items()}


def compare_checkpoints(out: Path, reference: Path) -> list[int]:
    """The steps of the checkpoints in `out`; Violation unless each is whole and the reference's."""
    paths = sorted((out / "checkpoints").glob("step_*"))
    for path in paths:
        original = reference / "checkpoints" / path.name
        check(original.is_dir(), f"{path} is of a step that the unbroken run has no checkpoint of")
        manifest, tensors = read_checkpoint(path)
        expected, originals = read_checkpoint(original)
        check(manifest == expected, f"the manifest of {path} is not that of {original}")
        same_bits(tensors, originals, f"{path} against {original}")
    return [int(path.name[5:]) for path in paths]


def read_log(out: Path) -> list[tuple[Any, ...]]:
    """The whole lines of metrics.jsonl, as far as they do not depend on the machine's speed."""
    path = out / "metrics.jsonl"
    keys = ("step", "tokens", "loss", "lr", "grad_norm", "skipped", "valid_loss", "perplexity")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [tuple((key, row[key]) for key in keys if key in row) for row in rows]


def compare_logs(lines: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    for number, line in enumerate(lines):
        there = expected[number] if number < len(expected) else "nothing"
        check(line == there, f"line {number + 1} of metrics.jsonl is {line}, in the unbroken run {there}")


def compare_ends(out: Path, reference: Path) -> None:
    """Log, exported model and summary of a finished run are the reference's."""
    log, expected = read_log(out), read_log(reference)
    compare_logs(log, expected)
    check(len(log) == len(expected), f"metrics.jsonl has {len(log)} lines, in the unbroken run {len(expected)}")
    same_bits(*(load_file(run / "model" / "model.safetensors") for run in (out, reference)), "exported weights")
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (out, reference))
    for key in ("valid_loss", "perplexity", "valid_tokens", "first_loss", "steps", "skipped_steps", "tokens", "corpus"):
        check(ours[key] == theirs[key], f"summary.json: {key} is {ours[key]}, in the unbroken run {theirs[key]}")


# --------------------------------------------------------------------------------------------------------------- runs


def live(life: Life, moment: Moment | None, durations: dict[str, float]) -> bool:
    """Watch one life until its moment and kill it; False if it ended before. Violation if it failed or got stuck."""
    try:
        while True:
            if (code := life.poll()) is not None:
                tail = life.log.read_text()[-2000:]
                check(code == 0, f"the run ended with code {code}:\n{tail}")
                return False
            if moment and moment.is_over(life, durations):
                life.kill()
                return True
            last = max(when for times in life.times.values() for when in times)
            check(time.perf_counter() < last + PATIENCE, f"stuck for {PATIENCE:g} s, see {life.log}")
            time.sleep(0.001)
    finally:
        life.close()
        measure(life, durations)


def kill_and_resume(folder: Path, kills: int, seed: int, gradients: str) -> dict[str, Any]:
    """Both runs and all comparisons; what was counted."""
    steps, begin = 4 * kills, time.perf_counter()
    configs = {
        name: configure(folder, name, steps=steps, gradients=gradients, keep=keep)
        for name, keep in (("unbroken", steps), ("killed", KEEP))
    }
    reference, out = folder / "unbroken", folder / "killed"
    durations = {"resume": 5.0, "saved": 0.02}  # the unbroken run tells all others
    live(Life(configs["unbroken"], reference, steps, 0, False), None, durations)
    expected = read_log(reference)
    compare_checkpoints(reference, reference)
    spent = {event: round(seconds, 3) for event, seconds in durations.items() if event not in ("resume", "saved")}
    print(f"unbroken run: {steps} steps in {time.perf_counter() - begin:.0f} s, seconds by event {spent}", flush=True)

    draw = random.Random(seed)
    plan = make_plan(kills, draw)
    phases: Counter[str] = Counter()
    leftovers: Counter[str] = Counter()
    compared: list[int] = []
    number = lives = steps_done = 0
    present: list[int] = []
    while number <= kills:  # one life more than kills: the last one may finish
        lives += 1
        moment = make_moment(plan, number, max(present, default=0), steps, draw) if number < kills else None
        life = Life(configs["killed"], out, steps, lives, resume=lives > 1)
        killed = live(life, moment, durations)
        steps_done += len(life.times["step"])
        present = compare_checkpoints(out, reference)
        compared += present
        if not killed:
            if moment:
                print("the run ended before its moment: not counted, again", flush=True)
                check(lives < 2 * kills, "too many lives end before their moment")
                continue
            break
        number += 1
        phases[life.phase()] += 1
        names = [path.name for path in (out / "checkpoints").glob(".step_*")]
        if life.times["step"]:  # else they are those of the life before
            leftovers += Counter(name.rpartition(".")[2] for name in names)
        compare_logs(read_log(out), expected)
        assert moment
        print(
            f"kill {number}/{kills} after {moment.event} {moment.count} + {moment.fraction:.2f}: {life.phase()}, "
            f"{len(life.times['step'])} steps; checkpoints {present} equal, left over {names}, "
            f"{time.perf_counter() - begin:.0f} s",
            flush=True,
        )
    compare_ends(out, reference)
    return {
        "gradients": gradients,
        "seed": seed,
        "kills": kills,
        "kills_by_phase": dict(sorted(phases.items())),
        "restarts": lives - 1,
        "steps": steps,
        "steps_done": steps_done,
        "checkpoints_compared": len(compared),
        "checkpoints_compared_different": len(set(compared)),
        "checkpoint_bytes": sum(file.stat().st_size for file in max((out / "checkpoints").glob("step_*")).iterdir()),
        "save_seconds": spent["saving"],
        "leftovers": {kind: leftovers[kind] for kind in ("tmp", "gone")},
        "log_lines_equal": len(expected),
        "exported_weights_equal": True,
        "seconds": round(time.perf_counter() - begin),
        "versions": json.loads((out / "summary.json").read_text())["versions"],
    }


# ------------------------------------------------------------------------------------------------------------- tables


def kill_table(results: list[dict[str, Any]]) -> str:
    phases = [
        "starting",
        "loading",
        "opening the run folder",
        "training",
        "saving",
        "deleting an old checkpoint",
        "final evaluation and export",
    ]
    rows = [
        ("kills", lambda r: r["kills"]),
        *((f"... {phase}", lambda r, phase=phase: r["kills_by_phase"].get(phase, 0)) for phase in phases),
        ("steps of the run", lambda r: r["steps"]),
        ("steps done in all lives", lambda r: r["steps_done"]),
        ("half-written checkpoints left under a dot-name", lambda r: r["leftovers"]["tmp"]),
        ("broken folders called step_*", lambda r: 0),  # the first one would have ended the script
        ("checkpoints compared", lambda r: r["checkpoints_compared"]),
        ("... that differ", lambda r: 0),
        ("log lines compared", lambda r: r["log_lines_equal"]),
        ("... that differ, are missing or come twice", lambda r: 0),
        ("exported weights", lambda r: "equal"),
        ("bytes of a checkpoint", lambda r: f"{r['checkpoint_bytes']:,}"),
        ("seconds of a save", lambda r: f"{r['save_seconds']:.2f}"),
    ]
    return _table([f"gradients={r['gradients']}" for r in results], rows, results)


def corruption_table(results: list[dict[str, Any]]) -> str:
    kinds = [
        ("flip", "one random bit flipped"),
        ("truncate", "cut off at a random place"),
        ("delete", "one file deleted"),
    ]
    rows = [
        *((label, lambda r, kind=kind: r["corruption"]["by_kind"][kind]) for kind, label in kinds),
        ("refused by verify", lambda r: r["corruption"]["refused_by_verify"]),
        ("refused by load, nothing changed", lambda r: r["corruption"]["refused_by_load"]),
        ("newest() fell back to the one before", lambda r: r["corruption"]["fell_back"]),
    ]
    return _table([f"gradients={r['gradients']}" for r in results], rows, results)


def _table(heads: list[str], rows: list[tuple[str, Any]], results: list[dict[str, Any]]) -> str:
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    lines += [f"| {label} | {' | '.join(str(value(r)) for r in results)} |" for label, value in rows]
    return "\n".join(lines)


def write_tables() -> None:
    results = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    readme = HERE / "README.md"
    text = readme.read_text()
    for name, table in (("kills", kill_table(results)), ("corruption", corruption_table(results))):
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{table}\n\g<2>", text, flags=re.DOTALL)
    readme.write_text(text)


def main(
    kills: int = 50,
    seed: int = 0,
    gradients: Literal["hold", "project", "update"] = "project",
    corruptions: int = 200,
) -> None:
    """Kill, resume, compare; then damage checkpoints.

    Args:
        kills: how many; the run has four times as many steps
        seed: of the moments and of the damage
        gradients: optim.gradients of the run
        corruptions: how many
    """
    if kills < 10:
        raise SystemExit(f"kills={kills}: at least 10, so that every kind of moment is among them")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="kill_test_"))
    write_text(folder / "text.txt")
    try:
        result = kill_and_resume(folder, kills, seed, gradients)
        result["corruption"] = corrupt(folder / "killed", folder / "damaged", corruptions, seed)
    except Violation as violation:
        raise SystemExit(f"VIOLATION, see {folder}: {violation}") from None
    shutil.rmtree(folder)
    file = HERE / "results" / f"{gradients}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    write_tables()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
