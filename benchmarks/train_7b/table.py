"""Write the tables of README.md from results/: `python benchmarks/train_7b/table.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
GIB = 2**30


def load() -> dict[str, dict]:
    """The results, each with the planner's word on it, which is kept."""
    from run import Row, configure, save

    from subspan.plan import plan_memory

    results = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))}
    for name, result in results.items():
        if "planned" not in result:
            result["planned"] = plan_memory(configure(Row(**result["row"]))).as_dict()
            save(name, result)
    return results


def memory_table(results: dict[str, dict]) -> str:
    lines = [
        "| row | parameters | preset, side | gradients | tokens a step | checkpointing | rank "
        "| weights | optimizer | peak RSS | of it before the model | the rest, planned | planned over measured |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        row, sizes, steps = result["row"], result["bytes"], result["steps"]
        if not steps:
            continue
        peak, planned = max(step["peak"] for step in steps), result["planned"]["peak"]
        cells = [
            name,
            f"{result['parameters'] / 1e9:.2f} B",
            f"{row['preset']}, {row['proj_type']}",
            row["gradients"],
            f"{row['micro_batches']} x {row['tokens']}",
            "yes" if row["checkpointing"] else "no",
            row["rank"],
            gib(sizes["weights"]),
            gib(sizes["basis"] + sizes["moments"]),
            f"**{gib(peak)}**",
            gib(result["imported"]),
            gib(planned),
            f"{planned / (peak - result['imported']) - 1:+.1%}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def time_table(results: dict[str, dict]) -> str:
    lines = [
        "| row | steps | loss | seconds a step | forward | backward | project | rule and update | refresh | refreshes a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        steps = result["steps"]
        if not steps:
            continue

        def part(key: str, steps: list[dict] = steps) -> str:
            return f"{median(step['split'].get(key, 0.0) for step in steps):.0f}"

        cells = [
            name,
            len(steps),
            " to ".join(f"{step['loss']:.2f}" for step in ([steps[0], steps[-1]] if len(steps) > 1 else steps)),
            f"{median(step['seconds'] for step in steps):.0f}",
            part("forward"),
            part("backward"),
            part("project"),
            part("rule and update"),
            part("refresh"),
            f"{median(step['refreshes'] for step in steps):.0f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def write_tables() -> None:
    results = load()
    path = HERE / "README.md"
    text = path.read_text()
    for marker, table in (("memory", memory_table(results)), ("time", time_table(results))):
        text = re.sub(
            rf"(<!-- {marker} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
    path.write_text(text)


if __name__ == "__main__":
    write_tables()
