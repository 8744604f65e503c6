"""Time a training step of each method in turn, in one process, on a machine that does nothing else.

    python reproductions/first_run/speed.py

The methods take turns, so that a slow minute of the machine is shared. Every round starts with a refresh. Written:
medians over all rounds, as ratios, into README.md.
"""

from __future__ import annotations

import re
import statistics
import time
from pathlib import Path

import torch
from run import BATCH, MICRO_BATCH, SEARCHED, configure, make_optimizer
from table import LABELS

from subspan.training.models import build_model


def main(rounds: int = 5, steps: int = 6) -> None:
    """Measure and write.

    Args:
        rounds: turns of each method
        steps: optimizer steps in a turn; the first one refreshes
    """
    torch.manual_seed(0)
    batches = torch.randint(4096, (BATCH, 256)).split(MICRO_BATCH)
    setups = {}
    for method in SEARCHED:
        model = build_model("llama-9m", vocab_size=4096, seq_len=256)
        optimizer = make_optimizer(method, model, configure(method, 1e-3, 1e-3, 1, [], "", 0, Path("unused")))
        for group in optimizer.param_groups:
            if "rank" in group:
                group["update_proj_gap"] = steps
        setups[method] = model, optimizer
    whole: dict[str, list[float]] = {method: [] for method in setups}
    optimizing: dict[str, list[float]] = {method: [] for method in setups}
    refreshing: dict[str, list[float]] = {method: [] for method in setups}
    for turn in range(rounds + 1):
        for method, (model, optimizer) in setups.items():
            for step in range(steps):
                begin = time.perf_counter()
                for ids in batches:
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)
                    loss.backward()
                middle = time.perf_counter()
                optimizer.step()
                end = time.perf_counter()
                optimizer.zero_grad()
                if turn == 0:
                    continue  # warm-up
                if step == 0:
                    refreshing[method].append(end - middle)
                else:
                    whole[method].append(end - begin)
                    optimizing[method].append(end - middle)
    step_time, part, first = (
        {method: statistics.median(times) for method, times in measured.items()}
        for measured in (whole, optimizing, refreshing)
    )
    lines = [
        "| method | tokens/s between refreshes, AdamW = 1 | optimizer's share of a step | refresh of all 56 matrices, in steps "
        "| tokens/s at T = 100, AdamW = 1 |",
        "|---|---|---|---|---|",
    ]
    for method in setups:
        refresh = 0.0 if method == "adamw" else first[method] - part[method]
        lines.append(
            f"| {LABELS[method]} | {step_time['adamw'] / step_time[method]:.2f} | {part[method] / step_time[method]:.1%} | "
            f"{refresh / step_time[method]:.2f} | {step_time['adamw'] / (step_time[method] + refresh / 100):.2f} |"
        )
    table = "\n".join(lines)
    print(table)
    readme = Path(__file__).with_name("README.md")
    text = re.sub(r"(<!-- speed -->\n).*?(<!-- end -->)", rf"\g<1>{table}\n\g<2>", readme.read_text(), flags=re.DOTALL)
    readme.write_text(text)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
