import pytest

from drafters.drafter import DrafterError, DraftState
from drafters.proposal import Budget
from server.bench.simulated import SimulatedDrafter, acceptance_probability

TEXT = tuple(i % 50 for i in range(4000))


@pytest.mark.parametrize("length", [1.0, 1.7, 3.0, 6.9, 7.0])
def test_probability_gives_the_length(length: float) -> None:
    p = acceptance_probability(length, 6)
    assert sum(p**i for i in range(7)) == pytest.approx(length)


@pytest.mark.parametrize("length", [0.5, 7.1])
def test_impossible_length_is_refused(length: float) -> None:
    with pytest.raises(DrafterError, match="1 to 7"):
        SimulatedDrafter([TEXT], length, Budget(16, 4, 5), 64)


@pytest.mark.parametrize("length", [1.0, 2.5, 4.0])
def test_right_drafts_average_to_the_length_and_trees_are_full(length: float) -> None:
    budget = Budget(rows=16, top_k=4, depth=5)
    drafter = SimulatedDrafter([TEXT], length, budget, vocab_size=64)
    place, rounds = 10, 0
    while place < len(TEXT) - 10:
        (tree,) = drafter.propose([DraftState(0, TEXT[:place])], budget)
        assert tree.num_rows == budget.rows
        row, num_right = 0, 0
        while right := [child for child in tree.children[row] if tree.token_ids[child - 1] == TEXT[place + num_right]]:
            (row,) = right
            num_right += 1
        place += num_right + 1
        rounds += 1
    assert (place - 10) / rounds == pytest.approx(length, rel=0.1)


def test_unknown_text_is_not_drafted_for() -> None:
    drafter = SimulatedDrafter([(1, 2, 3)], 2.0, Budget(), 64)
    assert len(drafter.propose([DraftState(0, [9])], Budget())[0]) == 0
    assert len(drafter.propose([DraftState(0, [1, 2, 3])], Budget())[0]) == 0
