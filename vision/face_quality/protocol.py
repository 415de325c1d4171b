"""What is measured of quality scores on faces of known people: error curves, templates, groups, order under defects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vision.data.degradations import degrade
from vision.face_quality.evaluate import (
    Convention,
    DiscardCurve,
    EvaluationError,
    bootstrap_interval,
    error_versus_discard,
    error_versus_discard_rederived,
    pair_quality,
    partial_auc,
    threshold_at_fmr,
)
from vision.face_quality.pooling import pool_template

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LIMIT = 0.3
FRACTIONS: tuple[float, ...] = tuple(round(0.01 * step, 2) for step in range(31))
# Defects whose order a score should notice, and at which severities.
ORDERED_DEFECTS = ("blur", "downsampling", "jpeg", "occlusion", "darkness")
SEVERITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
BOOTSTRAP_ROUNDS = 200
GAMMAS = (0.5, 0.75, 1.5, 2.0)
MAX_NON_MATED = 2_000_000
MAX_IMAGES = 8_000  # whose pairs are all held at once


@dataclass(frozen=True)
class Comparisons:
    """Pairs of images, mated and not, with their cosine similarities and the threshold they are decided by.

    ``mated`` and ``non_mated`` are [P, 2] image indices; non-mated pairs are thinned evenly to two million.
    """

    mated: Ints
    mated_similarity: Floats
    non_mated: Ints
    non_mated_similarity: Floats
    identities: Ints
    fmr: float
    threshold: float

    @property
    def fnmr0(self) -> float:
        """FNMR before anything is discarded."""
        return float((self.mated_similarity < self.threshold).mean())

    def curve(self, quality: Floats, convention: Convention = "fixed threshold") -> DiscardCurve:
        """The error-versus-discard curve of image qualities [N]."""
        pairs = pair_quality(quality[self.mated[:, 0]], quality[self.mated[:, 1]])
        if convention == "fixed threshold":
            return error_versus_discard(self.mated_similarity, pairs, self.threshold, FRACTIONS)
        other = pair_quality(quality[self.non_mated[:, 0]], quality[self.non_mated[:, 1]])
        return error_versus_discard_rederived(
            (self.mated_similarity, pairs), (self.non_mated_similarity, other), self.fmr, FRACTIONS
        )

    def area(self, quality: Floats) -> float:
        """pAUC(0.3) over 0.3 FNMR(0): 1 for a useless score, lower is better."""
        return partial_auc(self.curve(quality), LIMIT)

    def interval(self, quality: Floats, seed: int = 0) -> tuple[float, float]:
        """95 % interval of ``area`` over redrawn people, the threshold as it is."""
        pairs = pair_quality(quality[self.mated[:, 0]], quality[self.mated[:, 1]])

        def statistic(rows: Ints) -> float:
            curve = error_versus_discard(self.mated_similarity[rows], pairs[rows], self.threshold, FRACTIONS)
            return partial_auc(curve, LIMIT) if curve.fnmr[0] > 0 else 1.0

        return bootstrap_interval(statistic, self.identities[self.mated[:, 0]], rounds=BOOTSTRAP_ROUNDS, seed=seed)


def compare_all(features: Tensor, identities: Ints, originals: Ints, fmr: float) -> Comparisons:
    """Every pair of images of different photographs; ``originals`` [N] says from which photograph an image comes.

    Two copies of one photograph are no comparison anybody makes. Errors: EvaluationError where no mated pair is left.
    """
    if len(features) > MAX_IMAGES:
        raise EvaluationError(f"{len(features)} images make too many pairs; at most {MAX_IMAGES}: take fewer copies")
    unit = torch.nn.functional.normalize(features.double(), dim=1).numpy()
    first, second = np.triu_indices(len(unit), k=1)
    different = originals[first] != originals[second]
    first, second = first[different], second[different]
    same = identities[first] == identities[second]
    mated = np.stack([first[same], second[same]], axis=1)
    other = np.stack([first[~same], second[~same]], axis=1)
    other = other[np.linspace(0, len(other), min(len(other), MAX_NON_MATED), endpoint=False).astype(np.int64)]
    if not len(mated) or not len(other):
        raise EvaluationError(f"{len(mated)} mated and {len(other)} non-mated pairs; a person needs two photographs")
    every_pair = unit @ unit.T  # half a gigabyte at most; the features of two million pairs would be thirty
    similarity, other_similarity = (every_pair[pairs[:, 0], pairs[:, 1]] for pairs in (mated, other))
    threshold = threshold_at_fmr(other_similarity, fmr)
    return Comparisons(mated, similarity, other, other_similarity, identities, fmr, threshold)


def group_table(
    comparisons: Comparisons, quality: Floats, groups: Sequence[str], discard: float
) -> dict[str, dict[str, float]]:
    """For each group of people, what discarding the worst ``discard`` of all images does to it.

    ``images``, ``mean_quality``, ``discarded`` (its share of images under the cut), and FNMR of its mated pairs
    ``before`` and ``after``; ``after`` is NaN where nothing is left.
    """
    cut = np.quantile(quality, discard)
    kept = quality >= cut
    names = np.array(groups)
    pair_groups = names[comparisons.mated[:, 0]]
    errors = comparisons.mated_similarity < comparisons.threshold
    both_kept = kept[comparisons.mated].all(axis=1)
    table = {}
    for name in sorted(set(groups)):
        own, pairs = names == name, pair_groups == name
        left = pairs & both_kept
        table[name] = {
            "images": float(own.sum()),
            "mean_quality": float(quality[own].mean()),
            "discarded": float((~kept[own]).mean()),
            "fnmr_before": float(errors[pairs].mean()) if pairs.any() else float("nan"),
            "fnmr_after": float(errors[left].mean()) if left.any() else float("nan"),
        }
    return table


def template_figures(
    features: Tensor, identities: Ints, originals: Ints, weights: Mapping[str, Floats], fmr: float
) -> dict[str, float]:
    """FNMR at ``fmr`` of templates, each made of all images of one photograph, under each weighting.

    Weights are moved to begin at 0 and scaled to 1, since a template takes no negative ones.
    """
    photographs, first = np.unique(originals, return_index=True)
    people = identities[first]
    one, two = np.triu_indices(len(photographs), k=1)
    mated = people[one] == people[two]
    figures = {}
    for name, quality in {"uniform": np.ones(len(originals)), **weights}.items():
        low, high = quality.min(), quality.max()
        scaled = torch.from_numpy((quality - low) / (high - low) if high > low else np.ones(len(quality)))
        templates = torch.stack(
            [
                pool_template(features[torch.from_numpy(originals == p)].double(), scaled[originals == p])
                for p in photographs
            ]
        ).numpy()
        similarity = np.einsum("nd,nd->n", templates[one], templates[two])
        threshold = threshold_at_fmr(similarity[~mated], fmr)
        figures[name] = float((similarity[mated] < threshold).mean())
    return figures


def defect_series(images: Sequence[Image.Image], seed: int = 0) -> dict[str, list[list[Image.Image]]]:
    """For each of ``ORDERED_DEFECTS`` a list over ``SEVERITIES`` of all images with that defect."""
    return {
        kind: [
            [degrade(image, kind, severity, np.random.default_rng((seed, place))) for place, image in enumerate(images)]
            for severity in SEVERITIES
        ]
        for kind in ORDERED_DEFECTS
    }


def ordered_share(scores: Floats) -> float:
    """Of scores [severities, images], the share of pairs of severities of one image that stand in the right order.

    A tie counts half.
    """
    right = []
    for milder in range(len(scores)):
        for worse in range(milder + 1, len(scores)):
            right.append((scores[milder] > scores[worse]) + 0.5 * (scores[milder] == scores[worse]))
    return float(np.mean(right))


def score_drift(method: Callable[[Tensor], Floats], crops: Tensor) -> dict[str, float]:
    """Mean change of the score of ``crops`` uint8 [N, 3, H, W] under what should hardly matter.

    "flip" is the mean absolute change when mirrored; "gamma G" the mean change when grey levels are raised to G:
    above 1 darker, below 1 lighter.
    """
    plain = method(crops)
    drift = {"flip": float(np.abs(method(crops.flip(3)) - plain).mean())}
    for gamma in GAMMAS:
        changed = (255 * (crops.float() / 255).pow(gamma)).round().byte()
        drift[f"gamma {gamma:g}"] = float((method(changed) - plain).mean())
    return drift


def curve_json(curve: DiscardCurve) -> dict[str, Any]:
    """For a report."""
    return {
        "convention": curve.convention,
        "fractions": curve.fractions.tolist(),
        "fnmr": [None if not np.isfinite(value) else float(value) for value in curve.fnmr],
    }
