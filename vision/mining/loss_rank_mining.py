"""Loss rank mining for detectors without a proposal stage (Yu et al., arXiv 1804.04606).

What the paper states: the loss of every element of the final feature map is computed, overlapping elements are thinned
out by a suppression ranked on loss, and only the K elements of largest loss train the network. K, the threshold and
what an element is were not at hand: the defaults below are ours.

Anything that has one loss and one box per element can be mined: the map of a one-stage head, the objectness map of a
region proposal network, or a focal loss (weigh first, select last, so that weights and elements stay aligned).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vision.mining.candidates import MiningInputError
from vision.mining.ohem import rank_by_loss

Element = Literal["prediction", "cell"]


def loss_rank_mining(loss: Tensor, boxes: Tensor, k: int, nms_threshold: float | None = 0.7) -> Tensor:
    """Bool mask [N, M] of the ``k`` elements of largest loss in each of N images.

    ``loss`` [N, M], unreduced and finite; ``boxes`` [N, M, 4], decoded. Elements that overlap a costlier one by more
    than ``nms_threshold`` leave the ranking (None: none do); where fewer than ``k`` remain all of them are kept.
    Equal losses go to the lower index. Multiply the loss by the mask, then sum or average: elements outside get exactly
    zero gradient.
    """
    if loss.ndim != 2 or boxes.shape != (*loss.shape, 4):
        raise MiningInputError(
            f"loss and boxes are {tuple(loss.shape)} and {tuple(boxes.shape)}; give [N, M], [N, M, 4]"
        )
    if k < 1:
        raise MiningInputError(f"k is {k}; at least one element must be kept")
    if not torch.isfinite(loss).all():
        raise MiningInputError("the loss holds NaN or infinity and cannot be ranked; the training has diverged")
    mask = torch.zeros_like(loss, dtype=torch.bool)
    for image_mask, image_loss, image_boxes in zip(mask, loss.detach(), boxes.detach(), strict=True):
        image_mask[rank_by_loss(image_loss, image_boxes, None, nms_threshold, k)] = True
    return mask


@dataclass(frozen=True)
class LossRankMiner:
    """Loss rank mining over the map of a one-stage head.

    ``share`` of the elements is kept in each image (ours: a share keeps its meaning when the input size changes, K does
    not; 0.15 of the 845 elements of YOLOv2 at 416 pixels are 126). ``element`` "prediction" ranks every anchor of every
    cell, "cell" ranks cells by the sum over their anchors and lets the costliest anchor's box stand for the cell. Begin
    mining after warm-up: early losses are noise.
    """

    share: float = 0.15
    nms_threshold: float | None = 0.7
    element: Element = "prediction"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise MiningInputError(f"share is {self.share}; it must be above 0 and at most 1")
        if self.element not in ("prediction", "cell"):
            raise MiningInputError(f"element is {self.element!r}; it must be 'prediction' or 'cell'")

    def __call__(self, loss: Tensor, boxes: Tensor) -> Tensor:
        """Bool mask [N, A, H, W] of the kept elements, for loss [N, A, H, W] and boxes [N, A, H, W, 4]."""
        if loss.ndim != 4 or boxes.shape != (*loss.shape, 4):
            raise MiningInputError(
                f"loss and boxes are {tuple(loss.shape)} and {tuple(boxes.shape)}; give [N, A, H, W], [N, A, H, W, 4]"
            )
        if self.element == "prediction":
            return self._mine(loss.flatten(1), boxes.flatten(1, 3)).view(loss.shape)
        costliest = loss.detach().argmax(dim=1, keepdim=True)
        cell_boxes = boxes.gather(1, costliest.unsqueeze(-1).expand(*costliest.shape, 4))
        mask = self._mine(loss.sum(dim=1).flatten(1), cell_boxes.flatten(1, 3))
        return mask.view(costliest.shape).expand(loss.shape)

    def _mine(self, loss: Tensor, boxes: Tensor) -> Tensor:
        k = max(1, int(self.share * loss.shape[1]))
        return loss_rank_mining(loss, boxes, k, self.nms_threshold)
