"""Which candidate box answers for which true box, and a random, balanced choice among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vision.detection.boxes import box_iou


@dataclass(frozen=True)
class Matches:
    """The match of M candidates with an image's true boxes.

    ``box_ids`` [M] is the index of the true box of largest IoU, meaningful where ``positive`` [M] is set; ``negative``
    [M] marks background. Candidates that are neither are left out of training.
    """

    box_ids: Tensor
    positive: Tensor
    negative: Tensor


def match_boxes(
    candidates: Tensor,
    true_boxes: Tensor,
    positive_iou: float,
    negative_iou: float,
    rescue_iou: float | None = None,
) -> Matches:
    """Match candidates [M, 4] with true boxes [G, 4].

    Positive at an IoU of at least ``positive_iou``, negative below ``negative_iou``. With ``rescue_iou`` a true box
    also makes its best candidates positive, for that box, if their IoU reaches it (Ren et al., arXiv 1506.01497,
    3.1.2). An image without true boxes is all background.
    """
    if len(true_boxes) == 0:
        everything = torch.ones(len(candidates), dtype=torch.bool, device=candidates.device)
        return Matches(torch.zeros_like(everything, dtype=torch.long), ~everything, everything)
    overlaps = box_iou(candidates, true_boxes)
    best_overlap, box_ids = overlaps.max(dim=1)
    positive = best_overlap >= positive_iou
    if rescue_iou is not None:
        best_of_box = overlaps.amax(dim=0)
        rescued = (overlaps == best_of_box) & (best_of_box >= rescue_iou)
        # A candidate that is the best of several boxes answers for the one it overlaps most.
        rescued_overlap, rescued_ids = torch.where(rescued, overlaps, -1).max(dim=1)
        box_ids = torch.where(rescued_overlap >= 0, rescued_ids, box_ids)
        positive = positive | (rescued_overlap >= 0)
    return Matches(box_ids, positive, (best_overlap < negative_iou) & ~positive)


def sample_balanced(
    positive: Tensor, negative: Tensor, count: int, positive_share: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Random indices of positives and of negatives, ``count`` together where there are enough.

    At most ``count * positive_share`` are positive; negatives fill the rest. The generator lives on the
    CPU; None is torch's own.
    """
    positives = positive.nonzero().flatten()
    negatives = negative.nonzero().flatten()
    num_positives = min(len(positives), int(count * positive_share))
    num_negatives = min(len(negatives), count - num_positives)
    return _draw(positives, num_positives, generator), _draw(negatives, num_negatives, generator)


def _draw(indices: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    chosen = torch.randperm(len(indices), generator=generator)[:count]
    return indices[chosen.to(indices.device)]
