from pathlib import Path

import pytest

from subspan.training.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    load_config,
    save_config,
)
from subspan.training.finetune_config import ClassifierConfig, TaskConfig


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    config = TrainConfig(
        ModelConfig(name="llama-60m", overrides={"hidden_size": 64}),
        DataConfig(files=["a.txt", "b*.txt"], document_separator="\n---\n"),
        OptimConfig(preset="paper", lr=1e-5, betas=[0.9, 0.95], max_grad_norm=1.0),
        RunConfig(steps=7, warmup_steps=0, micro_batch=4),
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("content", ["", "model: 3", "nothing: {}", "optim: {ranks: 3}"])
def test_another_file_is_no_configuration(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a configuration of subspan"):
        load_config(path)


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        (OptimConfig, {"rank": 0}, "optim.rank=0"),
        (OptimConfig, {"rank": "8"}, "optim.rank='8'"),
        (OptimConfig, {"rank": True}, "optim.rank=True"),
        (OptimConfig, {"lr": 0.0}, "optim.lr=0.0"),
        (OptimConfig, {"lr": float("nan")}, "optim.lr=nan"),
        (OptimConfig, {"dense_lr": -1.0}, "optim.dense_lr"),
        (OptimConfig, {"preset": "adam"}, "optim.preset='adam'"),
        (OptimConfig, {"proj_type": "full"}, "optim.proj_type='full'"),
        (OptimConfig, {"proj_type": "sdt"}, "optim.proj_type='sdt'"),
        (OptimConfig, {"projector": "qr"}, "optim.projector='qr'"),
        (OptimConfig, {"update_proj_gap": 0}, "optim.update_proj_gap=0"),
        (OptimConfig, {"max_grad_norm": -1.0}, "optim.max_grad_norm"),
        (OptimConfig, {"betas": [0.9]}, "optim.betas"),
        (OptimConfig, {"betas": [0.9, 1.0]}, "optim.betas"),
        (OptimConfig, {"betas": [0.9, 0.99], "preset": "galore_sgd"}, "optim.betas"),
        (OptimConfig, {"projector": "svd", "preset": "adamw"}, "optim.projector"),
        (OptimConfig, {"basis_dtype": "int4", "preset": "adamw8bit"}, "optim.basis_dtype"),
        (OptimConfig, {"adaptive_refresh": 0.6, "preset": "adamw"}, "optim.adaptive_refresh"),
        (OptimConfig, {"align": True, "preset": "adamw"}, "optim.align=True"),
        (OptimConfig, {"adaptive_refresh": 0.6, "max_update_proj_gap": 300}, "no room to double"),
        (OptimConfig, {"compile": True, "preset": "adafactor"}, "optim.compile=true has no effect"),
        (ModelConfig, {"train_rest": False}, "model.train_rest=False has no effect without model.baseline"),
        (ModelConfig, {"baseline": "factorized", "lora_alpha": 8.0}, "model.lora_alpha=8.0 has no effect"),
        (ModelConfig, {"baseline": "lora", "merge_every": 8}, "model.merge_every=8 has no effect"),
        (ClassifierConfig, {"lora_dropout": 0.1}, "model.lora_dropout=0.1 has no effect"),
        (
            TaskConfig,
            {"folder": "glue", "task": "cola", "valid_split": "test"},
            "data.valid_split='test' has no effect",
        ),
        (
            TrainConfig,
            {"optim": OptimConfig(stochastic_rounding=True)},
            "optim.stochastic_rounding=true is for weights",
        ),
        (
            TrainConfig,
            {"optim": OptimConfig(preset="qgalore", stochastic_rounding=False)},
            "optim.stochastic_rounding=false has no effect",
        ),
        (
            TrainConfig,
            {"model": ModelConfig(baseline="lora"), "optim": OptimConfig(preset="adamw", targets=["q_proj"])},
            "optim.targets=['q_proj']",
        ),
        (OptimConfig, {"basis_dtype": "int8"}, "optim.basis_dtype='int8'"),
        (OptimConfig, {"state_dtype": "int2"}, "optim.state_dtype='int2'"),
        (OptimConfig, {"dense_rule": "adam8"}, "optim.dense_rule='adam8'"),
        (DataConfig, {"files": "a.txt", "dataset": "c4"}, "data.dataset='c4'"),
        (DataConfig, {"valid_files": "a.txt"}, "data.valid_files='a.txt'"),
        (DataConfig, {"format": "chat"}, "data.format='chat'"),
        (DataConfig, {"seq_len": 1}, "data.seq_len=1"),
        (DataConfig, {"vocab_size": 100}, "data.vocab_size=100"),
        (DataConfig, {"valid_fraction": 1.0}, "data.valid_fraction=1.0"),
        (DataConfig, {"dataset": "c4", "num_workers": 1}, "data.num_workers=1"),
        (ModelConfig, {"dtype": "float16"}, "model.dtype='float16'"),
        (ModelConfig, {"pretrained": True, "overrides": {"hidden_size": 8}}, "model.overrides"),
        (RunConfig, {"steps": 0}, "run.steps=0"),
        (RunConfig, {"steps": 10, "warmup_steps": 11}, "run.warmup_steps=11"),
        (RunConfig, {"batch_size": 6, "micro_batch": 4}, "run.micro_batch=4"),
        (RunConfig, {"min_lr_ratio": 1.5}, "run.min_lr_ratio=1.5"),
        (RunConfig, {"out": ""}, "run.out"),
        (TrainConfig, {"run": RunConfig(autocast=True), "model": ModelConfig(dtype="bfloat16")}, "run.autocast"),
        (TrainConfig, {"data": DataConfig(dataset="c4")}, "run.eval_sequences"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(section: type, values: dict, named: str) -> None:
    with pytest.raises(ValueError) as error:
        section(**values)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
