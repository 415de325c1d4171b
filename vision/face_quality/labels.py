"""Quality labels from recognition: how close an image lies to the centre of its identity.

quality(x) = cosine(f_x, u_y), f the feature of a frozen recognition network and u_y its identity's class centre (Peng
et al., arXiv 2106.04852). Leaving the image out of its own centre, weighting the centre and the balancing are ours; the
paper says only that it balances.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


class LabelInputError(ValueError):
    """Features and identities from which no labels can be made."""


@dataclass(frozen=True)
class QualityLabels:
    """``raw`` cosines [N] in -1..1, the ``labels`` [N] clipped to 0..1, and which of them are ``usable`` [N]."""

    raw: Tensor
    labels: Tensor
    usable: Tensor


def quality_labels(
    features: Tensor,
    identities: Tensor,
    leave_one_out: bool = True,
    reweightings: int = 1,
    min_images: int = 10,
    min_raw: float = 0.05,
) -> QualityLabels:
    """Labels of N images from their recognition features [N, D] (any length) and identities [N].

    Without ``leave_one_out`` an image pulls the centre towards itself: pure noise then gets 1 / sqrt(n) among n images.
    Each of ``reweightings`` recomputes the centres with weights max(raw, 0), so that bad images count less. Usable are
    images of identities with at least ``min_images`` (never fewer than two) whose cosine reaches ``min_raw``; below
    that the identity is probably wrong. Cosines of an identity's only image are 0.
    """
    features, members, counts = _check(features, identities)
    weights = torch.ones(len(features), dtype=features.dtype, device=features.device)
    raw = _cosines(features, members, weights, leave_one_out)
    for _ in range(reweightings):
        weights = raw.clamp(min=0)
        total = torch.zeros(len(counts), dtype=weights.dtype, device=weights.device).index_add_(0, members, weights)
        # An identity whose images all disagree has no better centre than the plain one.
        weights = torch.where(total[members] > 0, weights, torch.ones_like(weights))
        raw = _cosines(features, members, weights, leave_one_out)
    enough = counts[members] >= max(min_images, 2)
    raw = torch.where(counts[members] >= 2, raw, torch.zeros_like(raw))
    return QualityLabels(raw, raw.clamp(0, 1), enough & (raw >= min_raw))


def ranks_within(raw: Tensor, identities: Tensor) -> Tensor:
    """Labels [N] in 0..1: the share of the identity's other images whose raw cosine is lower, ties counting half.

    Ours. Cosines of defects that a recogniser nearly forgives lie within 0.05 of those of good images and differ more
    from person to person; ranks within a person spread them out and favour nobody. An only image gets 0.5.
    """
    labels = torch.full_like(raw, 0.5)
    for identity in torch.unique(identities):
        rows = torch.nonzero(identities == identity).squeeze(1)
        own = raw[rows]
        if len(rows) > 1:
            lower = (own[None] < own[:, None]).sum(dim=1)
            ties = (own[None] == own[:, None]).sum(dim=1) - 1
            labels[rows] = ((lower + 0.5 * ties) / (len(rows) - 1)).to(raw.dtype)
    return labels


def balancing_weights(labels: Tensor, power: float = 0.5, num_bins: int = 20, max_oversampling: float = 10.0) -> Tensor:
    """Sampling weights [N], of mean 1, that flatten the distribution of ``labels`` [N] in 0..1.

    Each image weighs (images in its bin) ** -power: 0 leaves the distribution, 1 makes it flat. No image is drawn more
    than ``max_oversampling`` times as often as under uniform sampling. Without balancing most web faces lie at 0.6 to
    0.9 and a network learns to answer their mean.
    """
    if max_oversampling < 1:
        raise LabelInputError(f"max_oversampling is {max_oversampling}; it must be at least 1")
    bins = (labels * num_bins).long().clamp(0, num_bins - 1)
    weights = torch.bincount(bins, minlength=num_bins)[bins].to(labels.dtype).pow(-power)
    weights = weights / weights.mean()
    # Capping lowers the mean and restoring it lifts the others, perhaps over the cap in turn.
    while weights.numel() and weights.max() > max_oversampling * (1 + 1e-6):
        weights = weights.clamp(max=max_oversampling)
        weights = weights / weights.mean()
    return weights


def _check(features: Tensor, identities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features, the identity of each image as 0, 1, 2 ..., and the images of each identity."""
    if features.ndim != 2 or identities.shape != features.shape[:1]:
        raise LabelInputError(
            f"features are {tuple(features.shape)} and identities {tuple(identities.shape)}; give [N, D] and [N]"
        )
    lengths = features.norm(dim=1)
    if not (torch.isfinite(lengths) & (lengths > 0)).all():
        bad = int((~(torch.isfinite(lengths) & (lengths > 0))).sum())
        raise LabelInputError(f"{bad} of {len(features)} features are zero, NaN or infinite; drop those images")
    _, members, counts = torch.unique(identities, return_inverse=True, return_counts=True)
    return functional.normalize(features), members, counts


def _cosines(features: Tensor, members: Tensor, weights: Tensor, leave_one_out: bool) -> Tensor:
    """Cosine of each unit feature with its weighted class centre, with or without itself; 0 where it is empty."""
    weighted = features * weights[:, None]
    sums = torch.zeros(int(members.max()) + 1, features.shape[1], dtype=features.dtype, device=features.device)
    whole = sums.index_add_(0, members, weighted)[members]
    centres = whole - weighted if leave_one_out else whole
    return (features * functional.normalize(centres)).sum(dim=1)
