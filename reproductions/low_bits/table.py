"""Write the table of README.md from results/: `python reproductions/low_bits/table.py`."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

from run import FP32, RECIPE

from subspan.memory import count_memory
from subspan.training.config import load_config
from subspan.training.models import build_model
from subspan.training.optimizers import build_optimizer

HERE = Path(__file__).parent
NAMES = {
    "fp32": "GaLore, fp32 state (first_run's)",
    "fp32_other_seed": "the same, another seed",
    "bf16": "bf16 state",
    "int8": "8-bit state (`galore8bit`)",
    "int4": "4-bit state",
    "basis_int4": "4-bit basis",
    "weights_int8": "INT8 weights",
    "qgalore": "`qgalore`: 8-bit state, 4-bit basis, INT8 weights",
    "dense_adafactor": "Adafactor for dense parameters",
}


def sizes_of_fp32() -> dict[str, int]:
    """Bytes, which the file of the fp32 row does not have: counted on the meta device."""
    config = load_config(RECIPE)
    model = build_model(
        config.model.name, vocab_size=config.data.vocab_size, seq_len=config.data.seq_len, device="meta"
    )
    return asdict(count_memory(model, build_optimizer(model, config)))


def table() -> str:
    results = {path.stem: json.loads(path.read_text()) for path in (HERE / "results").glob("*.json")}
    base = json.loads(FP32.read_text())
    results["fp32"] = base | {"bytes": sizes_of_fp32()}
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
