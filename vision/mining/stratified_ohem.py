"""Stratified online hard example mining (Li et al., arXiv 1705.02233).

What the paper states: regions fall into four strata by the ratio between classification and localisation loss; where
the strata lie and how many regions each gives change while training proceeds, towards localisation; inside a stratum
the regions of largest loss are taken. Its boundaries, quotas and stages were not at hand: every number below is ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vision.mining.candidates import MiningInputError, check_batch_size, combined_loss
from vision.mining.ohem import rank_by_loss

NUM_STRATA = 4


@dataclass(frozen=True)
class Strata:
    """Where the strata lie and the share of the chosen regions each should give.

    ``cut_points`` are three falling values of c / (c + g), c the classification and g the localisation loss of a
    region: stratum 0 lies at or above the first (dominated by classification, holding all background), stratum 3 below
    the last (dominated by localisation). ``shares`` sum to 1.
    """

    cut_points: tuple[float, float, float]
    shares: tuple[float, float, float, float]

    def __post_init__(self) -> None:
        if not all(0 <= low <= high <= 1 for high, low in itertools.pairwise(self.cut_points)):
            raise MiningInputError(f"cut_points are {self.cut_points}; they must fall from at most 1 to at least 0")
        if min(self.shares) < 0 or not math.isclose(sum(self.shares), 1, abs_tol=1e-6):
            raise MiningInputError(f"shares are {self.shares}; they must be at least 0 and sum to 1")


Schedule = Callable[[float], Strata]

# Ours: equal cuts; early on mostly classification, which is learnt first, late the localisation strata quadrupled.
START = Strata(cut_points=(0.75, 0.5, 0.25), shares=(0.70, 0.15, 0.10, 0.05))
END = Strata(cut_points=(0.75, 0.5, 0.25), shares=(0.40, 0.20, 0.20, 0.20))


def moving_strata(start: Strata, end: Strata) -> Schedule:
    """A schedule whose cut points and shares move linearly with progress from ``start`` to ``end``."""

    def schedule(progress: float) -> Strata:
        def between(first: Sequence[float], last: Sequence[float]) -> list[float]:
            return [(1 - progress) * a + progress * b for a, b in zip(first, last, strict=True)]

        cut_1, cut_2, cut_3 = between(start.cut_points, end.cut_points)
        share_1, share_2, share_3, share_4 = between(start.shares, end.shares)
        return Strata((cut_1, cut_2, cut_3), (share_1, share_2, share_3, share_4))

    return schedule


def staged_strata(stages: Sequence[tuple[float, Strata]]) -> Schedule:
    """A schedule constant within stages: pairs of (progress at which the stage begins, its strata), the first at 0."""
    begins = [begin for begin, _ in stages]
    if not begins or begins[0] != 0 or any(a >= b for a, b in itertools.pairwise(begins)) or begins[-1] >= 1:
        raise MiningInputError(f"stages begin at {begins}; the first must begin at 0 and each later one before 1")

    def schedule(progress: float) -> Strata:
        return [strata for begin, strata in stages if begin <= progress][-1]

    return schedule


# Ours: stages that end where the usual schedule drops the learning rate, at 50 and 75 % of training.
DEFAULT_SCHEDULE = staged_strata([(0.0, START), (0.5, moving_strata(START, END)(0.5)), (0.75, END)])


class StratifiedOHEM:
    """The costliest regions of each stratum, as many as its moving quota says; ``batch_size`` in all.

    Regions are de-duplicated as in ``OHEM`` first. A stratum with fewer regions than its quota gives all it has, and
    the rest goes to the strata that lack most. With all cut points 0 it is ``OHEM``. Deterministic. A ``Miner``.
    """

    def __init__(
        self, batch_size: int, schedule: Schedule = DEFAULT_SCHEDULE, nms_threshold: float | None = 0.7
    ) -> None:
        check_batch_size(batch_size)
        self.batch_size = batch_size
        self.schedule = schedule
        self.nms_threshold = nms_threshold

    def __call__(
        self, classification_loss: Tensor, localization_loss: Tensor, boxes: Tensor, labels: Tensor, progress: float
    ) -> Tensor:
        """Indices of the chosen regions, by falling loss."""
        loss = combined_loss(classification_loss, localization_loss, boxes, labels, progress)
        ranked = rank_by_loss(loss, boxes, labels, self.nms_threshold)
        strata = self.schedule(progress)
        stratum = assign_strata(classification_loss[ranked], localization_loss[ranked], strata.cut_points)
        populations = torch.bincount(stratum, minlength=NUM_STRATA).tolist()
        chosen = torch.zeros_like(stratum, dtype=torch.bool)
        for index, quota in enumerate(quotas(self.batch_size, strata.shares, populations)):
            # The ranking falls by loss, so the first members of a stratum are its costliest.
            chosen[(stratum == index).nonzero().flatten()[:quota]] = True
        return ranked[chosen]


def assign_strata(
    classification_loss: Tensor, localization_loss: Tensor, cut_points: tuple[float, float, float]
) -> Tensor:
    """The stratum, 0 to 3, of every region [R]; without localisation loss it is 0 whatever the cuts."""
    c, g = classification_loss.detach(), localization_loss.detach()
    ratio = torch.where(g > 0, c / (c + g), torch.ones_like(c))
    return (ratio[:, None] < ratio.new_tensor(cut_points)).sum(dim=1)


def quotas(batch_size: int, shares: Sequence[float], populations: Sequence[int]) -> list[int]:
    """How many regions each stratum gives: min(batch_size, all there are) in all, close to batch_size * share each.

    Largest remainders, capped by the populations; what a stratum cannot give goes one by one to the stratum that lacks
    most of its share and still has members.
    """
    wanted = [batch_size * share for share in shares]
    given = [min(math.floor(want), population) for want, population in zip(wanted, populations, strict=True)]
    for _ in range(min(batch_size, sum(populations)) - sum(given)):
        open_strata = [s for s, population in enumerate(populations) if given[s] < population]
        given[max(open_strata, key=lambda s: wanted[s] - given[s])] += 1
    return given
