from pathlib import Path

import pytest
import torch
import yaml

from subspan.memory import count_memory
from subspan.options import parse_finetune, parse_train
from subspan.training.config import TrainConfig
from subspan.training.models import build_model
from subspan.training.optimizers import build_optimizer

RECIPES = Path(__file__).parents[1] / "recipes"

# Millions of parameters, and of parameters that are projected (for the paper's sizes: its authors' configurations).
EXPECTED = {
    "llama_60m_galore": (58.07, 25.30),
    "llama_130m_galore": (134.11, 84.93),
    "llama_350m_galore": (367.97, 302.38),
    "llama_1b_galore": (1339.08, 1207.91),
    "llama_7b_galore": (6738.42, 6476.01),
    "llama_7b_24gb": (6738.42, 6476.01),
    "cpu_9m": (8.43, 6.32),
    "cpu_2m": (1.71, 1.19),
    "quickstart": (3.34, 1.77),
}

FINETUNE = ["glue_galore"]


def recipe(name: str) -> TrainConfig:
    return parse_train(["train", "--config", str(RECIPES / f"{name}.yaml")])


def test_the_table_below_knows_every_recipe() -> None:
    assert sorted(path.stem for path in RECIPES.iterdir()) == sorted([*EXPECTED, *FINETUNE])


@pytest.mark.parametrize("name", [*EXPECTED, *FINETUNE])
def test_a_recipe_says_what_it_is_and_sets_what_it_says(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    source = path.read_text()
    assert source.startswith("# ")
    config = parse_finetune(["finetune", "--config", str(path)]) if name in FINETUNE else recipe(name)
    for section, values in yaml.safe_load(source).items():
        for key, value in values.items():
            assert getattr(getattr(config, section), key) == value, (section, key)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_builds_its_model_and_optimizer(name: str) -> None:
    config = recipe(name)
    with torch.device("meta"):
        model = build_model(
            config.model.name,
            vocab_size=config.data.vocab_size,
            seq_len=config.data.seq_len,
            dtype=config.model.dtype,
            overrides=config.model.overrides,
        )
        optimizer = build_optimizer(model, config)
    total, projected = EXPECTED[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(total, abs=0.005)
    groups = [group for group in optimizer.param_groups if group.get("rank") == config.optim.rank]
    assert sum(p.numel() for group in groups for p in group["params"]) / 1e6 == pytest.approx(projected, abs=0.005)
    memory = count_memory(model, optimizer)
    assert memory.basis + memory.moments < memory.adam_full_rank


def test_the_paper_recipes_are_the_published_ones() -> None:
    published = {  # rank, lr, T, steps: arXiv 2403.03507, Tables 2, 3, 5, and the authors' scripts
        "llama_60m_galore": (128, 0.01, 200, 10_000),
        "llama_130m_galore": (256, 0.01, 200, 20_000),
        "llama_350m_galore": (256, 0.01, 200, 60_000),
        "llama_1b_galore": (512, 0.01, 200, 100_000),
        "llama_7b_galore": (1024, 0.005, 500, 150_000),
    }
    for name, values in published.items():
        config = recipe(name)
        optim, run = config.optim, config.run
        assert (optim.rank, optim.lr, optim.update_proj_gap, run.steps) == values
        assert (optim.preset, optim.scale, config.data.seq_len, run.batch_size) == ("paper", 0.25, 256, 512)
        assert (run.warmup_steps, run.min_lr_ratio) == (run.steps // 10, 0.1)


def test_the_fine_tuning_recipe_is_the_published_one() -> None:
    config = parse_finetune(["finetune", "--config", str(RECIPES / "glue_galore.yaml")])
    optim, run = config.optim, config.run  # arXiv 2403.03507, Table 7
    assert (optim.preset, optim.lr, optim.rank, optim.scale, optim.update_proj_gap) == ("paper", 3e-5, 4, 4.0, 500)
    assert (run.epochs, run.batch_size, run.warmup_ratio, run.decay, config.data.max_length) == (
        30,
        16,
        0.0,
        "linear",
        512,
    )
