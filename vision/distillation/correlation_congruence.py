"""Correlation congruence (Peng et al., ICCV 2019, arXiv 1904.01802): the student copies how samples relate.

The full method is an instance term (KD on logits, or the L2 distance of embeddings for metric learning) plus this one.
Student and teacher embeddings may differ in width, since only the N x N matrices meet; an embedding layer is needed
only where the pooled features are too wide to multiply. Where one is used, train the teacher's with the teacher and
freeze it: trained jointly with the student, both can collapse to a constant, for which this loss is zero.

The weight matters more than anything else. For unit embeddings the loss is a few thousandths, and the paper's weight of
0.003 then leaves a gradient some 1e-5 times that of KD: a dead term. Choose the weight with ``gradient_ratio``, so that
this term's gradient is 5 to 50 % of the instance term's (about 10 to 100 on CIFAR-size nets), and log that ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.losses import (
    BatchTooSmall,
    ShapeMismatch,
    at_least_float32,
    correlation_congruence,
    rbf_correlation,
    taylor_rbf_correlation,
)
from vision.distillation.checks import check_finite

Correlation = Callable[[Tensor], Tensor]


class CongruenceLoss(nn.Module):
    """Mean squared difference of the two batches' correlations, for any ``correlation`` of unit embeddings.

    ``correlation`` maps [N, D] to [N, N]: ``bilinear_correlation`` and ``mean_difference_correlation`` of
    ``kernels.losses`` are the paper's other two. Embeddings are [N, D], scaled to unit length here (the paper does not
    say; its Taylor series requires it); the teacher gets no gradient. The mean runs over all N^2 pairs, so that a
    published weight for a sum must be multiplied by N^2.

    Raises ``ShapeMismatch``, ``BatchTooSmall`` (a batch of one has no pair) and ``NonFiniteInput``.
    """

    def __init__(self, correlation: Correlation) -> None:
        super().__init__()
        self.correlation = correlation

    def forward(self, student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
        """The loss, a scalar of at least float32."""
        _check_embeddings(student_embeddings, teacher_embeddings)
        student = functional.normalize(at_least_float32(student_embeddings))
        teacher = functional.normalize(at_least_float32(teacher_embeddings.detach()))
        return correlation_congruence(self.correlation(student), self.correlation(teacher))


class CorrelationCongruenceLoss(CongruenceLoss):
    """Correlation congruence with the Gaussian RBF, the best kernel of the paper.

    ``order`` is the order of its Taylor series; None takes the exact kernel. Defaults are the paper's (section 4).
    """

    def __init__(self, gamma: float = 0.4, order: int | None = 2) -> None:
        if not (math.isfinite(gamma) and gamma > 0):
            raise ValueError(f"gamma is {gamma}; it must be a finite number above 0")
        if order is not None and order < 1:
            raise ValueError(f"order is {order}; it must be at least 1 (0 makes a constant of every batch), or None")
        super().__init__(
            partial(rbf_correlation, gamma=gamma)
            if order is None
            else partial(taylor_rbf_correlation, gamma=gamma, order=order)
        )
        self.gamma = gamma
        self.order = order

    def extra_repr(self) -> str:
        """The settings, for the printed model."""
        return f"gamma={self.gamma}, order={self.order}"


def gradient_ratio(term: Tensor, reference: Tensor, wrt: Tensor) -> float:
    """Norm of ``term``'s gradient over that of ``reference``, both in the tensor ``wrt``; the graph is kept.

    ``wrt`` is a tensor both losses depend on, usually the student's pooled features. Multiply a weight by
    wanted / ratio to bring the term to the wanted share. Infinite where the reference has no gradient.
    """
    (of_term,) = torch.autograd.grad(term, wrt, retain_graph=True)
    (of_reference,) = torch.autograd.grad(reference, wrt, retain_graph=True)
    norm = of_reference.norm().item()
    return of_term.norm().item() / norm if norm else math.inf


def _check_embeddings(student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ShapeMismatch(
            f"student embeddings are {tuple(student.shape)} and teacher embeddings {tuple(teacher.shape)}; "
            "both must be [N, D] of one batch (D may differ)"
        )
    if len(student) < 2:
        raise BatchTooSmall(f"the batch holds {len(student)} sample; correlation needs at least 2, better 32 or more")
    check_finite("student's embeddings", student)
    check_finite("teacher's embeddings", teacher)
