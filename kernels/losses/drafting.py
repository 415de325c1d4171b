"""Losses of feature-level drafters: regression of the target's features, and its distribution.

Shapes: ... any leading dimensions (sequences and positions), H hidden size, V vocabulary. A loss mask [...] is 1 where
a position counts and 0 elsewhere. Means have the paper's 1e-5 in their denominator: an empty mask gives 0.
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


def soft_cross_entropy(draft_logits: Tensor, target_logits: Tensor, loss_mask: Tensor) -> Tensor:
    """Cross-entropy of the drafter under the target's distribution, logits [..., V], mean over the mask [...]; in nats.

    The target's logits are labels: no gradient flows into them. Source: as ``feature_regression``.
    """
    target_probs = torch.softmax(target_logits.detach(), dim=-1, dtype=torch.float32)
    draft_log_probs = torch.log_softmax(draft_logits, dim=-1, dtype=torch.float32)
    return masked_mean(-(target_probs * draft_log_probs).sum(dim=-1), loss_mask)


def acceptance_loss(draft_logits: Tensor, target_logits: Tensor, loss_mask: Tensor) -> Tensor:
    """-log of the acceptance, sum over tokens of min(target, draft probability), logits [..., V], mean over the mask.

    The target's logits are labels. Source: the acceptance loss of arXiv 2602.23881, its logarithmic form.
    """
    target_probs = torch.softmax(target_logits.detach(), dim=-1, dtype=torch.float32)
    draft_probs = torch.softmax(draft_logits, dim=-1, dtype=torch.float32)
    acceptance = torch.minimum(target_probs, draft_probs).sum(dim=-1)
    return masked_mean(-acceptance.clamp_min(torch.finfo(torch.float32).tiny).log(), loss_mask)


def total_variation(draft_logits: Tensor, target_logits: Tensor, loss_mask: Tensor) -> Tensor:
    """Half the L1 distance of drafter's and target's distributions, logits [..., V], mean over the mask [...].

    That is 1 - the acceptance, the share of drafts that exact sampling rejects. The target's logits are labels. Its
    gradient vanishes where the distributions hardly meet, so a little cross-entropy goes beside it. Source: DSpark's
    training, 0.1 cross-entropy + 0.9 total variation; the bound it rests on is in arXiv 2302.01318.
    """
    target_probs = torch.softmax(target_logits.detach(), dim=-1, dtype=torch.float32)
    draft_probs = torch.softmax(draft_logits, dim=-1, dtype=torch.float32)
    return masked_mean((target_probs - draft_probs).abs().sum(dim=-1) / 2, loss_mask)


def blended_acceptance_loss(
    draft_logits: Tensor, target_logits: Tensor, loss_mask: Tensor, scale: float = 1.0, decay: float = 3.0
) -> Tensor:
    """``w KL(target || draft) + (1 - w) (1 - acceptance)`` with ``w = scale exp(-decay acceptance)`` at each position.

    A bad draft is pulled in by the divergence, whose gradient does not vanish; a good one is tuned for acceptance
    itself. ``w`` is a weight: no gradient flows through it. Logits [..., V], mean over the mask [...]. Source: the
    acceptance loss of arXiv 2602.23881, its lambda form; the default decay is ours.
    """
    target_log_probs = torch.log_softmax(target_logits.detach(), dim=-1, dtype=torch.float32)
    draft_log_probs = torch.log_softmax(draft_logits, dim=-1, dtype=torch.float32)
    target_probs = target_log_probs.exp()
    divergence = functional.kl_div(draft_log_probs, target_log_probs, reduction="none", log_target=True).sum(dim=-1)
    acceptance = torch.minimum(target_probs, draft_log_probs.exp()).sum(dim=-1)
    weight = scale * torch.exp(-decay * acceptance.detach())
    return masked_mean(weight * divergence + (1 - weight) * (1 - acceptance), loss_mask)


def confidence_loss(confidence: Tensor, accepted: Tensor, loss_mask: Tensor) -> Tensor:
    """Binary cross-entropy of confidence logits [...] against whether the draft is accepted [...], mean over the mask.

    Source: the confidence head of DSpark. In nats; ``accepted`` is 0 or 1, or a share.
    """
    entropy = functional.binary_cross_entropy_with_logits(confidence.float(), accepted.float(), reduction="none")
    return masked_mean(entropy, loss_mask)


def argmax_agreement(draft_logits: Tensor, target_logits: Tensor, loss_mask: Tensor) -> Tensor:
    """Share of the mask's positions where drafter and target, logits [..., V], rank the same token first."""
    # ``max`` and not ``argmax``: over bf16 on a CPU it takes a quarter of the time (7 against 30 ms at [2040, 4096]).
    same = draft_logits.max(dim=-1).indices == target_logits.max(dim=-1).indices
    return masked_mean(same.float(), loss_mask)


def with_feature_noise(features: Tensor, amplitude: float = 0.2, reference_length: int = 512) -> Tensor:
    """``features`` [B, T, H] plus uniform noise U(-0.5, 0.5) * amplitude * reference_length / T, drawn per element.

    So 0.1 at most at 512 positions and less on longer sequences. Source: the authors' training code, after EAGLE.
    """
    scale = amplitude * reference_length / features.shape[-2]
    return features + (torch.rand_like(features) - 0.5) * scale
