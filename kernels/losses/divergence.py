"""Divergences between a student's and a teacher's softmax, one value per row.

Shapes: logits are [..., C] with the classes last; every function answers [...], summed over classes and not reduced
further, so that callers mask rows (padding, ignored pixels) and average as their task asks.

Everything is computed in log space and never below float32: half-precision logits are widened first, because a softmax
that underflows to 0 has no logarithm, and float64 stays float64. Each divergence is multiplied by its temperature
squared: the gradient of the bare divergence shrinks as 1/T^2, so that the factor keeps the balance with a
cross-entropy beside it when the temperature moves (Hinton et al., arXiv 1503.02531, section 2).

Nothing is detached here. Callers detach the teacher; ``vision.distillation`` does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.losses.errors import InvalidTemperature, ShapeMismatch


def check_temperature(name: str, temperature: float) -> None:
    """Refuse a temperature that is not a positive, finite number."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise InvalidTemperature(f"{name} is {temperature}; it must be a finite number above 0 (1 leaves logits as is)")


def check_same_classes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuse logits of different shape; a difference in the last dimension is called a class count."""
    if student_logits.shape == teacher_logits.shape:
        return
    if student_logits.shape[-1:] != teacher_logits.shape[-1:]:
        raise ShapeMismatch(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} differ in "
            "their class count; both must classify the same classes: take a teacher trained on the student's label set"
        )
    raise ShapeMismatch(
        f"student logits are {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)}; "
        "they must agree: give both networks the same batch at the same resolution"
    )


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half-precision tensors to float32; leave float32 and float64 alone."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p || q), p the teacher's and q the student's softmax at ``temperature``: [..., C] to [...].

    Hinton et al., arXiv 1503.02531. Its gradient in the student's logits is T (q - p): linear in the gap, so a class
    of tiny p is pushed down with force T q only, whatever the ratio q / p.
    """
    log_q, log_p = _log_softmax_pair(student_logits, teacher_logits, temperature)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(q || p), p the teacher's and q the student's softmax at ``temperature``: [..., C] to [...].

    The compensation term of balance divergence (Qi et al., arXiv 2501.07804). Its gradient in the student's logits is
    T q (log(q / p) - KL(q || p)): the log ratio amplifies tail classes that the student over-estimates.
    """
    log_q, log_p = _log_softmax_pair(student_logits, teacher_logits, temperature)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(dim=-1)


def balance_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    forward_weight: float,
    reverse_weight: float,
    forward_temperature: float,
    reverse_temperature: float,
) -> Tensor:
    """Weighted sum of the forward KL and the reverse KL, each at its own temperature: [..., C] to [...].

    Balance divergence distillation (Qi et al., arXiv 2501.07804), in the form that covers every reading of its
    abstract; independent weights and temperatures are ours, since the full text was not at hand. Equal weights and
    temperatures give the Jeffreys divergence. A term of weight 0 is not computed, so that ``reverse_weight`` 0 is
    bit-identical to the forward KL.
    """
    check_temperature("forward_temperature", forward_temperature)
    check_temperature("reverse_temperature", reverse_temperature)
    if reverse_weight == 0:
        return forward_weight * forward_kl(student_logits, teacher_logits, forward_temperature)
    reverse = reverse_weight * reverse_kl(student_logits, teacher_logits, reverse_temperature)
    if forward_weight == 0:
        return reverse
    return forward_weight * forward_kl(student_logits, teacher_logits, forward_temperature) + reverse


def target_class_divergence(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """T^2 times the binary KL between (p_y, 1 - p_y) of teacher and student: [..., C] and labels [...] to [...].

    The TCKD term of decoupled distillation (Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, section 3.2).
    """
    check_temperature("temperature", temperature)
    check_same_classes(student_logits, teacher_logits)
    student = _label_against_rest(student_logits, labels, temperature)
    teacher = _label_against_rest(teacher_logits, labels, temperature)
    return temperature**2 * forward_kl(student, teacher, 1.0)


def without_label(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits of the classes other than each row's label, in order: [..., C] and labels [...] to [..., C - 1].

    Their softmax is the distribution renormalised without the label. Any divergence between two such tensors is an
    NCKD term of decoupled distillation (Zhao et al., CVPR 2022, section 3.2); the paper's own takes the forward KL.
    """
    num_classes = logits.shape[-1]
    if labels.shape != logits.shape[:-1]:
        raise ShapeMismatch(
            f"labels are {tuple(labels.shape)} and logits {tuple(logits.shape)}; give one class index per row"
        )
    if num_classes < 2:
        raise ShapeMismatch(f"logits have {num_classes} classes; leaving the label out needs at least 2")
    rest = torch.arange(num_classes - 1, device=logits.device).expand(*labels.shape, -1)
    return logits.gather(-1, rest + (rest >= labels.unsqueeze(-1)))


def _label_against_rest(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Two logits per row whose softmax is (p_y, 1 - p_y); log(1 - p_y) is never formed by subtraction."""
    wide = at_least_float32(logits) / temperature
    rest = without_label(wide, labels).logsumexp(dim=-1)
    return torch.stack([wide.gather(-1, labels.unsqueeze(-1)).squeeze(-1), rest], dim=-1)


def _log_softmax_pair(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    check_temperature("temperature", temperature)
    check_same_classes(student_logits, teacher_logits)
    student = (at_least_float32(student_logits) / temperature).log_softmax(dim=-1)
    teacher = (at_least_float32(teacher_logits) / temperature).log_softmax(dim=-1)
    return student, teacher
