"""Mean intersection over union."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = 255
"""The label of pixels that are not counted, as in VOC and Cityscapes."""
RARE = 0.02
"""A class with a smaller share of the labelled pixels is rare."""


@dataclass(frozen=True)
class SegmentationReport:
    """``mean_iou`` over the classes that occur in labels or predictions, ``iou`` of each class (None: never seen).

    ``rare_iou`` is the mean over those that occur and have less than two in a hundred labelled pixels (None: no such).
    """

    mean_iou: float
    rare_iou: float | None
    pixel_accuracy: float
    iou: dict[str, float | None]
    images: int


class ConfusionMatrix:
    """Counts of (labelled, predicted) pixels over a data set."""

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.long)
        self.images = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """``logits`` [B, C, h, w] of any resolution, ``labels`` [B, H, W]; the logits are scaled to the labels."""
        size = len(self.counts)
        chosen = functional.interpolate(logits.float(), labels.shape[1:], mode="bilinear").argmax(dim=1)
        counted = labels != IGNORED
        pairs = (labels[counted].long() * size + chosen[counted]).cpu()
        self.counts += torch.bincount(pairs, minlength=size * size).view(size, size)
        self.images += len(labels)

    def report(self, class_names: tuple[str, ...]) -> SegmentationReport:
        """Intersection over union of what was counted so far."""
        right = self.counts.diagonal().double()
        union = self.counts.sum(dim=0) + self.counts.sum(dim=1) - self.counts.diagonal()
        iou = {name: float(right[c] / union[c]) if union[c] else None for c, name in enumerate(class_names)}
        seen = [value for value in iou.values() if value is not None]
        shares = self.counts.sum(dim=1).double() / self.counts.sum().clamp_min(1)
        rare = [value for value, share in zip(iou.values(), shares, strict=True) if value is not None and share < RARE]
        return SegmentationReport(
            mean_iou=sum(seen) / len(seen) if seen else 0.0,
            rare_iou=sum(rare) / len(rare) if rare else None,
            pixel_accuracy=float(right.sum() / self.counts.sum().clamp_min(1)),
            iou=iou,
            images=self.images,
        )
