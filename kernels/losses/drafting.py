"""Losses of feature-level drafters: regression of the target's features, and its distribution.

Shapes: ... any leading dimensions (sequences and positions), H hidden size, V vocabulary. A loss mask [...] is 1 where
a position counts and 0 elsewhere. What it excludes is never computed with, so it may hold anything, NaN too. Means have
the paper's 1e-5 in their denominator: an empty mask gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MASK_EPS = 1e-5


def feature_regression(predicted: Tensor, features: Tensor, loss_mask: Tensor) -> Tensor:
    """SmoothL1 between predicted and true features [..., H], mean over H, then over the mask [...]; fp32 scalar.

    Source: Dovetail (arXiv 2412.18934) section on training, after EAGLE (arXiv 2401.15077).
    """
    counted = loss_mask > 0
    distance = functional.smooth_l1_loss(predicted[counted].float(), features[counted].float(), reduction="none")
    return distance.mean(dim=-1).sum() / (loss_mask.sum() + MASK_EPS)


def soft_cross_entropy(draft_logits: Tensor, target_logits: Tensor, loss_mask: Tensor) -> Tensor:
    """Cross-entropy of the drafter under the target's distribution, logits [..., V], mean over the mask [...]; in nats.

    The target's logits are labels: no gradient flows into them. Source: as ``feature_regression``.
    """
    counted = loss_mask > 0
    target_probs = torch.softmax(target_logits.detach()[counted], dim=-1, dtype=torch.float32)
    draft_log_probs = torch.log_softmax(draft_logits[counted], dim=-1, dtype=torch.float32)
    return -(target_probs * draft_log_probs).sum() / (loss_mask.sum() + MASK_EPS)


def argmax_agreement(draft_logits: Tensor, target_logits: Tensor, loss_mask: Tensor) -> Tensor:
    """Share of the mask's positions where drafter and target, logits [..., V], rank the same token first."""
    same = draft_logits.argmax(dim=-1) == target_logits.argmax(dim=-1)
    return (same & (loss_mask > 0)).sum() / (loss_mask.sum() + MASK_EPS)


def with_feature_noise(features: Tensor, amplitude: float = 0.2, reference_length: int = 512) -> Tensor:
    """``features`` [B, T, H] plus uniform noise U(-0.5, 0.5) * amplitude * reference_length / T, drawn per element.

    So 0.1 at most at 512 positions and less on longer sequences. Source: the authors' training code, after EAGLE.
    """
    scale = amplitude * reference_length / features.shape[-2]
    return features + (torch.rand_like(features) - 0.5) * scale
