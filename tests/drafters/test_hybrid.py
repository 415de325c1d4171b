"""The merged tree: shared prefixes, the row budget, closure under ancestors, and what a chain is worth."""

import math
import random

import pytest
import torch

from doubles import OracleDrafter
from drafters.drafter import DraftState, Observation
from drafters.hybrid import ChainRecord, HybridDrafter, best_nodes, merge
from drafters.ngram import NGramDrafter
from drafters.proposal import Budget, Proposal, chain

TREE = Proposal((1, 2, 3, 4), (None, None, 0, 2), (-0.1, -2.0, -0.2, -0.3))


def token_paths(proposal: Proposal) -> set[tuple[int, ...]]:
    rows = range(1, proposal.num_rows)
    return {tuple(proposal.token_ids[i - 1] for i in proposal.path(row)[1:]) for row in rows}


def random_tree(chooser: random.Random, size: int) -> Proposal:
    nodes: list[tuple[int | None, int]] = []
    for i in range(size):
        parent = chooser.choice([None, *range(i)])
        taken = {token for above, token in nodes if above == parent}
        nodes.append((parent, chooser.choice([t for t in range(20) if t not in taken])))
    log_probs = tuple(chooser.choice([0.0, -0.5, -1.0, -math.inf, math.nan]) for _ in nodes)
    return Proposal(tuple(token for _, token in nodes), tuple(parent for parent, _ in nodes), log_probs)


def test_a_shared_prefix_is_one_path_with_the_better_value() -> None:
    merged = merge(TREE, [1, 3, 9], -0.15, rows=16)
    assert merged.token_ids == (1, 2, 3, 4, 9)
    assert merged.parents == (None, None, 0, 2, 2)
    assert merged.log_probs == (-0.1, -2.0, -0.15, -0.3, -0.15)


def test_either_part_may_be_empty() -> None:
    assert merge(TREE, [], -0.1, 16) == TREE
    assert merge(Proposal(), [5, 6], -0.1, 16) == chain([5, 6], [-0.1, -0.1])
    assert merge(Proposal(), [5, 6, 7], -0.1, 3) == chain([5, 6], [-0.1, -0.1])


def test_a_good_chain_displaces_the_weakest_nodes_and_a_bad_one_nothing() -> None:
    assert token_paths(merge(TREE, [7, 8], -0.05, rows=5)) == {(1,), (1, 3), (7,), (7, 8)}
    assert merge(TREE, [7, 8], -5.0, rows=5) == TREE


@pytest.mark.parametrize("seed", range(30))
def test_merged_trees_are_closed_bounded_and_hold_no_node_twice(seed: int) -> None:
    chooser = random.Random(seed)
    tree, rows = random_tree(chooser, chooser.randrange(0, 12)), chooser.randrange(1, 14)
    chain_ids = [chooser.randrange(4) for _ in range(chooser.randrange(0, 7))]
    merged = merge(tree, chain_ids, -0.5, rows)  # would raise if a parent were missing
    wanted = token_paths(tree) | {tuple(chain_ids[:n]) for n in range(1, len(chain_ids) + 1)}
    assert len(merged) == min(rows - 1, len(wanted)) == len(token_paths(merged))
    assert token_paths(merged) <= wanted


def test_equal_values_keep_the_shallower_node() -> None:
    tree = Proposal((1, 2, 3), (None, 0, None), (0.0, 0.0, 0.0))
    assert best_nodes(tree, 3) == Proposal((1, 3), (None, None), (0.0, 0.0))


def test_chains_are_worth_what_they_were() -> None:
    record = ChainRecord()
    assert record.log_prob == pytest.approx(math.log(0.5))
    record.latest = (1, 2, 3, 4)
    record.settle([1, 2, 9])  # two right, one wrong, the fourth was not tried
    assert (record.accepted, record.tried) == (4.0, 7.0)
    record.settle([5, 6])  # nothing was proposed
    record.latest = (1, 2)
    record.settle([1, 2, 3])
    assert (record.accepted, record.tried) == (6.0, 9.0)


def test_requests_are_judged_apart_and_forgotten() -> None:
    drafter = HybridDrafter(OracleDrafter([], 67), NGramDrafter())
    texts = {0: [1, 2, 3, 1, 2], 1: [4, 5, 6, 4, 5]}
    states = [DraftState(slot, text) for slot, text in texts.items()]
    for proposal, follower in zip(drafter.propose(states, Budget(40, 2, 2)), ((3, 1, 2), (6, 4, 5)), strict=True):
        assert follower in token_paths(proposal)
    drafter.observe([Observation(0, torch.zeros(3, 1), [3, 1, 2]), Observation(1, torch.zeros(1, 1), [9])])
    assert drafter.records[0].log_prob > math.log(0.5) > drafter.records[1].log_prob
    drafter.release(0)
    drafter.fork(1, 2, 3)
    assert set(drafter.records) == {1}
