"""What every distillation loss asks of its two inputs before it computes anything."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.losses import NonFiniteInput, ShapeMismatch


def check_finite(name: str, values: Tensor) -> None:
    """Refuse NaN and infinity, which would reach every weight of the student in one step."""
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise NonFiniteInput(
            f"{bad} of {values.numel()} values of the {name} are NaN or infinite; check the network's weights, its "
            "input normalisation and its precision"
        )


def check_weight(name: str, weight: float) -> None:
    """Refuse a weight that is negative or not finite."""
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name} is {weight}; it must be a finite number of at least 0")


def class_rows(student_logits: Tensor, teacher_logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both logits as [rows, C] with the teacher detached, checked.

    Logits are [N, C] or, for dense prediction, [N, C, ...] as ``torch.nn.functional.cross_entropy`` takes them; every
    pixel is then a row. ``valid`` ([N, ...], bool) keeps only the rows that count, for instance the labelled pixels.
    """
    if student_logits.ndim != teacher_logits.ndim or student_logits.ndim < 2:
        raise ShapeMismatch(
            f"student logits are {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)}; "
            "both must be [N, C] or [N, C, ...]"
        )
    student, teacher = student_logits.movedim(1, -1), teacher_logits.detach().movedim(1, -1)
    if valid is None:
        student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    else:
        if valid.shape != student.shape[:-1] or valid.dtype != torch.bool:
            raise ShapeMismatch(
                f"valid is {valid.dtype} {tuple(valid.shape)}; it must be a bool tensor {tuple(student.shape[:-1])}"
            )
        student, teacher = student[valid], teacher[valid]
    check_finite("student's logits", student)
    check_finite("teacher's logits", teacher)
    return student, teacher


def mean_over_rows(per_row: Tensor) -> Tensor:
    """The mean, or a zero that still carries a gradient where no row was valid."""
    return per_row.mean() if per_row.numel() else per_row.sum()
