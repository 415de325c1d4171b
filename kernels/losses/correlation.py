"""Correlation between the samples of a batch, and how far two batches' correlations lie apart.

Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019 (arXiv 1904.01802), section 3. Embeddings
are [N, D]; a correlation matrix is [N, N], so that student and teacher may differ in D. Half precision is widened to
float32, float64 stays float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.losses.divergence import at_least_float32
from kernels.losses.errors import ShapeMismatch


def mean_difference_correlation(embeddings: Tensor) -> Tensor:
    """|mean(f_i) - mean(f_j)|, means over the D features: [N, D] to [N, N].

    The linear kernel, called naive MMD in section 3.3 of the paper and its weakest. The absolute value is ours: MMD is
    a distance, and the paper does not say what becomes of the sign.
    """
    means = at_least_float32(embeddings).mean(dim=1)
    return (means.unsqueeze(1) - means.unsqueeze(0)).abs()


def bilinear_correlation(embeddings: Tensor) -> Tensor:
    """f_i . f_j, which is the cosine for unit embeddings: [N, D] to [N, N]. Bilinear pool of section 3.3."""
    wide = at_least_float32(embeddings)
    return wide @ wide.T


def rbf_correlation(embeddings: Tensor, gamma: float) -> Tensor:
    """exp(-gamma |f_i - f_j|^2), exactly: [N, D] to [N, N]. Gaussian RBF of section 3.3."""
    gram = bilinear_correlation(embeddings)
    squared_norms = gram.diagonal()
    return torch.exp(-gamma * (squared_norms.unsqueeze(1) + squared_norms.unsqueeze(0) - 2 * gram))


def taylor_rbf_correlation(unit_embeddings: Tensor, gamma: float, order: int) -> Tensor:
    """The Gaussian RBF by its Taylor series up to ``order``: unit embeddings [N, D] to [N, N].

    sum over p = 0..P of exp(-2 gamma) (2 gamma)^p / p! (f_i . f_j)^p, section 3.3 equation 8 (which prints the exponent
    of the last factor as P; it must be p). The prefactor stands for exp(-gamma (|f_i|^2 + |f_j|^2)), so the series is
    the RBF only for embeddings of unit length. For gamma >= 1 an odd order can go negative.
    """
    cosines = bilinear_correlation(unit_embeddings)
    term = torch.full_like(cosines, math.exp(-2 * gamma))
    total = term
    for power in range(1, order + 1):
        term = term * cosines * (2 * gamma / power)
        total = total + term
    return total


def correlation_congruence(student_correlation: Tensor, teacher_correlation: Tensor) -> Tensor:
    """Mean squared difference of two correlation matrices [N, N], a scalar: L_CC, section 3.2 equation 6."""
    if student_correlation.shape != teacher_correlation.shape:
        raise ShapeMismatch(
            f"the student's correlation matrix is {tuple(student_correlation.shape)} and the teacher's "
            f"{tuple(teacher_correlation.shape)}; both must come from the same batch"
        )
    return (student_correlation - teacher_correlation).square().mean()
