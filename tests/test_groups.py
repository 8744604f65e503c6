"""Which parameters are projected, for the models people train."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import subspan
from subspan.optim.presets import scale_sgd

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}

MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL, num_key_value_heads=4)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SMALL, num_key_value_heads=4, head_dim=8)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SMALL, num_key_value_heads=4, head_dim=8)
    ),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SMALL, pad_token_id=0)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)
    ),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL)),
}

# matrices in one block: name endings, with the model's own names
LLAMA_BLOCK = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
BERT_BLOCK = {f"attention.self.{x}" for x in ("query", "key", "value")} | {
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
}
BLOCKS = {
    "llama": LLAMA_BLOCK,
    "qwen2": LLAMA_BLOCK,
    "qwen3": LLAMA_BLOCK,
    "gemma2": LLAMA_BLOCK,
    "phi": {f"self_attn.{x}_proj" for x in "qkv"} | {"self_attn.dense", "mlp.fc1", "mlp.fc2"},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "bert": BERT_BLOCK,
    "roberta": BERT_BLOCK,
}


def names(group):
    return [name for name, _ in group["params"]]


@pytest.mark.parametrize("model_name", MODELS)
def test_attention_and_mlp_are_projected_and_nothing_else(model_name):
    model = MODELS[model_name]()
    groups = subspan.param_groups(model, rank=8, verbose=False)
    projected = names(groups[0])
    endings = {name.split(".0.", 1)[1].removesuffix(".weight") for name in projected if ".0." in name}
    assert endings == BLOCKS[model_name]
    assert len(projected) == 2 * len(BLOCKS[model_name])  # both layers
    everything = [name for group in groups for name in names(group)]
    assert sorted(everything) == sorted(name for name, _ in model.named_parameters())  # each in exactly one group
    assert all(p.ndim >= 2 for group in groups[:-1] for _, p in group["params"])
    assert all(p.ndim < 2 for _, p in groups[-1]["params"])
    assert [("rank" in g, g.get("weight_decay")) for g in groups] == [(True, None), (False, None), (False, 0.0)]


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "bert"])
def test_every_layout_trains(model_name):
    torch.manual_seed(0)
    model = MODELS[model_name]().train()
    optimizer = subspan.GaLoreAdamW(subspan.param_groups(model, rank=4, verbose=False), lr=0.01)
    ids = torch.randint(0, 64, (4, 12))
    labels = torch.tensor([0, 1, 0, 1]) if model_name == "bert" else ids
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("rank", [4, None])
def test_experts_of_a_mixture_are_a_batch_and_routers_stay_dense(rank):
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=4, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config)
    groups = subspan.param_groups(model, rank=rank, verbose=False)
    stacked = {name: p for name, p in model.named_parameters() if ".experts." in name}
    assert stacked
    assert all(p.ndim == 3 for p in stacked.values())
    assert groups[1]["name"] == "projected (batch)"
    assert set(names(groups[1])) == set(stacked)
    assert not any("gate.weight" in name for name in names(groups[0]))
    assert [name for group in groups[2:] for name in names(group) if "gate.weight" in name]
    optimizer = subspan.GaLoreAdamW(groups)
    if rank:
        assert all(optimizer.state[p]["basis"].shape[0] == 2 for p in stacked.values())
    groups = subspan.param_groups(model, rank=rank, targets=["self_attn", "experts"], verbose=False)
    assert set(names(groups[1])) == set(stacked)


def test_what_a_router_is_made_of_stays_dense():
    """As in Switch Transformers."""
    block = nn.ModuleDict({"router": nn.ModuleDict({"classifier": nn.Linear(8, 4)}), "up": nn.Linear(8, 8)})
    groups = subspan.param_groups(nn.ModuleList([block]), rank=2, verbose=False)
    assert names(groups[0]) == ["0.up.weight"]


def test_a_weight_that_is_no_matrix_needs_a_view():
    model = nn.ModuleList([nn.Conv1d(4, 4, 3)])
    with pytest.raises(ValueError, match="is no matrix: give views="):
        subspan.param_groups(model, rank=4, targets=["weight"], verbose=False)


def test_named_targets_only_and_embeddings_when_named():
    model = MODELS["llama"]()
    groups = subspan.param_groups(model, rank=8, targets=[r"q_proj", r"embed_tokens"], verbose=False)
    assert len(names(groups[0])) == 3
    assert "model.embed_tokens.weight" in names(groups[0])


def test_frozen_parameters_stay_out():
    model = MODELS["llama"]()
    model.model.embed_tokens.requires_grad_(False)
    groups = subspan.param_groups(model, rank=8, verbose=False)
    assert "model.embed_tokens.weight" not in [name for group in groups for name in names(group)]


def test_settings_reach_the_groups():
    groups = subspan.param_groups(
        MODELS["llama"](), rank=8, scale=2.0, update_proj_gap=7, proj_type="left", lr=0.1, dense_lr=0.2, verbose=False
    )
    keys = ("rank", "scale", "update_proj_gap", "proj_type", "lr")
    assert [groups[0][key] for key in keys] == [8, 2.0, 7, "left", 0.1]
    assert [group["lr"] for group in groups[1:]] == [0.2, 0.2]


def test_rank_none_is_the_full_rank_baseline_in_the_same_groups():
    model = MODELS["llama"]()
    full, low = (subspan.param_groups(model, rank=rank, verbose=False) for rank in (None, 8))
    assert [names(group) for group in full] == [names(group) for group in low]
    assert not any("rank" in group for group in full)
    assert "basis" not in next(iter(subspan.GaLoreAdamW(full).state.values()))


@pytest.mark.parametrize(
    ("model_name", "head", "turned"),
    [
        ("llama", "lm_head.weight", ["model.embed_tokens.weight"]),
        ("gemma2", "model.embed_tokens.weight", []),  # tied
        ("gpt2", "transformer.wte.weight", ["transformer.wpe.weight"]),
        (
            "bert",
            "classifier.weight",
            [f"bert.embeddings.{x}_embeddings.weight" for x in ("word", "position", "token_type")],
        ),
    ],
)
def test_split_knows_the_last_layer_and_weights_that_are_stored_turned(model_name, head, turned):
    model = MODELS[model_name]()
    groups = {g["name"]: g for g in subspan.param_groups(model, rank=None, dense_lr=0.2, split=True, verbose=False)}
    assert names(groups["head"]) == [head]
    assert names(groups.get("dense (in, out)", {"params": []})) == turned
    blocks = groups["projected (in, out)" if model_name == "gpt2" else "projected"]  # GPT-2's Conv1D
    assert blocks["full_rank"]
    assert len(names(blocks)) == 2 * len(BLOCKS[model_name])
    assert groups["head"]["lr"] == 0.2
    everything = [name for group in groups.values() for name in names(group)]
    assert sorted(everything) == sorted(name for name, _ in model.named_parameters())
    vectors = names(groups["no_decay"])
    optimizer = scale_sgd(groups.values())
    stored = {name for name, p in model.named_parameters() if optimizer.state[p].keys() - {"step"}}
    assert stored == {head, *vectors}
    assert optimizer.state[model.get_parameter(head)].keys() == {"step", "momentum_buffer"}


def test_split_is_for_full_rank():
    with pytest.raises(ValueError, match="split=True is for rank=None"):
        subspan.param_groups(MODELS["llama"](), rank=8, split=True)
    with pytest.raises(ValueError, match=r"no group named 'head'.*split=True"):
        scale_sgd(subspan.param_groups(MODELS["llama"](), rank=None, verbose=False))


def test_the_grouping_is_printed(capsys):
    model = MODELS["llama"]()
    groups = subspan.param_groups(model, rank=8)
    printed = capsys.readouterr().out
    assert printed.strip() == subspan.describe_groups(groups)
    assert "2 x 48 x 32          model.layers.*.mlp.gate_proj.weight" in printed
    count = sum(p.numel() for _, p in groups[0]["params"]) / 1e6
    assert f"projected: 14 tensors, {count:.2f} M parameters, rank 8, proj_type std" in printed
    optimizer = subspan.GaLoreAdamW(groups)  # takes the names out of `params` and fills in defaults
    described = subspan.describe_groups(optimizer.param_groups)
    assert "model.layers.*.mlp.gate_proj.weight" in described
    assert described.count("rank 8") == described.count("scale") == 1  # of the projected group alone


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"targets": ["attention"]}, "pattern 'attention' matches no trainable weight matrix: names look like"),
        ({"targets": ["q_proj", "norm"]}, "pattern 'norm' matches"),  # vectors only
        ({"targets": []}, "must be a list of patterns"),
        ({"targets": "q_proj"}, "must be a list of patterns"),
        ({"targets": ["(q_proj"]}, "is no regular expression"),
        ({"views": {"q_proj": "conv"}}, "of more than two dimensions"),
        ({"views": {"q_proj": "rows"}}, "is unknown: use 'conv' or 'batch'"),
    ],
)
def test_bad_patterns_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        subspan.param_groups(MODELS["llama"](), rank=8, verbose=False, **kwargs)
    assert "\n" not in str(error.value)


def test_a_model_with_nothing_to_project_or_to_train_is_refused():
    with pytest.raises(ValueError, match="found no linear layer"):
        subspan.param_groups(nn.Linear(4, 4), rank=2)
    frozen = MODELS["llama"]().requires_grad_(False)
    frozen.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"that is trained.*requires_grad=True"):
        subspan.param_groups(frozen, rank=2)
    (group,) = subspan.param_groups(frozen, rank=None, verbose=False)
    assert (group["name"], len(group["params"])) == ("dense", 1)
    with pytest.raises(ValueError, match="no trainable parameter"):
        subspan.param_groups(nn.Linear(4, 4).requires_grad_(False), rank=2)
