"""Boxes as [..., 4] tensors of x1, y1, x2, y2 in pixels: coding, overlap and suppression.

Everything is plain torch and runs where its inputs lie. Coordinates are continuous: a box from 0 to 16 is 16 wide.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# exp() of a larger size delta would make boxes of many image sizes: 1000 / 16 is the usual bound.
MAX_SIZE_DELTA = math.log(1000 / 16)
# Candidates of one suppression block: bounds its overlap matrix to 1 MB.
BLOCK = 512


def encode_boxes(boxes: Tensor, anchors: Tensor, stds: tuple[float, float, float, float] = (1, 1, 1, 1)) -> Tensor:
    """Deltas (tx, ty, tw, th) that turn ``anchors`` into ``boxes``, divided by ``stds``; both [..., 4].

    tx = (x - xa) / wa on centres, tw = log(w / wa) (Ren et al., arXiv 1506.01497, section 3.1.2).
    """
    centres, sizes = _centres_and_sizes(boxes)
    anchor_centres, anchor_sizes = _centres_and_sizes(anchors)
    deltas = torch.cat([(centres - anchor_centres) / anchor_sizes, (sizes / anchor_sizes).log()], dim=-1)
    return deltas / deltas.new_tensor(stds)


def decode_boxes(deltas: Tensor, anchors: Tensor, stds: tuple[float, float, float, float] = (1, 1, 1, 1)) -> Tensor:
    """The inverse of ``encode_boxes``. Size deltas are clamped to +-log(1000 / 16), which keeps exp() finite."""
    deltas = deltas * deltas.new_tensor(stds)
    anchor_centres, anchor_sizes = _centres_and_sizes(anchors)
    centres = anchor_centres + deltas[..., :2] * anchor_sizes
    half_sizes = anchor_sizes * deltas[..., 2:].clamp(-MAX_SIZE_DELTA, MAX_SIZE_DELTA).exp() / 2
    return torch.cat([centres - half_sizes, centres + half_sizes], dim=-1)


def clip_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes cut off at the border of an image of ``height`` by ``width`` pixels."""
    limits = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limits)


def box_area(boxes: Tensor) -> Tensor:
    """Area in square pixels, 0 for a box whose corners are swapped: [..., 4] to [...]."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of every pair: [N, 4] and [M, 4] to [N, M]. Boxes without area overlap nothing."""
    # Coordinate by coordinate: [N, M] maps are several times faster than [N, M, 2] ones.
    x1, y1, x2, y2 = first.unsqueeze(-1).unbind(dim=1)
    other_x1, other_y1, other_x2, other_y2 = second.unbind(dim=1)
    width = (torch.minimum(x2, other_x2) - torch.maximum(x1, other_x1)).clamp_(min=0)
    height = (torch.minimum(y2, other_y2) - torch.maximum(y1, other_y1)).clamp_(min=0)
    intersection = width * height
    union = box_area(first).unsqueeze(1) + box_area(second) - intersection
    return intersection / union.clamp_(min=torch.finfo(union.dtype).tiny)


def nms(
    boxes: Tensor, scores: Tensor, threshold: float, groups: Tensor | None = None, max_kept: int | None = None
) -> Tensor:
    """Greedy suppression: indices of the kept boxes [K] by falling score, equal scores by rising index.

    A box falls to a better one whose IoU with it is above ``threshold``. Boxes [N, 4], finite scores [N]; with
    ``groups`` [N] only boxes of one group suppress each other; ``max_kept`` stops at that many.
    """
    order = scores.sort(descending=True, stable=True).indices
    kept: list[Tensor] = []
    num_kept = 0
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        if kept:
            block = block[~_overlaps(boxes, groups, block, torch.cat(kept), threshold).any(dim=1)]
        block = block[_survivors(_overlaps(boxes, groups, block, block, threshold))]
        kept.append(block)
        num_kept += len(block)
        if max_kept is not None and num_kept >= max_kept:
            break
    return torch.cat(kept)[:max_kept] if kept else order


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    threshold: float = 0.5,
    groups: Tensor | None = None,
    sigma: float | None = None,
    min_score: float = 1e-3,
    max_kept: int = 100,
) -> tuple[Tensor, Tensor]:
    """Soft suppression: indices [K] of the boxes kept and their decayed scores [K], both by falling score.

    Bodla et al., arXiv 1704.04503: once the best box is taken, every other box of its group loses score by its IoU with
    it, linearly where the IoU is at least ``threshold`` (s (1 - IoU)), or as a Gaussian where ``sigma`` is given
    (s exp(-IoU^2 / sigma), without threshold). Boxes whose score falls under ``min_score`` are dropped. Since decay
    only lowers scores, the first ``max_kept`` picks over all groups are the ``max_kept`` best in the end. The answers
    carry no gradient.
    """
    boxes, remaining = boxes.detach(), scores.detach().clone()
    kept: list[int] = []
    kept_scores: list[float] = []
    while len(kept) < min(max_kept, len(boxes)):
        best = int(remaining.argmax())
        score = float(remaining[best])
        if score < min_score:
            break
        kept.append(best)
        kept_scores.append(score)
        overlap = box_iou(boxes[best : best + 1], boxes)[0]
        factor = torch.exp(-overlap.square() / sigma) if sigma else torch.where(overlap >= threshold, 1 - overlap, 1)
        if groups is not None:
            factor = torch.where(groups == groups[best], factor, 1)
        remaining = remaining * factor
        remaining[best] = -torch.inf
    return torch.tensor(kept, dtype=torch.long, device=boxes.device), scores.new_tensor(kept_scores)


def _centres_and_sizes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def _overlaps(boxes: Tensor, groups: Tensor | None, rows: Tensor, columns: Tensor, threshold: float) -> Tensor:
    overlaps = box_iou(boxes[rows], boxes[columns]) > threshold
    return overlaps if groups is None else overlaps & (groups[rows][:, None] == groups[columns][None, :])


def _survivors(overlaps: Tensor) -> Tensor:
    """Which of the boxes, sorted by falling score, greedy suppression keeps: [N, N] bool to [N] bool.

    A box is kept if no kept box before it overlaps it. Applying that rule to all boxes at once, starting from "all are
    kept", settles the boxes from the front and ends at the only fixed point, the greedy answer, after as many rounds as
    the longest chain of suppressions, which is short; a loop over the boxes would take N rounds.
    """
    before = overlaps.tril(diagonal=-1).to(torch.float32)
    kept = before.new_ones(len(before))
    while True:
        settled = ((before @ kept) == 0).to(torch.float32)
        if torch.equal(settled, kept):
            return kept.bool()
        kept = settled
