"""What became of drafted tokens: how deep the target followed, and whether the drafter's probabilities mean anything.

A tree is judged by the text that was committed behind it. Decoding is lossless, so that text is the target's own choice
at every position, greedy or sampled with a seed, and a node is accepted exactly when its path is how the text goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from drafters.drafter import Drafter, DraftState, Observation
from drafters.proposal import Budget, Proposal
from server.engine.acceptance import child_with

NUM_BINS = 10


@dataclass(frozen=True)
class Draft:
    """One drafted token whose parent was accepted: the drafter's probability for it, and whether it was accepted."""

    probability: float
    accepted: bool


@dataclass(frozen=True)
class Level:
    """A position the target came to inside a tree, ``depth`` tokens below the root, with the tokens drafted for it.

    A node that was accepted but has no children leads to a level without drafts.
    """

    depth: int
    drafts: tuple[Draft, ...]

    @property
    def is_accepted(self) -> bool:
        """Whether one of the drafts was the target's token."""
        return any(draft.accepted for draft in self.drafts)


def judge(proposal: Proposal, continuation: Sequence[int]) -> list[Level]:
    """The levels of a tree along the text that followed its root, as far as both go."""
    levels: list[Level] = []
    row: int | None = 0
    for depth, token_id in enumerate(continuation, start=1):
        if row is None:
            break
        accepted = child_with(proposal, row, token_id)
        drafts = [Draft(probability(proposal, child), child == accepted) for child in proposal.children[row]]
        levels.append(Level(depth, tuple(drafts)))
        row = accepted
    return levels


def probability(proposal: Proposal, row: int) -> float:
    """The drafter's probability for a row's token given its parent; what is not a number counts as 0."""
    log_prob = proposal.log_probs[row - 1]
    return 0.0 if math.isnan(log_prob) else math.exp(min(log_prob, 0.0))


class RecordingDrafter:
    """A drafter that keeps what it proposed, for one request at a time."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.name = drafter.name
        self.feature_layers = drafter.feature_layers
        self.proposed: list[tuple[int, Proposal]] = []  # committed tokens, the root included, and the tree below them

    def take_levels(self, text: Sequence[int]) -> list[Level]:
        """Judge everything proposed since the last call by the whole text, prompt included, that came of it."""
        levels = [level for length, tree in self.proposed for level in judge(tree, text[length:])]
        self.proposed.clear()
        return levels

    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        """The drafter's trees, noted down."""
        trees = self.drafter.propose(states, budget)
        self.proposed += [(len(state.token_ids), tree) for state, tree in zip(states, trees, strict=True)]
        return trees

    def observe(self, batch: Sequence[Observation]) -> None:
        """The drafter's affair."""
        self.drafter.observe(batch)

    def release(self, slot: int) -> None:
        """The drafter's affair."""
        self.drafter.release(slot)


def acceptance_per_depth(levels: Sequence[Level]) -> list[dict[str, Any]]:
    """For each depth that was ever drafted: ``rounds`` in which the target came there, because the draft above was
    accepted; ``drafted``, how many of them had a draft for it; ``accepted``; ``share``, accepted / rounds.

    The shares' running products sum up to the acceptance length, less the target's own token.
    """
    rows = []
    for depth in sorted({level.depth for level in levels if level.drafts}):
        here = [level for level in levels if level.depth == depth]
        num_accepted = sum(level.is_accepted for level in here)
        rows.append(
            {
                "depth": depth,
                "rounds": len(here),
                "drafted": sum(bool(level.drafts) for level in here),
                "accepted": num_accepted,
                "share": round(num_accepted / len(here), 4),
            }
        )
    return rows


def calibration(levels: Sequence[Level], num_bins: int = NUM_BINS) -> dict[str, Any] | None:
    """How far the drafter's probabilities are from the share of drafts that was accepted.

    Expected calibration error (Guo et al. 2017, arXiv 1706.04599): sum over bins of (drafts in the bin / drafts) *
    |accepted share - mean probability|, over ``num_bins`` bins of equal width. Only drafts whose parent was accepted
    count, all siblings alike; tokens the tree had no room for are not seen. None for a drafter that has no
    probabilities (a lookup calls everything certain) or where nothing was drafted.
    """
    drafts = [draft for level in levels for draft in level.drafts]
    if all(draft.probability == 1 for draft in drafts):
        return None
    bins: list[dict[str, Any]] = []
    error = 0.0
    for number in range(num_bins):
        inside = [draft for draft in drafts if min(int(draft.probability * num_bins), num_bins - 1) == number]
        if not inside:
            continue
        mean = sum(draft.probability for draft in inside) / len(inside)
        share = sum(draft.accepted for draft in inside) / len(inside)
        error += len(inside) / len(drafts) * abs(share - mean)
        bins.append(
            {
                "from": number / num_bins,
                "to": (number + 1) / num_bins,
                "drafts": len(inside),
                "mean_probability": round(mean, 4),
                "accepted_share": round(share, 4),
            }
        )
    return {"ece": round(error, 4), "num_bins": num_bins, "drafts": len(drafts), "bins": bins}
