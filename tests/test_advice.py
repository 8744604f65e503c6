"""What to start with."""

from __future__ import annotations

from typing import get_args

import pytest

from subspan.advice import PRETRAINED, STARTS, advise
from subspan.optim.presets import FULL_RANK
from subspan.training.config import Baseline, Preset


@pytest.mark.parametrize(
    ("method", "parameters", "pretrained", "said"),
    [
        ("galore", 1_000_000, False, "lr 0.01, dense_lr 0.1, update_proj_gap 100: at 1.7 M"),
        ("galore", 130_000_000, False, "lr 0.01, dense_lr 0.01, update_proj_gap 200: at 58 M"),
        ("galore8bit", 13_000_000_000, False, "lr 0.005, dense_lr 0.005, update_proj_gap 500: at 6.7 B"),
        ("adamw", 20_000_000, False, "lr 0.0005, dense_lr 0.01: at 8.4 M"),
        ("galore_lion", 1, False, "no rates of galore_lion have been measured yet: "),
        ("lora", 20_000_000, False, "lr 0.001, dense_lr 0.03: at 8.4 M"),
        ("lora", 20_000_000, True, "lr 0.003: at 134.5 M parameters (adapters alone"),
        ("adamw", 20_000_000, True, "lr 0.0001, dense_lr 0.0001: at 134.5 M"),
        ("frugal", 1, True, "no rates of frugal have been measured yet for a pretrained model: "),
    ],
)
def test_the_nearest_size_is_named(method, parameters, pretrained, said):
    assert advise(method, parameters, pretrained).startswith(said)


def test_starts_are_of_presets_that_exist_and_name_a_gap_where_something_is_projected():
    assert STARTS.keys() | PRETRAINED.keys() <= {*get_args(Preset), *get_args(Baseline)}
    for method, starts in STARTS.items():
        for start in starts:
            assert (start.update_proj_gap is None) == (method in FULL_RANK or method in get_args(Baseline))
            assert start.dense_lr >= start.lr > 0
