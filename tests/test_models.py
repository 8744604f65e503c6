import json
from pathlib import Path

import pytest
import torch
from tiny import SIZES
from transformers import GPT2Config, GPT2LMHeadModel

from subspan.training.models import LLAMA, build_model

# arXiv 2403.03507 names the sizes; the counts are those of the authors' model configurations, in millions.
PUBLISHED = {"llama-60m": 58.07, "llama-130m": 134.11, "llama-350m": 367.97, "llama-1b": 1339.08, "llama-7b": 6738.42}


@pytest.mark.parametrize("name", PUBLISHED)
def test_paper_sizes_have_the_published_parameter_count(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, vocab_size=32000, seq_len=256)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.005)


def test_a_llama_is_initialised_as_published() -> None:
    torch.manual_seed(0)
    model = build_model("llama-9m", vocab_size=4096)
    weight = model.model.layers[3].mlp.gate_proj.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.config.rms_norm_eps == 1e-6
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_bfloat16_weights_keep_rotary_tables_in_float32() -> None:
    model = build_model("llama-9m", vocab_size=300, dtype="bfloat16", overrides=SIZES)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}


def test_positions_reach_as_far_as_the_sequences() -> None:
    assert build_model("llama-9m", vocab_size=300, seq_len=5000, overrides=SIZES).config.max_position_embeddings == 5000


def test_any_model_by_folder_with_its_weights_or_fresh_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=300))
    saved.save_pretrained(tmp_path)
    loaded = build_model(str(tmp_path), pretrained=True, seq_len=64)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))
    fresh = build_model(str(tmp_path), overrides={"n_layer": 3})
    assert fresh.config.n_layer == 3
    assert not torch.equal(fresh.transformer.wte.weight, saved.transformer.wte.weight)
    with pytest.raises(ValueError, match=r"data.seq_len=65 is more than the 64 positions"):
        build_model(str(tmp_path), seq_len=65)


def test_attention_is_the_one_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = [
        build_model("llama-9m", vocab_size=300, overrides=SIZES, attn_implementation=name) for name in ("eager", None)
    ]
    assert [model.config._attn_implementation for model in models] == ["eager", "sdpa"]
    models[0].save_pretrained(tmp_path)
    loaded = build_model(str(tmp_path), pretrained=True, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "attn_implementation": "eager"}))
    for pretrained in (True, False):  # nothing said: as the model's own configuration says
        assert build_model(str(tmp_path), pretrained=pretrained).config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("llama-9M", {}, "did you mean llama-9m"),
        ("no/such/folder", {}, "no/such/folder"),
        ("llama-9m", {"pretrained": True}, "model.pretrained=true"),
        ("llama-9m", {"attn_implementation": "no_such"}, "model.attn_implementation=no_such cannot be used here"),
        ("llama-9m", {"overrides": {"hiden_size": 3}}, "model.overrides: hiden_size"),
    ],
)
def test_errors_are_one_line(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build_model(name, **arguments)
    assert "\n" not in str(error.value)


def test_every_name_is_a_llama_that_heads_divide() -> None:
    for name, sizes in LLAMA.items():
        assert sizes["hidden_size"] % sizes["num_attention_heads"] == 0, name
