"""Losses of feature-level drafters: regression of the target's features, and its distribution.

Shapes: ... any leading dimensions (sequences and positions), H hidden size, V vocabulary. A loss mask [...] is 1 where
a position counts and 0 elsewhere. Means have the paper's 1e-5 in their denominator: an empty mask gives 0. What
compares distributions takes the drafter's log-probabilities and the target's probabilities, both fp32 [..., V]; the
latter are labels, of which nobody wants a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MASK_EPS = 1e-5


def masked_mean(values: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean of ``values`` [...] over the positions of ``loss_mask`` [...]; what stands elsewhere has no influence."""
    counted = torch.where(loss_mask > 0, values, torch.zeros_like(values))
    return counted.sum() / (loss_mask.sum() + MASK_EPS)


def feature_regression(predicted: Tensor, features: Tensor, loss_mask: Tensor) -> Tensor:
    """SmoothL1 between predicted and true features [..., H], mean over H, then over the mask [...]; fp32 scalar.

    Source: Dovetail (arXiv 2412.18934) section on training, after EAGLE (arXiv 2401.15077).
    """
    distance = functional.smooth_l1_loss(predicted.float(), features.float(), reduction="none")
    return masked_mean(distance.mean(dim=-1), loss_mask)


def soft_cross_entropy(draft_log_probs: Tensor, target_probs: Tensor) -> Tensor:
    """Cross-entropy of the drafter under the target's distribution, [..., V] -> [...], in nats.

    Source: as ``feature_regression``.
    """
    return -(target_probs * draft_log_probs).sum(dim=-1)


def acceptance(draft_log_probs: Tensor, target_probs: Tensor) -> Tensor:
    """Share of drafts that exact sampling accepts: sum over tokens of min(target, draft probability), -> [...]."""
    return torch.minimum(target_probs, draft_log_probs.exp()).sum(dim=-1)


def acceptance_loss(draft_log_probs: Tensor, target_probs: Tensor) -> Tensor:
    """-log of the acceptance, [..., V] -> [...]. Source: the loss of arXiv 2602.23881, its logarithmic form."""
    return -acceptance(draft_log_probs, target_probs).clamp_min(torch.finfo(torch.float32).tiny).log()


def total_variation(draft_log_probs: Tensor, target_probs: Tensor) -> Tensor:
    """Half the L1 distance of drafter's and target's distributions, [..., V] -> [...].

    That is 1 - the acceptance, the share of drafts that exact sampling rejects. Its gradient vanishes where the
    distributions hardly meet, so a little cross-entropy goes beside it. Source: DSpark's training, 0.1 cross-entropy +
    0.9 total variation; the bound it rests on is in arXiv 2302.01318.
    """
    return (target_probs - draft_log_probs.exp()).abs().sum(dim=-1) / 2


def blended_acceptance_loss(
    draft_log_probs: Tensor, target_probs: Tensor, scale: float = 1.0, decay: float = 3.0
) -> Tensor:
    """``w KL(target || draft) + (1 - w) (1 - acceptance)`` with ``w = scale exp(-decay acceptance)``, -> [...].

    A bad draft is pulled in by the divergence, whose gradient does not vanish; a good one is tuned for acceptance
    itself. ``w`` is a weight: no gradient flows through it. Source: the acceptance loss of arXiv 2602.23881, its lambda
    form; the default decay is ours.
    """
    entropy: Tensor = torch.special.entr(target_probs).sum(dim=-1)
    divergence = soft_cross_entropy(draft_log_probs, target_probs) - entropy
    accepted = acceptance(draft_log_probs, target_probs)
    weight = scale * torch.exp(-decay * accepted.detach())
    return weight * divergence + (1 - weight) * (1 - accepted)


def confidence_loss(confidence: Tensor, accepted: Tensor, loss_mask: Tensor) -> Tensor:
    """Binary cross-entropy of confidence logits [...] against whether the draft is accepted [...], mean over the mask.

    Source: the confidence head of DSpark. In nats; ``accepted`` is 0 or 1, or a share.
    """
    entropy = functional.binary_cross_entropy_with_logits(confidence.float(), accepted.float(), reduction="none")
    return masked_mean(entropy, loss_mask)


def with_feature_noise(features: Tensor, amplitude: float = 0.2, reference_length: int = 512) -> Tensor:
    """``features`` [B, T, H] plus uniform noise U(-0.5, 0.5) * amplitude * reference_length / T, drawn per element.

    So 0.1 at most at 512 positions and less on longer sequences. Source: the authors' training code, after EAGLE.
    """
    scale = amplitude * reference_length / features.shape[-2]
    return features + (torch.rand_like(features) - 0.5) * scale
