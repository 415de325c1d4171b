"""The true boxes a detector trains on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class TrueBoxError(ValueError):
    """An image's true boxes or labels cannot be trained on."""


def check_truth(true_boxes: Sequence[Tensor], true_labels: Sequence[Tensor], num_classes: int) -> None:
    """Refuse a batch whose boxes and labels do not fit each other, the images or the model; raises ``TrueBoxError``."""
    for i, (boxes, labels) in enumerate(zip(true_boxes, true_labels, strict=True)):
        if boxes.shape != (len(labels), 4):
            raise TrueBoxError(f"image {i} of the batch has boxes {tuple(boxes.shape)} for {len(labels)} labels")
        if not (boxes[:, 2:] > boxes[:, :2]).all():
            raise TrueBoxError(
                f"image {i} of the batch has a box without area or with swapped corners; drop it at load"
            )
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
            raise TrueBoxError(
                f"image {i} of the batch has labels {labels.min()} to {labels.max()}; "
                f"the model knows 0 to {num_classes - 1}"
            )
