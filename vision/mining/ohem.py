"""Online hard example mining (Shrivastava et al., arXiv 1604.03540)."""

from __future__ import annotations

from torch import Tensor

from vision.detection.boxes import nms
from vision.mining.candidates import check_batch_size, combined_loss


class OHEM:
    """The ``batch_size`` regions of largest loss, one of each cluster of overlapping regions.

    Section 4 of the paper: all regions of an image are ranked by classification plus localisation loss; among regions
    of one label that overlap by more than ``nms_threshold``, the one of largest loss stands for all, since the same
    pixels would otherwise be counted several times; there is no quota of foreground. The paper takes 64 regions an
    image and 0.7, applied per label as in the authors' code. None switches the suppression off.

    Fewer than ``batch_size`` come back where fewer survive. Equal losses go to the lower index. A ``Miner``.
    """

    def __init__(self, batch_size: int, nms_threshold: float | None = 0.7) -> None:
        check_batch_size(batch_size)
        self.batch_size = batch_size
        self.nms_threshold = nms_threshold

    def __call__(
        self, classification_loss: Tensor, localization_loss: Tensor, boxes: Tensor, labels: Tensor, progress: float
    ) -> Tensor:
        """Indices of the chosen regions, by falling loss."""
        loss = combined_loss(classification_loss, localization_loss, boxes, labels, progress)
        return rank_by_loss(loss, boxes, labels, self.nms_threshold, self.batch_size)


def rank_by_loss(
    loss: Tensor, boxes: Tensor, labels: Tensor | None, nms_threshold: float | None, limit: int | None = None
) -> Tensor:
    """At most ``limit`` indices by falling ``loss`` [R]; those suppressed by a costlier one of their label are out."""
    if nms_threshold is None:
        return loss.sort(descending=True, stable=True).indices[:limit]
    return nms(boxes.detach(), loss, nms_threshold, labels, limit)
