"""Losses both wings train with: pure functions over logits and embeddings, no reduction that hides a choice."""

from kernels.losses.correlation import (
    bilinear_correlation,
    correlation_congruence,
    mean_difference_correlation,
    rbf_correlation,
    taylor_rbf_correlation,
)
from kernels.losses.divergence import (
    at_least_float32,
    balance_divergence,
    check_temperature,
    forward_kl,
    reverse_kl,
    target_class_divergence,
    without_label,
)
from kernels.losses.errors import BatchTooSmall, InvalidTemperature, LossInputError, NonFiniteInput, ShapeMismatch

__all__ = [
    "BatchTooSmall",
    "InvalidTemperature",
    "LossInputError",
    "NonFiniteInput",
    "ShapeMismatch",
    "at_least_float32",
    "balance_divergence",
    "bilinear_correlation",
    "check_temperature",
    "correlation_congruence",
    "forward_kl",
    "mean_difference_correlation",
    "rbf_correlation",
    "reverse_kl",
    "target_class_divergence",
    "taylor_rbf_correlation",
    "without_label",
]
