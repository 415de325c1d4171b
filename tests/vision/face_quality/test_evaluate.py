"""Curves, areas and correlations against hand-computed values."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from vision.face_quality.evaluate import (
    DiscardCurve,
    EvaluationError,
    bootstrap_interval,
    error_versus_discard,
    error_versus_discard_rederived,
    pair_quality,
    partial_auc,
    spearman,
    threshold_at_fmr,
    threshold_at_fnmr,
)

SIMILARITY = np.array([0.9, 0.8, 0.2, 0.7, 0.1, 0.6, 0.85, 0.3, 0.75, 0.95])
QUALITY = np.array([90, 70, 20, 60, 10, 50, 80, 55, 65, 95])
FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4)


def test_golden_curve_and_area():
    curve = error_versus_discard(SIMILARITY, QUALITY, 0.5, FRACTIONS)
    assert curve.fnmr.tolist() == pytest.approx([0.3, 2 / 9, 0.125, 1 / 7, 0])
    assert curve.convention == "fixed threshold"
    assert partial_auc(curve, 0.3, "linear", normalize=False) == pytest.approx(0.056865, abs=1e-6)
    assert partial_auc(curve, 0.3, "step", normalize=False) == pytest.approx(0.064722, abs=1e-6)
    assert partial_auc(curve, 0.3, "linear") == pytest.approx(0.6318, abs=1e-4)
    assert partial_auc(curve, 0.3, "step") == pytest.approx(0.7191, abs=1e-4)


def test_a_monotone_map_of_the_quality_changes_nothing():
    curve = error_versus_discard(SIMILARITY, QUALITY, 0.5, FRACTIONS)
    mapped = error_versus_discard(SIMILARITY, 1 / (1 + np.exp(-(QUALITY - 50) / 10)), 0.5, FRACTIONS)
    assert np.array_equal(curve.fnmr, mapped.fnmr)


def test_the_number_dropped_is_exact():
    similarity = np.zeros(100)
    similarity[28:] = 1.0
    curve = error_versus_discard(similarity, np.arange(100), 0.5, (0.28, 0.29))
    assert 0.29 * 100 < 29
    assert curve.fnmr.tolist() == [0, 0]
    similarity[28] = 0.0
    assert error_versus_discard(similarity, np.arange(100), 0.5, (0.28, 0.29)).fnmr.tolist() == [1 / 72, 0]


def test_ties_are_the_mean_over_their_orders():
    rng = np.random.default_rng(0)
    quality = rng.integers(0, 4, 40)
    similarity = rng.random(40)
    curve = error_versus_discard(similarity, quality, 0.4, FRACTIONS)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(40)
        shuffled = error_versus_discard(similarity[order], quality[order], 0.4, FRACTIONS)
        assert shuffled.fnmr.tolist() == pytest.approx(curve.fnmr.tolist())
    broken = [
        error_versus_discard(similarity, quality + rng.random(40) * 0.9, 0.4, FRACTIONS).fnmr for _ in range(4000)
    ]
    assert np.mean(broken, axis=0).tolist() == pytest.approx(curve.fnmr.tolist(), abs=3e-3)


def latent_pairs(count=20_000, seed=0):
    """Mated pairs whose similarity follows the worse image; the threshold rejects 5 %."""
    rng = np.random.default_rng(seed)
    first, second = rng.random((2, count))
    similarity = np.minimum(first, second) + rng.normal(size=count) * 0.08
    return first, second, similarity, float(np.quantile(similarity, 0.05))


def test_ordering_of_quality_rules():
    first, second, similarity, threshold = latent_pairs()
    rng = np.random.default_rng(1)
    fractions = np.linspace(0, 0.3, 31)

    def area(quality):
        return partial_auc(error_versus_discard(similarity, quality, threshold, fractions), 0.3)

    worse = area(pair_quality(first, second))
    noisy = area(pair_quality(first + rng.normal(size=20_000) * 0.1, second + rng.normal(size=20_000) * 0.1))
    assert area(similarity) < worse < noisy < area((first + second) / 2) < area(np.maximum(first, second))
    assert area(np.maximum(first, second)) < area(rng.random(20_000)) == pytest.approx(1, abs=0.05)
    rounded = area(pair_quality(np.round(first * 100), np.round(second * 100)))
    assert rounded == pytest.approx(worse, abs=0.01)


def test_a_perfect_ranking_discards_exactly_the_errors_first():
    _, _, similarity, threshold = latent_pairs()
    fractions = np.linspace(0, 0.3, 31)
    curve = error_versus_discard(similarity, similarity, threshold, fractions)
    ideal = np.maximum((curve.fnmr[0] - fractions) / (1 - fractions), 0)
    assert curve.fnmr.tolist() == pytest.approx(ideal.tolist(), abs=1e-9)
    assert partial_auc(curve, 0.3) == pytest.approx(0.085, abs=0.005)


def test_thresholds():
    non_mated = np.arange(1000) / 1000
    threshold = threshold_at_fmr(non_mated, 1e-2)
    assert (non_mated >= threshold).sum() == 10
    assert (non_mated >= np.nextafter(threshold, -1)).sum() == 11
    assert threshold_at_fmr(non_mated, 1.0) == -math.inf
    assert (non_mated >= threshold_at_fmr(non_mated, 0.0)).sum() == 0
    mated = np.arange(200) / 200
    threshold = threshold_at_fnmr(mated, 0.05)
    assert (mated < threshold).sum() == 10
    assert (mated < np.nextafter(threshold, 2)).sum() == 11
    tied = np.repeat([0.1, 0.9], 50)
    assert (tied >= threshold_at_fmr(tied, 0.2)).mean() <= 0.2


def slow_rederived(mated, non_mated, fmr, fraction):
    pairs = sorted(
        [(q, s, True) for s, q in zip(*mated, strict=True)] + [(q, s, False) for s, q in zip(*non_mated, strict=True)]
    )
    kept = pairs[int(fraction * len(pairs)) :]
    others = sorted((s for _, s, is_mated in kept if not is_mated), reverse=True)
    limit = others[int(fmr * len(others))]
    scores = [s for _, s, is_mated in kept if is_mated]
    return sum(s <= limit for s in scores) / len(scores)


def test_rederived_convention_equals_the_loop_and_says_so():
    rng = np.random.default_rng(0)
    mated = rng.random(300) + 0.3, rng.random(300)
    non_mated = rng.random(500), rng.random(500)
    curve = error_versus_discard_rederived(mated, non_mated, 0.1, FRACTIONS)
    assert curve.convention == "re-derived threshold"
    assert curve.fnmr.tolist() == pytest.approx([slow_rederived(mated, non_mated, 0.1, r) for r in FRACTIONS])


def test_rederived_convention_with_nothing_left_is_nan():
    curve = error_versus_discard_rederived((SIMILARITY, QUALITY), (SIMILARITY, QUALITY - 100.0), 0.1, (0.0, 0.5))
    assert math.isnan(curve.fnmr[1]) and not math.isnan(curve.fnmr[0])
    with pytest.raises(EvaluationError, match="no error rate"):
        partial_auc(curve, 0.5)


def test_spearman_equals_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.random(50), rng.integers(0, 5, 50)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert spearman(x, x**3) == pytest.approx(1.0)
    assert spearman(x, -x) == pytest.approx(-1.0)
    with pytest.raises(EvaluationError, match="equal"):
        spearman(x, np.ones(50))


def test_bootstrap_redraws_whole_people():
    people = np.repeat(np.arange(40), 25)
    values = np.random.default_rng(0).normal(size=40)[people]
    low, high = bootstrap_interval(lambda rows: float(values[rows].mean()), people, rounds=400)
    spread = values.std() / math.sqrt(40)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.25)
    assert bootstrap_interval(lambda rows: float(len(rows)), people, rounds=5) == (1000, 1000)


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        (lambda: error_versus_discard([], [], 0.5, FRACTIONS), "at least one value"),
        (lambda: error_versus_discard(SIMILARITY, QUALITY[:5], 0.5, FRACTIONS), "two of each pair"),
        (lambda: error_versus_discard(SIMILARITY, np.full(10, np.nan), 0.5, FRACTIONS), "all finite"),
        (lambda: error_versus_discard(SIMILARITY, QUALITY, 0.5, (0.0, 1.0)), "from 0 to below 1"),
        (lambda: partial_auc(error_versus_discard(SIMILARITY, QUALITY, 0.5, FRACTIONS), 0.35), "contain 0.35"),
        (lambda: partial_auc(error_versus_discard(SIMILARITY, QUALITY, 0.5, (0.1, 0.2)), 0.2), "must rise from 0"),
        (
            lambda: partial_auc(DiscardCurve(np.array([0.0, 0.1]), np.zeros(2), "fixed threshold"), 0.1),
            "no mated pair is rejected",
        ),
        (lambda: threshold_at_fmr([], 0.1), "at least one value"),
        (lambda: bootstrap_interval(lambda rows: 0.0, []), "no rows to redraw"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(evaluate, said):
    with pytest.raises(EvaluationError, match=said):
        evaluate()
