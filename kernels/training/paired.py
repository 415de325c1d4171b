"""Two variants of a study compared seed by seed, with a verdict: shown, refuted, or not decided. Pure; no torch here.

Both variants of a pair begin with the same weights and see the same data in the same order, so that what a seed does to
both cancels in the difference. The differences are taken for a sample of a normal distribution (Student's t).

Three verdicts, of a claim that ``variant`` gains over ``against``:

- refuted: a gain as large as the smallest effect of interest is excluded (one-sided test at 5 %). Where a loss as large
  is excluded too, the variants are equivalent (two one-sided tests; Schuirmann, 1987, doi 10.1007/BF01068419);
- shown: not refuted, and the 95 % interval of the mean difference lies above zero;
- not decided: neither. More seeds could tell.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kernels.training.options import RecipeError

SHOWN, REFUTED, NOT_DECIDED = "shown", "refuted", "not decided"
CONFIDENCE, TEST_LEVEL = 0.95, 0.05
FEWEST_PAIRS = 3


class PairingError(ValueError):
    """The pairs of a comparison are not whole: a seed is missing, given twice, or has no finite figure."""


@dataclass(frozen=True)
class Comparison:
    """One entry of a recipe's ``[[study.comparisons]]``: what is compared, in which figure, and what would matter.

    ``variant`` and ``against`` are names of variants, ``figure`` one of the trainings' ``final``. ``smallest_effect``,
    in units of the figure, is the smallest gain that anybody would care for; it is set before the runs.
    ``smaller_is_better`` for errors. ``claim`` says in words what a gain would mean.
    """

    claim: str
    variant: str
    against: str
    figure: str
    smallest_effect: float
    smaller_is_better: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.smallest_effect) and self.smallest_effect > 0):
            raise RecipeError(
                f"smallest_effect is {self.smallest_effect}; it must be a finite number above 0, in units of "
                f"{self.figure}"
            )
        if self.variant == self.against:
            raise RecipeError(f"{self.variant} is compared with itself; name another variant in against")


@dataclass(frozen=True)
class Measured:
    """The figure that the training with ``seed`` ended with."""

    seed: int
    value: float


@dataclass(frozen=True)
class PairedResult:
    """What the pairs say. Differences are gains: above zero where ``variant`` is better, whatever the figure's sense.

    ``low`` and ``high`` bound the 95 % interval of the ``mean``, ``deviation`` is that of the differences. Chances:
    ``p_gain`` of such a mean or a larger one were there no gain, ``p_smaller`` of such a mean or a smaller one were the
    gain the smallest effect, ``p_no_loss`` of such a mean or a larger one were there a loss as large.
    """

    comparison: Comparison
    differences: dict[int, float]
    mean: float
    deviation: float
    low: float
    high: float
    p_gain: float
    p_smaller: float
    p_no_loss: float

    @property
    def equivalent(self) -> bool:
        """Whether both a gain and a loss of the smallest effect are excluded."""
        return self.p_smaller < TEST_LEVEL and self.p_no_loss < TEST_LEVEL

    @property
    def verdict(self) -> str:
        """Of the claim that there is a gain worth having."""
        if self.p_smaller < TEST_LEVEL:
            return REFUTED
        return SHOWN if self.low > 0 else NOT_DECIDED

    @property
    def remark(self) -> str:
        """What the verdict alone does not say; empty where that is all."""
        if self.verdict == REFUTED and self.low > 0:
            return "a gain, smaller than what matters"
        if self.high < 0:
            return "equivalent, a small loss" if self.equivalent else "a loss"
        return "equivalent" if self.equivalent else ""


def compare_pairs(
    comparison: Comparison, own: Sequence[Measured], base: Sequence[Measured], seeds: Sequence[int]
) -> PairedResult:
    """Compare the figures of ``variant`` (``own``) with those of ``against`` (``base``) over exactly ``seeds``.

    Errors: PairingError naming every seed that is missing, given twice, unknown or not finite, or where there are fewer
    than three; nothing is left out.
    """
    variant = check_measured(comparison.variant, own, seeds)
    against = check_measured(comparison.against, base, seeds)
    sign = -1.0 if comparison.smaller_is_better else 1.0
    differences = {seed: sign * (variant[seed] - against[seed]) for seed in seeds}
    values = list(differences.values())
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    error = deviation / math.sqrt(len(values))
    half = error * t_quantile((1 + CONFIDENCE) / 2, len(values) - 1)
    effect = comparison.smallest_effect

    def above(reference: float) -> float:
        return upper_tail(mean - reference, error, len(values) - 1)

    return PairedResult(
        comparison, differences, mean, deviation, mean - half, mean + half,
        p_gain=above(0.0), p_smaller=1 - above(effect), p_no_loss=above(-effect),
    )  # fmt: skip


def check_measured(variant: str, measured: Sequence[Measured], seeds: Sequence[int]) -> dict[int, float]:
    """Seed -> figure of one variant. Errors: PairingError."""
    counts = Counter(each.seed for each in measured)
    faults = {
        "are missing": [seed for seed in seeds if seed not in counts],
        "are given more than once": [seed for seed, count in counts.items() if count > 1],
        "do not belong to the study": [seed for seed in counts if seed not in seeds],
        "have no finite figure": [each.seed for each in measured if not math.isfinite(each.value)],
    }
    said = [f"seeds {', '.join(map(str, found))} {fault}" for fault, found in faults.items() if found]
    if len(set(seeds)) < len(seeds):
        said.append("the study names a seed twice")
    if len(seeds) < FEWEST_PAIRS:
        said.append(f"{len(seeds)} seeds make no interval, at least {FEWEST_PAIRS} do")
    if said:
        raise PairingError(f"{variant} cannot be compared: {'; '.join(said)}. No seed is left out: train it again")
    return {each.seed: each.value for each in measured}


def t_quantile(share: float, freedom: int) -> float:
    """Where Student's distribution of ``freedom`` degrees has ``share`` below it."""
    from scipy.stats import t

    return float(t.ppf(share, freedom))


def upper_tail(distance: float, error: float, freedom: int) -> float:
    """The chance of a t above ``distance / error`` in Student's distribution; without any spread it is 0, 1/2 or 1."""
    from scipy.stats import t

    if error == 0:
        return 0.5 if distance == 0 else float(distance < 0)
    return float(t.sf(distance / error, freedom))
