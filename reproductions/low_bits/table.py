"""Write the table of README.md from results/: `python reproductions/low_bits/table.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
NAMES = {
    "fp32": "GaLore, fp32 state",
    "fp32_other_seed": "the same, another seed",
    "bf16": "bf16 state",
    "int8": "8-bit state (`galore8bit`)",
    "int4": "4-bit state",
    "basis_int4": "4-bit basis",
    "weights_int8": "INT8 weights",
    "qgalore": "`qgalore`: 8-bit state, 4-bit basis, INT8 weights",
    "dense_adafactor": "Adafactor for dense parameters",
}


def table() -> str:
    results = {path.stem: json.loads(path.read_text()) for path in (HERE / "results").glob("*.json")}
    if "fp32" not in results:
        return ""
    base = results["fp32"]
    lines = [
        "| row | validation loss | against fp32 | perplexity | weights | basis | moments |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, name in NAMES.items():
        if key in results:
            result = results[key]
            sizes = " | ".join(f"{result['bytes'][part] / 2**20:.1f} MiB" for part in ("weights", "basis", "moments"))
            change = f"{result['valid_loss'] / base['valid_loss'] - 1:+.2%}"
            lines.append(f"| {name} | {result['valid_loss']:.4f} | {change} | {result['perplexity']:.2f} | {sizes} |")
    return "\n".join(lines)


def main() -> None:
    path = HERE / "README.md"
    text = re.sub(
        r"(<!-- rows -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{table()}\n{m[2]}", path.read_text(), flags=re.S
    )
    path.write_text(text)


if __name__ == "__main__":
    main()
