"""One feature for many images of a person, the better ones counting more."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def pool_template(features: Tensor, quality: Tensor, media_ids: Tensor | None = None) -> Tensor:
    """The unit feature [D] of a template of features [N, D] with weights ``quality`` [N], at least 0.

    With ``media_ids`` [N] the images of one medium (the frames of a video) are joined first, then the media with equal
    weight, as the IJB protocols do. Where all weights are 0 they count alike.
    """
    if features.ndim != 2 or len(features) == 0 or quality.shape != features.shape[:1]:
        raise ValueError(
            f"features are {tuple(features.shape)} and quality {tuple(quality.shape)}; give [N, D] and [N], N above 0"
        )
    if not (torch.isfinite(quality) & (quality >= 0)).all():
        raise ValueError("quality holds a negative or non-finite weight; leave out images that could not be assessed")
    if media_ids is None:
        return functional.normalize(_weighted_mean(features, quality), dim=0)
    media = [media_ids == medium for medium in torch.unique(media_ids)]
    return functional.normalize(
        torch.stack([_weighted_mean(features[m], quality[m]) for m in media]).mean(dim=0), dim=0
    )


def _weighted_mean(features: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum()
    if total == 0:
        return features.mean(dim=0)
    return (features * weights[:, None]).sum(dim=0) / total
