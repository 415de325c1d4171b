"""Losses and batch samplers for distilling vision models; each works alone on logits or features of any network."""

from vision.distillation.balance_divergence import BalanceDivergenceLoss
from vision.distillation.correlation_congruence import CongruenceLoss, CorrelationCongruenceLoss, gradient_ratio
from vision.distillation.decoupled import DKDLoss
from vision.distillation.kd import KDLoss
from vision.distillation.sampler import ClassUniformSampler, SamplerError, SuperclassUniformSampler, find_superclasses

__all__ = [
    "BalanceDivergenceLoss",
    "ClassUniformSampler",
    "CongruenceLoss",
    "CorrelationCongruenceLoss",
    "DKDLoss",
    "KDLoss",
    "SamplerError",
    "SuperclassUniformSampler",
    "find_superclasses",
    "gradient_ratio",
]
