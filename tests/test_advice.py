"""What to start with."""

from __future__ import annotations

from typing import get_args

import pytest

from subspan.advice import STARTS, advise
from subspan.optim.presets import FULL_RANK
from subspan.training.config import Preset


@pytest.mark.parametrize(
    ("preset", "parameters", "said"),
    [
        ("galore", 1_000_000, "lr 0.01, dense_lr 0.1, update_proj_gap 100: at 1.7 M"),
        ("galore", 130_000_000, "lr 0.01, dense_lr 0.01, update_proj_gap 200: at 58 M"),
        ("galore8bit", 13_000_000_000, "lr 0.005, dense_lr 0.005, update_proj_gap 500: at 6.7 B"),
        ("adamw", 20_000_000, "lr 0.0005, dense_lr 0.01: at 8.4 M"),
        ("galore_lion", 1, "no rates of galore_lion have been measured yet"),
    ],
)
def test_the_nearest_size_is_named(preset, parameters, said):
    assert advise(preset, parameters).startswith(said)


def test_starts_are_of_presets_that_exist_and_name_a_gap_where_something_is_projected():
    assert STARTS.keys() <= {*get_args(Preset)}
    for preset, starts in STARTS.items():
        for start in starts:
            assert (start.update_proj_gap is None) == (preset in FULL_RANK)
            assert start.dense_lr >= start.lr > 0
