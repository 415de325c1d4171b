"""How often drafts are accepted: learnt while serving, for each stage of drafting and each depth. Pure.

A drafter's own probabilities are a hint, not a promise: trained on other text or served at another temperature they are
too high or too low. So drafts are sorted into cells, by stage, depth and the drafter's probability (for the lookup: by
the length of the match), and a cell's share of accepted drafts is what the next one in it is worth. What was learnt
fades, so that what is not tried any more is tried again in time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

DRAFTER, LOOKUP, FORCED = "drafter", "lookup", "forced"
PRIOR_WEIGHT = 4.0
FADING = 0.997  # a round; half of what was learnt is forgotten after 230 rounds
HOPE = 0.8  # the chance that a level is followed before anything is known: what might pay is tried
REQUEST_WEIGHT = 2.0
SURE = 0.99
PROBABILITY_EDGES = (0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
DEEPEST_CELL = 5
FORCED_PRIOR = 0.9
LOOKUP_PRIORS = (0.25, 0.4, 0.6)  # for matches of one, two, and three or more tokens


class Cell(NamedTuple):
    """Where a draft belongs: its stage, its depth (all deep ones together), and its grade within the stage."""

    stage: str
    depth: int
    grade: int


def drafter_cell(depth: int, log_prob: float) -> tuple[Cell, float]:
    """The cell of a drafter's node and what it is worth before anything was learnt: its own probability."""
    prob = 0.0 if math.isnan(log_prob) else math.exp(min(log_prob, 0.0))
    grade = sum(prob > edge for edge in PROBABILITY_EDGES)
    return Cell(DRAFTER, min(depth, DEEPEST_CELL), grade), min(prob, SURE)


def lookup_cell(depth: int, match_length: int) -> tuple[Cell, float]:
    """The cell of a copied token behind a match of so many tokens."""
    grade = min(match_length, len(LOOKUP_PRIORS))
    return Cell(LOOKUP, min(depth, DEEPEST_CELL), grade), LOOKUP_PRIORS[grade - 1]


def forced_cell(depth: int) -> tuple[Cell, float]:
    """The cell of a token that a grammar leaves no choice about, but for how the model cuts the text into tokens."""
    return Cell(FORCED, min(depth, DEEPEST_CELL), 0), FORCED_PRIOR


@dataclass
class Share:
    """A share of successes that fades: ``tried`` and ``accepted`` as they stood in round ``seen``."""

    accepted: float = 0.0
    tried: float = 0.0
    seen: int = 0

    def fade(self, now: int) -> None:
        """Forget what the rounds since took away."""
        factor = FADING ** (now - self.seen)
        self.accepted, self.tried, self.seen = self.accepted * factor, self.tried * factor, now

    def add(self, accepted: float, now: int) -> None:
        """One more draft that was tried; a share of one where its outcome is only expected."""
        self.fade(now)
        self.accepted += accepted
        self.tried += 1

    def mean(self, prior: float, now: int) -> float:
        """The share, drawn towards ``prior`` where little is known."""
        self.fade(now)
        return (self.accepted + PRIOR_WEIGHT * prior) / (self.tried + PRIOR_WEIGHT)


@dataclass
class RequestRecord:
    """How one request's drafts fare beside what the cells say, for each stage; recent rounds count most."""

    accepted: dict[str, float] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)

    def factor(self, stage: str) -> float:
        """What this request's drafts are worth, as a multiple of everybody's."""
        ratio = (self.accepted.get(stage, 0.0) + REQUEST_WEIGHT) / (self.expected.get(stage, 0.0) + REQUEST_WEIGHT)
        return min(max(ratio, 0.2), 1.5)

    def add(self, stage: str, accepted: bool, expected: float) -> None:
        """One more draft that was tried."""
        self.accepted[stage] = 0.95 * self.accepted.get(stage, 0.0) + accepted
        self.expected[stage] = 0.95 * self.expected.get(stage, 0.0) + expected


class Calibration:
    """All cells, and the chance that a drafter's tree is followed to each depth."""

    def __init__(self) -> None:
        self.round = 0
        self.cells: dict[Cell, Share] = {}
        self.levels: list[Share] = []

    def worth(self, cell: Cell, prior: float, record: RequestRecord) -> float:
        """The probability that a draft of this cell is accepted once its parent was."""
        share = self.cells.get(cell)
        mean = prior if share is None else share.mean(prior, self.round)
        return min(mean * record.factor(cell.stage), SURE)

    def add(self, cell: Cell, prior: float, accepted: bool, record: RequestRecord) -> None:
        """A draft whose parent was accepted has been verified."""
        share = self.cells.setdefault(cell, Share(seen=self.round))
        record.add(cell.stage, accepted, share.mean(prior, self.round))
        share.add(accepted, self.round)

    def add_levels(self, followed: Sequence[float]) -> None:
        """Whether the target followed a drafter's tree to depth 1, to depth 2 once there, and so on."""
        for depth, accepted in enumerate(followed):
            if depth == len(self.levels):
                self.levels.append(Share(seen=self.round))
            self.levels[depth].add(accepted, self.round)

    def expected_depth(self, depth: int, factor: float = 1.0) -> float:
        """Drafts accepted of a drafter's tree of at most ``depth`` tokens; unknown depths are like those above."""
        total, chance, prior = 0.0, 1.0, HOPE
        for level in range(depth):
            if level < len(self.levels):
                prior = self.levels[level].mean(prior, self.round)
            chance *= min(prior * factor, SURE)
            total += chance
        return total
