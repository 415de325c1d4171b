"""Two drafters in one tree: the n-gram chain joins the tree of a trained drafter or a small language model.

Copied text (code edits, summaries) is what a lookup guesses best and a trained drafter pays most levels for; elsewhere
the lookup is worth little. So the chain's nodes compete for the rows with the tree's own, at the rate at which the
request's chains have been accepted so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from drafters.drafter import Drafter, DraftState, Observation
from drafters.ngram import NGramDrafter
from drafters.proposal import Budget, Proposal

PRIOR_ACCEPTED, PRIOR_TRIED = 2.0, 4.0


@dataclass
class ChainRecord:
    """How one request's chains fared: ``latest`` is the one proposed last, until its outcome is seen."""

    accepted: float = PRIOR_ACCEPTED
    tried: float = PRIOR_TRIED
    latest: tuple[int, ...] = ()

    @property
    def log_prob(self) -> float:
        """Log of the share of tried chain tokens that were accepted; below 0."""
        return math.log(self.accepted / self.tried)

    def settle(self, next_ids: Sequence[int]) -> None:
        """Count the latest chain against the tokens that came instead; what lies behind a miss was not tried."""
        num_seen = min(len(self.latest), len(next_ids))
        num_right = next((i for i in range(num_seen) if self.latest[i] != next_ids[i]), num_seen)
        self.accepted += num_right
        self.tried += num_right + (num_right < num_seen)
        self.latest = ()


class HybridDrafter:
    """``tree_drafter``'s trees with the n-gram chain merged in; ``Budget.rows`` holds for both together.

    A node may have one child more than ``top_k``. Source: the engineering of llama.cpp's and vLLM's lookup drafters;
    merging by an acceptance rate that is learnt for each request is ours.
    """

    def __init__(self, tree_drafter: Drafter, lookup: NGramDrafter) -> None:
        self.tree_drafter = tree_drafter
        self.lookup = lookup
        self.name = f"hybrid ({tree_drafter.name} + {lookup.name})"
        self.feature_layers = tree_drafter.feature_layers
        self.records: dict[int, ChainRecord] = {}

    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        """One merged tree for each state."""
        trees = self.tree_drafter.propose(states, budget)
        chains = self.lookup.propose(states, budget)
        merged: list[Proposal] = []
        for state, tree, copied in zip(states, trees, chains, strict=True):
            record = self.records.setdefault(state.slot, ChainRecord())
            record.latest = copied.token_ids
            merged.append(merge(tree, copied.token_ids, record.log_prob, budget.rows))
        return merged

    def observe(self, batch: Sequence[Observation]) -> None:
        """Show both what was committed, and see which chains were right."""
        for observation in batch:
            if observation.slot in self.records:
                self.records[observation.slot].settle(observation.next_ids)
        self.tree_drafter.observe(batch)
        self.lookup.observe(batch)

    def fork(self, source: int, slot: int, length: int) -> None:
        """Fork both; the new request's chains are judged anew."""
        self.records.pop(slot, None)
        self.tree_drafter.fork(source, slot, length)
        self.lookup.fork(source, slot, length)

    def release(self, slot: int) -> None:
        """Forget a request."""
        self.records.pop(slot, None)
        self.tree_drafter.release(slot)
        self.lookup.release(slot)


def merge(tree: Proposal, chain_ids: Sequence[int], log_prob: float, rows: int) -> Proposal:
    """``tree`` with a chain from the root, each token of it worth ``log_prob``, cut to the best ``rows - 1`` nodes.

    Nodes both have are one node with the better of the two values. Values only fall along a path and the shallower
    node wins among equals, so the nodes kept are closed under ancestors.
    """
    token_ids, parents = list(tree.token_ids), list(tree.parents)
    log_probs = [-math.inf if math.isnan(value) else min(value, 0.0) for value in tree.log_probs]
    places = {(parent, token_id): node for node, (parent, token_id) in enumerate(zip(parents, token_ids, strict=True))}
    parent: int | None = None
    for token_id in chain_ids:
        node = places.get((parent, token_id))
        if node is None:
            node = len(token_ids)
            token_ids.append(token_id)
            parents.append(parent)
            log_probs.append(log_prob)
        log_probs[node] = max(log_probs[node], log_prob)
        parent = node
    whole = Proposal(tuple(token_ids), tuple(parents), tuple(log_probs))
    return best_nodes(whole, rows)


def best_nodes(tree: Proposal, rows: int) -> Proposal:
    """The ``rows - 1`` nodes of a tree with the largest cumulative log-probability; no log-probability above 0."""
    if tree.num_rows <= rows:
        return tree
    scores: list[float] = []
    for parent, log_prob in zip(tree.parents, tree.log_probs, strict=True):
        scores.append(log_prob if parent is None else scores[parent] + log_prob)
    ranked = sorted(range(len(tree)), key=lambda node: (-scores[node], tree.depths[node], node))
    kept = sorted(ranked[: rows - 1])
    place: dict[int | None, int | None] = {node: i for i, node in enumerate(kept)}
    place[None] = None
    return Proposal(
        tuple(tree.token_ids[node] for node in kept),
        tuple(place[tree.parents[node]] for node in kept),
        tuple(tree.log_probs[node] for node in kept),
    )
