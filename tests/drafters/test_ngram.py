"""Prompt lookup against a plain scan of the past."""

import random

import pytest

from drafters.drafter import DraftState
from drafters.ngram import NGramDrafter
from drafters.proposal import Budget, Proposal, chain


def scan(token_ids: list[int], count: int, longest: int = 3) -> Proposal:
    """The slow twin: compare the suffix with every earlier place, latest first."""
    for length in range(longest, 0, -1):
        suffix = token_ids[-length:]
        for end in range(len(token_ids) - 1, length - 1, -1):
            if token_ids[end - length : end] == suffix:
                return chain(token_ids[end : end + count])
    return Proposal()


def test_it_continues_the_longest_and_latest_match() -> None:
    drafter = NGramDrafter()
    token_ids = [1, 2, 3, 7, 8, 9, 5, 3, 4, 1, 2, 3]
    assert drafter.propose([DraftState(0, token_ids)], Budget(16, 1, 3)) == [chain([7, 8, 9, 5])]
    assert drafter.propose([DraftState(1, [6, 3, 1, 3, 2, 3])], Budget(16, 1, 1)) == [chain([2, 3])]


@pytest.mark.parametrize("seed", range(5))
def test_a_growing_request_equals_the_scan(seed: int) -> None:
    chooser = random.Random(seed)
    drafter, token_ids = NGramDrafter(), [0]
    for _ in range(60):
        (proposal,) = drafter.propose([DraftState(0, token_ids)], Budget(6, 4, 9))
        assert proposal == scan(token_ids, 5)
        token_ids += [chooser.randrange(4) for _ in range(chooser.randrange(1, 4))]


def test_nothing_known_and_no_room_give_an_empty_proposal() -> None:
    drafter = NGramDrafter()
    for token_ids in ([], [4], [1, 2, 3]):
        assert drafter.propose([DraftState(0, token_ids)], Budget()) == [Proposal()]
        drafter.release(0)
    assert drafter.propose([DraftState(0, [1, 1, 1])], Budget(rows=1)) == [Proposal()]


def test_a_slot_used_again_knows_nothing_of_its_past() -> None:
    drafter = NGramDrafter()
    drafter.propose([DraftState(0, [1, 2, 1, 2, 1])], Budget())
    drafter.release(0)
    assert drafter.propose([DraftState(0, [5, 6, 1])], Budget()) == [Proposal()]


@pytest.mark.parametrize(("longest", "shortest"), [(3, 0), (1, 2)])
def test_bad_lengths(longest: int, shortest: int) -> None:
    with pytest.raises(ValueError, match="1 <= shortest <= longest"):
        NGramDrafter(longest, shortest)
