"""Decoupled knowledge distillation (Zhao et al., CVPR 2022): the strong logit baseline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from kernels.losses import ShapeMismatch, check_temperature, forward_kl, target_class_divergence, without_label
from vision.distillation.checks import check_weight, class_rows

Divergence = Callable[[Tensor, Tensor], Tensor]


class DKDLoss(nn.Module):
    """target_weight T^2 TCKD + non_target_weight T^2 NCKD, averaged over the batch.

    TCKD compares the probability of the label with that of all other classes together, NCKD the distribution among
    those others (section 3.2 of the paper); KD is TCKD + (1 - p_y) NCKD. Defaults are the paper's for CIFAR-100. The
    paper multiplies this loss by min(epoch / 20, 1): the caller's, as every other weight of a term.

    ``non_target_divergence`` replaces the forward KL of NCKD: a function of student and teacher logits [N, C - 1] that
    brings its own temperature and answers [N].

    Logits are [N, C], labels [N]. Raises ``InvalidTemperature``, ``ShapeMismatch`` and ``NonFiniteInput``.
    """

    def __init__(
        self,
        target_weight: float = 1.0,
        non_target_weight: float = 8.0,
        temperature: float = 4.0,
        non_target_divergence: Divergence | None = None,
    ) -> None:
        super().__init__()
        check_weight("target_weight", target_weight)
        check_weight("non_target_weight", non_target_weight)
        check_temperature("temperature", temperature)
        self.target_weight = target_weight
        self.non_target_weight = non_target_weight
        self.temperature = temperature
        self.non_target_divergence = non_target_divergence or partial(forward_kl, temperature=temperature)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar of at least float32."""
        if student_logits.ndim != 2:
            raise ShapeMismatch(
                f"student logits are {tuple(student_logits.shape)}; decoupled distillation takes [N, C]"
            )
        student, teacher = class_rows(student_logits, teacher_logits, None)
        target = target_class_divergence(student, teacher, labels, self.temperature)
        others = self.non_target_divergence(without_label(student, labels), without_label(teacher, labels))
        return (self.target_weight * target + self.non_target_weight * others).mean()

    def extra_repr(self) -> str:
        """The settings, for the printed model."""
        return (
            f"target_weight={self.target_weight}, non_target_weight={self.non_target_weight}, "
            f"temperature={self.temperature}"
        )
