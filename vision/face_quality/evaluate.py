"""How well quality scores predict recognition errors: error-versus-discard curves, their area, rank correlation.

Similarities compare two images, mated pairs showing one person. A pair matches at a similarity of at least the
threshold; FNMR is the share of mated pairs that do not match, FMR the share of non-mated pairs that do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Convention = Literal["fixed threshold", "re-derived threshold"]


class EvaluationError(ValueError):
    """Scores from which nothing can be evaluated."""


@dataclass(frozen=True)
class DiscardCurve:
    """FNMR after discarding ``fractions`` of lowest quality; ``convention`` says how thresholds were set."""

    fractions: Floats
    fnmr: Floats
    convention: Convention


def pair_quality(first: ArrayLike, second: ArrayLike) -> Floats:
    """The quality of pairs: the lower of both images' (measured: the mean or the maximum predicts errors far worse)."""
    return np.minimum(np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64))


def threshold_at_fmr(non_mated_similarity: ArrayLike, fmr: float) -> float:
    """The lowest threshold whose FMR is at most ``fmr``; 1e-3 is usual."""
    falling = -np.sort(-_finite("non-mated similarities", non_mated_similarity))
    allowed = _floor(fmr, len(falling))
    return -math.inf if allowed >= len(falling) else float(np.nextafter(falling[allowed], math.inf))


def threshold_at_fnmr(mated_similarity: ArrayLike, fnmr: float) -> float:
    """The highest threshold whose FNMR is at most ``fnmr``, for curves that start at a set error."""
    rising = np.sort(_finite("mated similarities", mated_similarity))
    allowed = _floor(fnmr, len(rising))
    return math.inf if allowed >= len(rising) else float(rising[allowed])


def error_versus_discard(
    mated_similarity: ArrayLike, mated_quality: ArrayLike, threshold: float, fractions: Sequence[float]
) -> DiscardCurve:
    """FNMR of the mated pairs left after dropping floor(r N) of lowest quality, the threshold fixed.

    The default convention, that of NIST and OFIQ. Where the cut falls among pairs of equal quality, the mean over all
    orders of them is taken, so that no file order decides. Fractions are from 0 to below 1.
    """
    similarity, quality = _pairs("mated", mated_similarity, mated_quality)
    _check_fractions(fractions)
    order = np.argsort(quality, kind="stable")
    errors = (similarity[order] < threshold).astype(np.float64)
    # Spreading a tie's errors evenly over its members is the mean over its orders.
    _, starts, sizes = np.unique(quality[order], return_index=True, return_counts=True)
    expected = np.repeat(np.add.reduceat(errors, starts) / sizes, sizes)
    remaining = np.append(np.cumsum(expected[::-1])[::-1], 0.0)
    dropped = np.array([_floor(r, len(errors)) for r in fractions])
    fnmr = remaining[dropped] / (len(errors) - dropped)
    return DiscardCurve(np.asarray(fractions, dtype=np.float64), fnmr, "fixed threshold")


def error_versus_discard_rederived(
    mated: tuple[ArrayLike, ArrayLike],
    non_mated: tuple[ArrayLike, ArrayLike],
    fmr: float,
    fractions: Sequence[float],
) -> DiscardCurve:
    """The convention of MagFace's and CR-FIQA's code, for comparing with their figures.

    ``mated`` and ``non_mated`` are (similarity, quality). All pairs are sorted together, and the threshold is derived
    anew at ``fmr`` from the non-mated pairs that remain. Pairs of equal quality go together: a tie the cut falls into
    is kept. Where no mated or no non-mated pair remains the value is NaN.
    """
    similarity, quality = _pairs("mated", *mated)
    other_similarity, other_quality = _pairs("non-mated", *non_mated)
    _check_fractions(fractions)
    everything = np.sort(np.concatenate([quality, other_quality]))
    fnmr = []
    for r in fractions:
        lowest_kept = everything[_floor(r, len(everything))]
        left, other_left = similarity[quality >= lowest_kept], other_similarity[other_quality >= lowest_kept]
        if len(left) == 0 or len(other_left) == 0:
            fnmr.append(math.nan)
        else:
            fnmr.append(float((left < threshold_at_fmr(other_left, fmr)).mean()))
    return DiscardCurve(np.asarray(fractions, dtype=np.float64), np.array(fnmr), "re-derived threshold")


