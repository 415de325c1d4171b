"""Knowledge distillation on logits (Hinton et al., arXiv 1503.02531): the baseline of every other method here."""

from __future__ import annotations

from torch import Tensor, nn

from kernels.losses import check_temperature, forward_kl
from vision.distillation.checks import class_rows, mean_over_rows


class KDLoss(nn.Module):
    """T^2 KL(teacher || student) of the softened softmax, summed over classes and averaged over the batch.

    Logits are [N, C], or [N, C, ...] for dense prediction, where the mean runs over the pixels and ``valid``
    ([N, ...], bool) leaves out the unlabelled ones. The teacher gets no gradient. The weight of this term beside a
    cross-entropy is the caller's: published recipes take 0.9 at temperature 4 on CIFAR, 0.5 at temperature 1 on
    ImageNet.

    Raises ``InvalidTemperature``, ``ShapeMismatch`` (other class counts) and ``NonFiniteInput``.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        check_temperature("temperature", temperature)
        self.temperature = temperature

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, valid: Tensor | None = None) -> Tensor:
        """The loss, a scalar of at least float32."""
        student, teacher = class_rows(student_logits, teacher_logits, valid)
        return mean_over_rows(forward_kl(student, teacher, self.temperature))

    def extra_repr(self) -> str:
        """The setting, for the printed model."""
        return f"temperature={self.temperature}"
