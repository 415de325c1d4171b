"""How a student compares with its teacher beyond accuracy: calibration, agreement, mass on what the teacher excludes.

Reverse divergences raise the confidence in the label, so accuracy alone does not show their cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CALIBRATION_BINS = 15
TAIL_PROBABILITY = 1e-3


@dataclass(frozen=True)
class Fidelity:
    """Shares in [0, 1]: expected calibration error, agreement of the two arg-maxes, excess tail mass."""

    calibration_error: float
    agreement: float
    tail_mass: float


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: mean |accuracy - confidence| over ``bins`` equal bins of the confidence, by size.

    ``probabilities`` [N, C] with rows that add up to 1, ``labels`` [N]. Source: Guo et al., arXiv 1706.04599, eq. 3.
    """
    confidence, chosen = probabilities.max(dim=1)
    right = (chosen == labels).to(probabilities.dtype)
    # Bins are (a, b]: a confidence of exactly 1 belongs to the last one.
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=probabilities.dtype, device=labels.device).index_add_(0, index, right - confidence)
    return float(gap.abs().sum() / len(labels))


def excess_tail_mass(student: Tensor, teacher: Tensor) -> float:
    """Mean over rows of sum max(q - p, 0) over the classes the teacher gives p < 0.001; both [N, C] probabilities."""
    tail = teacher < TAIL_PROBABILITY
    return float(((student - teacher).clamp_min(0) * tail).sum(dim=1).mean())


def fidelity(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Fidelity:
    """All three figures over a data set: logits [N, C] of both, ``labels`` [N]; temperature 1."""
    student, teacher = student_logits.double().softmax(dim=1), teacher_logits.double().softmax(dim=1)
    agreement = float((student.argmax(dim=1) == teacher.argmax(dim=1)).double().mean())
    return Fidelity(calibration_error(student, labels), agreement, excess_tail_mass(student, teacher))
