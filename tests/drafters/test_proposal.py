"""The token tree: derived shapes, best-first selection against brute force, ties, bad trees."""

import itertools
import math
import random

import pytest

from drafters.proposal import Budget, Proposal, ProposalError, TreeGrowth, chain


def random_proposal(num_nodes: int, seed: int) -> Proposal:
    chooser = random.Random(seed)
    parents = tuple(chooser.choice([None, *range(node)]) for node in range(num_nodes))
    return Proposal(tuple(range(num_nodes)), parents, (-1.0,) * num_nodes)


def grow(budget: Budget, chooser: random.Random, values: tuple[float, ...] | None = None) -> TreeGrowth:
    """A tree fed with random log-probabilities, from ``values`` where ties are wanted."""
    growth = TreeGrowth(budget)
    beam: list[int | None] = [None]
    for _ in range(budget.depth + 1):
        children = []
        for node in beam:
            log_probs = [chooser.choice(values) if values else -chooser.expovariate(1.0) for _ in range(budget.top_k)]
            children.append((node, list(range(budget.top_k)), sorted(log_probs, reverse=True)))
        growth.add(children)
        beam = list(growth.beam())
        if not beam:
            break
    return growth


def best_closed_sum(growth: TreeGrowth, count: int) -> float:
    """The highest sum of scores over all ancestor-closed sets of ``count`` nodes."""
    nodes = range(len(growth.scores))
    best = -math.inf
    for chosen in itertools.combinations(nodes, count):
        inside = set(chosen)
        if all(growth.parents[node] is None or growth.parents[node] in inside for node in chosen):
            best = max(best, sum(growth.scores[node] for node in chosen))
    return best


def ranked(growth: TreeGrowth) -> list[int]:
    """All nodes ever added, best first."""
    return sorted(range(len(growth.scores)), key=lambda node: (-growth.scores[node], growth.depths[node], node))


@pytest.mark.parametrize("seed", range(8))
def test_depths_paths_and_parts_of_a_tree(seed: int) -> None:
    proposal = random_proposal(9, seed)
    assert proposal.num_rows == 10
    for row in range(1, 10):
        path = proposal.path(row)
        assert len(path) == proposal.depths[row - 1] + 1
        assert all(later in proposal.children[earlier] for earlier, later in itertools.pairwise(path))
    for depth in range(4):
        part = proposal.cut(depth)
        assert sorted(part.depths) == sorted(own for own in proposal.depths if own <= depth)
        assert {tokens_on(part, row) for row in range(part.num_rows)} == {
            tokens_on(proposal, row) for row in range(10) if len(proposal.path(row)) <= depth + 1
        }
    assert proposal.cut(9) is proposal
    with pytest.raises(ProposalError, match="without its parent"):
        chain([5, 6, 7]).select([0, 2])


def tokens_on(proposal: Proposal, row: int) -> tuple[int, ...]:
    return tuple(proposal.token_ids[i - 1] for i in proposal.path(row)[1:])


def test_a_chain_and_an_empty_proposal() -> None:
    proposal = chain([5, 6, 7])
    assert proposal.depths == (1, 2, 3)
    assert proposal.path(3) == [0, 1, 2, 3]
    assert Proposal().num_rows == 1
    assert Proposal().children == ((),)


@pytest.mark.parametrize("parents", [(0,), (None, 2), (None, -1), (1, None)])
def test_a_parent_must_come_first(parents: tuple[int | None, ...]) -> None:
    with pytest.raises(ProposalError, match="has parent"):
        Proposal(tuple(range(len(parents))), parents, (0.0,) * len(parents))


def test_lengths_must_agree() -> None:
    with pytest.raises(ProposalError, match="2 tokens, 1 parents and 2"):
        Proposal((1, 2), (None,), (0.0, 0.0))


@pytest.mark.parametrize(("rows", "top_k", "depth"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_bad_budgets(rows: int, top_k: int, depth: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        Budget(rows, top_k, depth)


@pytest.mark.parametrize(("top_k", "depth", "size"), [(10, 7, 710), (10, 4, 410), (1, 0, 1), (3, 0, 3)])
def test_pool_size_when_nothing_is_pruned(top_k: int, depth: int, size: int) -> None:
    growth = grow(Budget(rows=1000, top_k=top_k, depth=depth), random.Random(0))
    assert len(growth.scores) == size == top_k + depth * top_k**2


@pytest.mark.parametrize("values", [None, (0.0, -0.5, -1.0), (0.0,)], ids=["random", "ties", "all zero"])
@pytest.mark.parametrize("seed", range(4))
def test_the_kept_set_is_the_best_closed_one(seed: int, values: tuple[float, ...] | None) -> None:
    budget = Budget(rows=6, top_k=2, depth=2)
    growth = grow(Budget(rows=100, top_k=2, depth=2), random.Random(seed), values)
    pruned = grow(budget, random.Random(seed), values)
    kept = ranked(growth)[:5]
    assert sum(growth.scores[node] for node in kept) == pytest.approx(best_closed_sum(growth, 5))
    assert sum(pruned.scores[node] for node in pruned.kept()) == pytest.approx(best_closed_sum(pruned, 5))


@pytest.mark.parametrize("values", [None, (0.0, -0.5), (0.0,), (math.nan, 0.0), (1.0, -math.inf)])
@pytest.mark.parametrize("budget", [Budget(16, 4, 5), Budget(7, 10, 4), Budget(60, 3, 6), Budget(1, 2, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_trees_are_closed_bounded_and_equal_the_plain_ranking(
    seed: int, budget: Budget, values: tuple[float, ...] | None
) -> None:
    growth = grow(budget, random.Random(seed), values)
    assert growth.kept() == sorted(ranked(growth)[: budget.rows - 1])
    proposal = growth.proposal()  # would raise if a parent were missing
    assert proposal.num_rows <= budget.rows
    assert max(proposal.depths, default=0) <= budget.depth + 1
    for node in growth.kept():
        parent = growth.parents[node]
        assert parent is None or (parent in growth.kept() and growth.scores[node] <= growth.scores[parent])


def test_on_equal_scores_the_shallower_node_wins() -> None:
    growth = TreeGrowth(Budget(rows=4, top_k=3, depth=1))
    growth.add([(None, [1, 2, 3], [0.0, -1.0, -1.0])])
    assert growth.beam() == [0, 1, 2]
    growth.add([(0, [4, 5], [-1.0, -1.0])])
    assert growth.kept() == [0, 1, 2]


def test_a_node_that_cannot_be_kept_is_not_expanded() -> None:
    growth = TreeGrowth(Budget(rows=3, top_k=3, depth=2))
    growth.add([(None, [1, 2, 3], [-0.1, -2.0, -3.0])])
    assert growth.beam() == [0, 1]
    growth.add([(0, [4, 5], [-0.1, -0.2]), (1, [6], [-0.1])])
    assert growth.beam() == [3]
    assert growth.proposal() == Proposal((1, 4), (None, 0), (-0.1, -0.1))
