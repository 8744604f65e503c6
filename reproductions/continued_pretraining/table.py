"""Write README.md's table from the files in results/.

python reproductions/continued_pretraining/table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from run import LONG, METHODS, RESULTS, SHORT

HERE = Path(__file__).parent


def main() -> None:
    results = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    lines = [
        "| method | lr | validation loss | perplexity | state, MiB | peak memory of the process, MiB | rates tried: loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        own = [result for result in results if result["method"] == name]
        tried = sorted((r["lr"], r["valid_loss"]) for r in own if r["steps"] == SHORT)
        losses = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in tried)
        for r in [r for r in own if r["steps"] == LONG]:
            lines.append(
                f"| {name} | {r['lr']:g} | {r['valid_loss']:.4f} | {r['perplexity']:.2f} | "
                f"{(r['bytes']['basis'] + r['bytes']['moments']) / 2**20:.0f} | {r['peak_memory_bytes'] / 2**20:.0f} | {losses} |"
            )
        if not any(r["steps"] == LONG for r in own):
            lines.append(f"| {name} | - | not run | - | - | - | {losses or '-'} |")
    readme, table = HERE / "README.md", "\n".join(lines)
    readme.write_text(re.sub(r"(<!-- rows -->\n).*?(<!-- end -->)", f"\\1{table}\n\\2", readme.read_text(), flags=re.S))


if __name__ == "__main__":
    main()