def partial_auc(
    curve: DiscardCurve, limit: float, interpolation: Literal["linear", "step"] = "linear", normalize: bool = True
) -> float:
    """Area under ``curve`` from 0 to ``limit``, lower is better; 0.2 and 0.3 are usual.

    ``normalize`` divides by limit * FNMR(0), so that 1 is a useless score. "step" holds each value to the next
    fraction, the curve that was measured; "linear" joins them. The fractions must begin at 0 and contain the limit.
    """
    inside = curve.fractions <= limit + 1e-9
    x, y = curve.fractions[inside], curve.fnmr[inside]
    if len(x) < 2 or x[0] != 0 or abs(x[-1] - limit) > 1e-9 or (np.diff(x) <= 0).any():
        raise EvaluationError(f"the curve's fractions must rise from 0 and contain {limit}; they are {curve.fractions}")
    if not np.isfinite(y).all():
        raise EvaluationError("the curve has no error rate at some fractions: too few pairs remain")
    heights = (y[:-1] + y[1:]) / 2 if interpolation == "linear" else y[:-1]
    area = float((heights * np.diff(x)).sum())
    if not normalize:
        return area
    if y[0] == 0:
        raise EvaluationError("no mated pair is rejected before discarding; choose a stricter threshold")
    return area / (limit * float(y[0]))


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank."""
    x, y = _pairs("first", first, second)
    ranks = np.stack([_mean_ranks(x), _mean_ranks(y)])
    if (ranks == ranks[:, :1]).all(axis=1).any():
        raise EvaluationError("all values of one side are equal; ranks have no correlation")
    return float(np.asarray(np.corrcoef(ranks))[0, 1])


def bootstrap_interval(
    statistic: Callable[[NDArray[np.int64]], float],
    identities: ArrayLike,
    confidence: float = 0.95,
    rounds: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of ``statistic`` over redrawn identities.

    ``statistic`` takes row ids; ``identities`` [N] names the person of each row. Whole people are redrawn, since the
    rows of one are not independent.
    """
    names, members = np.unique(np.asarray(identities), return_inverse=True)
    rows = [np.flatnonzero(members == i) for i in range(len(names))]
    if not rows:
        raise EvaluationError("there are no rows to redraw")
    generator = np.random.default_rng(seed)
    values = [
        statistic(np.concatenate([rows[i] for i in generator.integers(len(rows), size=len(rows))]))
        for _ in range(rounds)
    ]
    tail = (1 - confidence) / 2
    return float(np.quantile(values, tail)), float(np.quantile(values, 1 - tail))


def _mean_ranks(values: Floats) -> Floats:
    _, members, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[members]
    return ranks


def _floor(fraction: float, count: int) -> int:
    """floor(fraction * count) of the decimal that was meant: 0.29 * 100 is 28.999999999999996 as a float."""
    return math.floor(fraction * count + 1e-9)


def _check_fractions(fractions: Sequence[float]) -> None:
    if not all(0 <= r < 1 for r in fractions):
        raise EvaluationError(f"discard fractions are {list(fractions)}; they must be from 0 to below 1")


def _finite(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0 or not np.isfinite(array).all():
        raise EvaluationError(f"{name} have shape {array.shape}; give at least one value, all finite")
    return array


def _pairs(name: str, first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    x, y = _finite(f"{name} values", first), _finite(f"{name} values", second)
    if len(x) != len(y):
        raise EvaluationError(f"{name} values are {len(x)} and {len(y)}; give two of each pair")
    return x, y
