"""What mining is compared with: all regions, random ones, random predictions, and the focal loss."""

from __future__ import annotations

import torch
from torch import Tensor

from vision.detection.matching import sample_balanced
from vision.mining.candidates import MiningInputError, check_batch_size, combined_loss


class AllRegions:
    """Every region trains: no mining. A ``Miner``."""

    def __call__(
        self, classification_loss: Tensor, localization_loss: Tensor, boxes: Tensor, labels: Tensor, progress: float
    ) -> Tensor:
        """All indices in their order."""
        combined_loss(classification_loss, localization_loss, boxes, labels, progress)
        return torch.arange(len(labels), device=labels.device)


class RandomSample:
    """``batch_size`` random regions, at most ``positive_share`` of them foreground (Girshick, arXiv 1504.08083, 2.3).

    Draws from ``generator``, or torch's own. A ``Miner``.
    """

    def __init__(self, batch_size: int, positive_share: float = 0.25, generator: torch.Generator | None = None) -> None:
        check_batch_size(batch_size)
        if not 0 <= positive_share <= 1:
            raise MiningInputError(f"positive_share is {positive_share}; it must be from 0 to 1")
        self.batch_size = batch_size
        self.positive_share = positive_share
        self.generator = generator

    def __call__(
        self, classification_loss: Tensor, localization_loss: Tensor, boxes: Tensor, labels: Tensor, progress: float
    ) -> Tensor:
        """Indices of the chosen regions, foreground first."""
        combined_loss(classification_loss, localization_loss, boxes, labels, progress)
        positives, negatives = sample_balanced(
            labels > 0, labels == 0, self.batch_size, self.positive_share, self.generator
        )
        return torch.cat([positives, negatives])


class RandomPredictions:
    """A random ``share`` of the predictions of a one-stage head, as many as ``LossRankMiner`` keeps.

    Draws from torch's own generator.
    """

    def __init__(self, share: float) -> None:
        if not 0 < share <= 1:
            raise MiningInputError(f"share is {share}; it must be above 0 and at most 1")
        self.share = share

    def __call__(self, loss: Tensor, boxes: Tensor) -> Tensor:
        """Bool mask of the shape of ``loss`` [N, A, H, W]; ``boxes`` are not looked at."""
        del boxes
        drawn = torch.rand(loss.shape[0], loss[0].numel(), device=loss.device)
        count = max(1, int(self.share * drawn.shape[1]))
        mask = torch.zeros_like(drawn, dtype=torch.bool).scatter_(1, drawn.topk(count).indices, True)
        return mask.view(loss.shape)


def focal_loss(cross_entropy: Tensor, positive: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """alpha_t (1 - p_t)^gamma CE, unreduced (Lin et al., arXiv 1708.02002, equation 5).

    ``cross_entropy`` is the unreduced cross-entropy of any classifier, sigmoid or softmax, so that p_t = exp(-CE);
    ``positive`` (bool, same shape) says which elements take alpha and which 1 - alpha. ``gamma`` is 0 or at least 1:
    between them the gradient is infinite at a perfect prediction. Divide the sum by the number of positives, as the
    paper does.
    """
    if gamma != 0 and gamma < 1:
        raise ValueError(f"gamma is {gamma}; it must be 0 or at least 1")
    weight = torch.where(positive, alpha, 1 - alpha)
    return weight * (-torch.expm1(-cross_entropy)).pow(gamma) * cross_entropy
