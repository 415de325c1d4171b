"""Tests of the samples a drafter learns from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from drafters.train.feature_source import DataOptions, data_samples
from kernels.training import RecipeError


@pytest.fixture
def packed_file(tmp_path: Path) -> Path:
    np.save(tmp_path / "tokens.npy", np.arange(400, dtype=np.uint16))
    return tmp_path / "tokens.npy"


def starts(options: DataOptions) -> tuple[list[int], int]:
    train, held_out = data_samples(options, None, 400)
    count = len(train)  # type: ignore[arg-type]
    return [int(train[index]["input_ids"][0]) for index in range(count)], len(held_out or ())  # type: ignore[arg-type]


def test_max_samples_draws_different_windows_with_the_seed_and_leaves_the_held_out_ones(packed_file: Path) -> None:
    options = DataOptions("t", tokens=str(packed_file), window_length=10, held_out_share=0.1)
    everything, held_out = starts(options)
    assert len(everything) == 36 and held_out == 4
    chosen = [
        starts(DataOptions("t", str(packed_file), window_length=10, held_out_share=0.1, max_samples=12, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0][0])) == 12 and set(chosen[0][0]) <= set(everything) and chosen[0][1] == 4


def test_more_samples_than_there_are_means_all(packed_file: Path) -> None:
    options = DataOptions("t", tokens=str(packed_file), window_length=10, max_samples=1000)
    assert len(starts(options)[0]) == 39


def test_no_samples_is_refused(packed_file: Path) -> None:
    with pytest.raises(RecipeError, match="max_samples is 0"):
        DataOptions("t", tokens=str(packed_file), max_samples=0)
