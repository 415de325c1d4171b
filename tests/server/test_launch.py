from pathlib import Path

import pytest

from drafters.proposal import Budget
from server.launch import default_budget, slot_capacity
from server.targets.packed_model import PACKED_FILE

NATIVE = Budget(rows=8, top_k=2, depth=6)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_trees_are_small_where_rows_share_their_weights(tmp_path: Path, weights: str) -> None:
    assert default_budget(tmp_path, weights) == NATIVE


@pytest.mark.parametrize("weights", ["fp32", None])
def test_trees_are_wide_where_a_pass_in_torch_costs_its_calls(tmp_path: Path, weights: str | None) -> None:
    assert default_budget(tmp_path, weights) == Budget()


@pytest.mark.parametrize("weights", ["fp32", None])
def test_a_packed_folder_runs_natively_whatever_was_asked_for(tmp_path: Path, weights: str | None) -> None:
    (tmp_path / PACKED_FILE).touch()
    assert default_budget(tmp_path, weights) == NATIVE


def test_a_slot_holds_the_largest_tree_below_the_last_position() -> None:
    assert slot_capacity(100, [Budget(rows=16, top_k=2, depth=5)]) == 116
    assert slot_capacity(100, [Budget(rows=8, top_k=10, depth=7)]) == 170, "the drafter keeps every row it expanded"
    assert slot_capacity(100, [Budget(rows=8, top_k=2, depth=2), Budget(rows=60, top_k=10, depth=7)]) == 170
