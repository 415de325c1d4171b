"""What a miner is given: the unreduced losses of an image's candidate regions."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class MiningInputError(ValueError):
    """Losses, boxes, labels, progress or a setting do not make sense for a miner."""


class Miner(Protocol):
    """Chooses the regions of one image that a two-stage detector trains on."""

    def __call__(
        self, classification_loss: Tensor, localization_loss: Tensor, boxes: Tensor, labels: Tensor, progress: float
    ) -> Tensor:
        """Indices of the chosen regions.

        ``classification_loss`` and ``localization_loss`` [R] are per region and not weighted against each other, the
        latter 0 for background; ``boxes`` [R, 4]; ``labels`` [R] with 0 for background; ``progress`` from 0 to 1 is the
        share of training done. Indices carry no gradient: index the losses with them and average.
        """
        ...


def combined_loss(
    classification_loss: Tensor, localization_loss: Tensor, boxes: Tensor, labels: Tensor, progress: float
) -> Tensor:
    """The sum of both losses [R], detached, after checking what a ``Miner`` is called with."""
    count = len(classification_loss)
    shapes = [tuple(x.shape) for x in (classification_loss, localization_loss, boxes, labels)]
    if shapes != [(count,), (count,), (count, 4), (count,)]:
        raise MiningInputError(f"losses, boxes and labels are {shapes}; they must be [R], [R], [R, 4] and [R]")
    if not 0 <= progress <= 1:
        raise MiningInputError(f"progress is {progress}; it must be from 0 (start of training) to 1 (its end)")
    total = (classification_loss + localization_loss).detach()
    if not torch.isfinite(total).all():
        raise MiningInputError("the losses hold NaN or infinity and cannot be ranked; the training has diverged")
    return total


def check_batch_size(batch_size: int) -> None:
    """Refuse to choose fewer than one region."""
    if batch_size < 1:
        raise MiningInputError(f"batch_size is {batch_size}; a miner must be allowed at least one region")
