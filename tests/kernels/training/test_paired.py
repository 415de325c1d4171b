import math
import random
import statistics

import pytest
from scipy import stats

from kernels.training.options import RecipeError
from kernels.training.paired import (
    NOT_DECIDED,
    REFUTED,
    SHOWN,
    Comparison,
    Measured,
    PairedResult,
    PairingError,
    compare_pairs,
)

ASKED = Comparison("taught is better", "taught", "plain", "top1", smallest_effect=0.5)
PAIRS = 12


def result_of(gains: list[float], comparison: Comparison = ASKED) -> PairedResult:
    sign = -1 if comparison.smaller_is_better else 1
    base = [Measured(seed, 10 * seed) for seed in range(len(gains))]  # what a seed does to both must cancel
    own = [Measured(seed, 10 * seed + sign * gain) for seed, gain in enumerate(gains)]
    return compare_pairs(comparison, own, base, range(len(gains)))


def planted(gain: float, study: int) -> PairedResult:
    """A simulated study whose differences have the deviation 1 and the mean ``gain``."""
    draw = random.Random(f"{gain} {study}")
    return result_of([draw.gauss(gain, 1) for _ in range(PAIRS)])


def test_a_planted_gain_of_one_deviation_is_found() -> None:
    assert sum(planted(1.0, study).verdict == SHOWN for study in range(100)) >= 80


def test_a_planted_zero_is_hardly_ever_called_a_gain() -> None:
    verdicts = [planted(0.0, study).verdict for study in range(100)]
    assert verdicts.count(SHOWN) <= 7
    assert REFUTED in verdicts, "an effect of half a deviation is excluded in some of them"
    assert NOT_DECIDED in verdicts


def test_a_gain_that_matters_is_hardly_ever_refuted() -> None:
    assert sum(planted(ASKED.smallest_effect, study).verdict == REFUTED for study in range(100)) <= 7


def test_interval_and_chances_are_those_of_the_paired_t_test() -> None:
    gains = [0.4, -0.1, 0.3, 0.9, 0.2]
    result = result_of(gains)
    reference = stats.ttest_1samp(gains, 0.0)
    low, high = reference.confidence_interval(0.95)
    assert (result.low, result.high) == (pytest.approx(low), pytest.approx(high))
    assert result.p_gain == pytest.approx(stats.ttest_1samp(gains, 0.0, alternative="greater").pvalue)
    assert result.p_smaller == pytest.approx(stats.ttest_1samp(gains, 0.5, alternative="less").pvalue)
    assert result.p_no_loss == pytest.approx(stats.ttest_1samp(gains, -0.5, alternative="greater").pvalue)
    assert (result.mean, result.deviation) == (pytest.approx(0.34), pytest.approx(statistics.stdev(gains)))


@pytest.mark.parametrize(
    ("gains", "verdict", "remark"),
    [
        ([1.0, 1.2, 0.8, 1.1], SHOWN, ""),
        ([0.02, -0.02, 0.01, -0.01], REFUTED, "equivalent"),
        ([0.10, 0.11, 0.09, 0.10], REFUTED, "a gain, smaller than what matters"),
        ([-0.10, -0.11, -0.09, -0.10], REFUTED, "equivalent, a small loss"),
        ([-1.0, -1.2, -0.8, -1.1], REFUTED, "a loss"),
        ([2.0, -2.0, 1.0, -1.0], NOT_DECIDED, ""),
        ([0.0, 0.0, 0.0], REFUTED, "equivalent"),
        ([0.7, 0.7, 0.7], SHOWN, ""),
    ],
)
def test_verdicts(gains: list[float], verdict: str, remark: str) -> None:
    result = result_of(gains)
    assert (result.verdict, result.remark) == (verdict, remark)


def test_a_smaller_error_is_a_gain() -> None:
    errors = Comparison("errs less", "taught", "plain", "error", 0.5, smaller_is_better=True)
    assert result_of([1.0, 1.2, 0.8], errors).differences == pytest.approx({0: 1.0, 1: 1.2, 2: 0.8})
    assert result_of([1.0, 1.2, 0.8], errors).verdict == SHOWN


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ([(0, 1.0), (1, 1.0)], "taught cannot be compared: seeds 2 are missing"),
        ([(0, 1.0), (1, 1.0), (2, 1.0), (1, 2.0)], "seeds 1 are given more than once"),
        ([(0, 1.0), (1, 1.0), (2, 1.0), (7, 2.0)], "seeds 7 do not belong to the study"),
        ([(0, math.nan), (1, 1.0), (2, math.inf)], "seeds 0, 2 have no finite figure"),
    ],
)
def test_no_seed_is_left_out(own: list[tuple[int, float]], message: str) -> None:
    base = [Measured(seed, 0.0) for seed in range(3)]
    with pytest.raises(PairingError, match=message):
        compare_pairs(ASKED, [Measured(*each) for each in own], base, range(3))


def test_the_base_is_checked_alike_and_two_pairs_are_too_few() -> None:
    with pytest.raises(PairingError, match="plain cannot be compared: seeds 1 are missing"):
        compare_pairs(
            ASKED, [Measured(0, 0.0), Measured(1, 0.0), Measured(2, 0.0)], [Measured(0, 0), Measured(2, 0)], range(3)
        )
    with pytest.raises(PairingError, match="2 seeds make no interval"):
        result_of([1.0, 1.0])


def test_a_comparison_without_sense_is_refused() -> None:
    with pytest.raises(RecipeError, match="smallest_effect is 0"):
        Comparison("", "taught", "plain", "top1", 0.0)
    with pytest.raises(RecipeError, match="compared with itself"):
        Comparison("", "plain", "plain", "top1", 1.0)
