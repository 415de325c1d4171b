"""Balance divergence distillation (Qi et al., arXiv 2501.07804): a forward and a reverse KL, balanced.

The forward KL weighs each class by the teacher's probability, so that the teacher's very small probabilities hardly
count; the reverse KL answers to them and compensates. Only the paper's abstract was at hand: the four independent
numbers cover every reading of it, and the values to use are ours. Near the optimum both terms agree to second order,
and at high temperature they become the same loss; the reverse term therefore adds something only at a low temperature,
and a fair comparison keeps forward_weight + reverse_weight equal and stands beside a KD whose temperature was tuned.
"""

from __future__ import annotations

from torch import Tensor, nn

from kernels.losses import balance_divergence, check_temperature
from vision.distillation.checks import check_weight, class_rows, mean_over_rows


class BalanceDivergenceLoss(nn.Module):
    """forward_weight Tf^2 KL(teacher || student) + reverse_weight Tr^2 KL(student || teacher), averaged over the batch.

    Inputs and errors are those of ``KDLoss``; with weights (1, 0) it is that loss bit for bit.

    It plugs into another method in two ways. Added beside the method's own loss with ``forward_weight`` 0 it is the
    bare compensation term. Where the method compares two softmax distributions, ``divergence`` replaces the one it
    would take, for instance ``DKDLoss(..., non_target_divergence=BalanceDivergenceLoss(...).divergence)``.
    """

    def __init__(
        self,
        forward_weight: float,
        reverse_weight: float,
        forward_temperature: float,
        reverse_temperature: float,
    ) -> None:
        super().__init__()
        check_weight("forward_weight", forward_weight)
        check_weight("reverse_weight", reverse_weight)
        check_temperature("forward_temperature", forward_temperature)
        check_temperature("reverse_temperature", reverse_temperature)
        if forward_weight == reverse_weight == 0:
            raise ValueError("forward_weight and reverse_weight are both 0; at least one must be positive")
        self.forward_weight = forward_weight
        self.reverse_weight = reverse_weight
        self.forward_temperature = forward_temperature
        self.reverse_temperature = reverse_temperature

    def divergence(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The same divergence row by row, unchecked and not averaged: [..., C] to [...]."""
        return balance_divergence(
            student_logits,
            teacher_logits,
            self.forward_weight,
            self.reverse_weight,
            self.forward_temperature,
            self.reverse_temperature,
        )

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, valid: Tensor | None = None) -> Tensor:
        """The loss, a scalar of at least float32."""
        student, teacher = class_rows(student_logits, teacher_logits, valid)
        return mean_over_rows(self.divergence(student, teacher))

    def extra_repr(self) -> str:
        """The settings, for the printed model."""
        return (
            f"forward_weight={self.forward_weight}, reverse_weight={self.reverse_weight}, "
            f"forward_temperature={self.forward_temperature}, reverse_temperature={self.reverse_temperature}"
        )
