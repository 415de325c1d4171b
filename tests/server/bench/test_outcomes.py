"""Drafts judged by the text that came: levels, acceptance per depth, calibration by hand."""

import math

import pytest

from drafters.drafter import DraftState
from drafters.proposal import Budget, Proposal, chain
from server.bench.outcomes import Draft, Level, RecordingDrafter, acceptance_per_depth, calibration, judge

# root -> 5 (0.6), 7 (0.3); 5 -> 8 (0.5), 9 (0.25)
TREE = Proposal((5, 7, 8, 9), (None, None, 0, 0), tuple(map(math.log, (0.6, 0.3, 0.5, 0.25))))


def rounded(levels: list[Level]) -> list[list[tuple[float, bool]]]:
    return [[(round(draft.probability, 3), draft.accepted) for draft in level.drafts] for level in levels]


def test_levels_follow_the_text_into_the_tree() -> None:
    assert rounded(judge(TREE, [5, 9, 4, 4])) == [[(0.6, True), (0.3, False)], [(0.5, False), (0.25, True)], []]
    assert rounded(judge(TREE, [7, 8])) == [[(0.6, False), (0.3, True)], []]
    assert rounded(judge(TREE, [1, 8])) == [[(0.6, False), (0.3, False)]]


def test_nothing_behind_the_end_of_the_text_is_judged() -> None:
    assert [level.depth for level in judge(TREE, [5])] == [1]
    assert judge(TREE, []) == []


def test_one_of_two_equal_siblings_is_accepted() -> None:
    twins = Proposal((5, 5), (None, None), (-1.0, -1.0))
    assert [draft.accepted for draft in judge(twins, [5])[0].drafts] == [True, False]


def test_log_probabilities_that_are_none_count_as_impossible() -> None:
    assert judge(chain([3], [math.nan]), [3])[0].drafts == (Draft(0.0, True),)
    assert judge(chain([3], [0.5]), [3])[0].drafts == (Draft(1.0, True),)


def test_acceptance_per_depth_is_given_the_depth_above() -> None:
    levels = [*judge(TREE, [5, 9, 4]), *judge(TREE, [7, 8]), *judge(TREE, [1, 8]), *judge(TREE, [5, 1])]
    assert acceptance_per_depth(levels) == [
        {"depth": 1, "rounds": 4, "drafted": 4, "accepted": 3, "share": 0.75},
        {"depth": 2, "rounds": 3, "drafted": 2, "accepted": 1, "share": 0.3333},
    ]


def test_the_shares_running_products_give_the_acceptance_length() -> None:
    texts = [[5, 9, 4], [7, 8], [1, 8], [5, 1]]
    levels = [level for text in texts for level in judge(TREE, text)]
    product, expected = 1.0, 1.0
    for row in acceptance_per_depth(levels):
        product *= row["share"]
        expected += product
    assert expected == pytest.approx(1 + (2 + 1 + 0 + 1) / 4, abs=1e-3)


def test_calibration_error_by_hand() -> None:
    drafts = [Draft(0.95, True), Draft(0.91, False), Draft(0.15, False), Draft(0.11, False), Draft(1.0, True)]
    report = calibration([Level(1, tuple(drafts))], num_bins=10)
    assert report is not None
    # [0.1, 0.2): mean 0.13, accepted 0; [0.9, 1]: mean 2.86 / 3, accepted 2 / 3
    assert report["ece"] == pytest.approx(2 / 5 * 0.13 + 3 / 5 * (2.86 / 3 - 2 / 3), abs=1e-4)
    assert [(one["from"], one["to"], one["drafts"]) for one in report["bins"]] == [(0.1, 0.2, 2), (0.9, 1.0, 3)]
    assert report["drafts"] == 5


def test_certain_and_missing_drafts_have_no_calibration() -> None:
    assert calibration(judge(chain([1, 2]), [1, 2])) is None
    assert calibration([]) is None


class Chains:
    name = "chains"
    feature_layers: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.released: list[int] = []

    def propose(self, states: list[DraftState], budget: Budget) -> list[Proposal]:
        return [chain([4, 5]) for _ in states]

    def release(self, slot: int) -> None:
        self.released.append(slot)


def test_recorded_trees_are_judged_where_they_hung_and_only_once() -> None:
    drafter = RecordingDrafter(Chains())  # type: ignore[arg-type]
    for prefix in ([1, 2], [1, 2, 4, 9]):
        assert drafter.propose([DraftState(0, prefix)], Budget()) == [chain([4, 5])]
    drafter.release(0)
    assert drafter.drafter.released == [0]  # type: ignore[attr-defined]
    levels = drafter.take_levels([1, 2, 4, 9, 4])
    assert [(level.depth, level.is_accepted) for level in levels] == [(1, True), (2, False), (1, True)]
    assert drafter.take_levels([1, 2, 4, 9, 4]) == []
