"""A detector as the teacher of a smaller one: what it says of the student's own regions, and its enhanced map.

Both networks see the same pixels. The terms over logits (KD, balance divergence, decoupled KD) compare the classes of
the regions the student trains on, which the teacher classifies from its own map; a mimic term compares the channels of
the context enhancement's map at every place, 245 in either network, whatever their backbones. Which of ThunderNet's
answers a student should imitate is ours: neither ThunderNet's paper (arXiv 1903.11752) nor balance divergence's (arXiv
2501.07804) distils a detector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kernels.training import RecipeError
from vision.detection.checkpoint import load_detector
from vision.detection.detector import DetectorConfig
from vision.detection.thundernet import DenseMaps, ThunderNet, ThunderNetConfig
from vision.detection.thundernet_loss import Lesson
from vision.distillation.teacher import TeacherError
from vision.distillation.terms import Answers, CorrelationTerm, MimicTerm, Term


@dataclass(frozen=True)
class DetectorTeacherOptions:
    """A recipe's ``[teacher]`` table: a folder that ``train detector`` saved."""

    path: str


class DetectorTeacher:
    """A frozen ThunderNet and the terms by which a student is compared with it."""

    def __init__(self, network: ThunderNet, terms: Mapping[str, Term]) -> None:
        unfit = [name for name, term in terms.items() if isinstance(term, CorrelationTerm)]
        if unfit:
            raise RecipeError(f"terms {', '.join(unfit)} relate whole images; a detector takes kd, bdd, dkd and mimic")
        self.network = network.eval().requires_grad_(False)
        self.terms = dict(terms)

    def weights_at(self, step: int) -> dict[str, float]:
        """The weight of every term in the ``step``-th optimiser step, counted from 1."""
        return {name: term.weight_at(step) for name, term in self.terms.items()}

    def lesson(self, inputs: Tensor) -> Lesson:
        """What ``ThunderNetLoss`` asks for the terms of one batch; ``inputs`` are normalised images [N, 3, H, W]."""
        return partial(self.teach, inputs)

    def teach(
        self, inputs: Tensor, maps: DenseMaps, regions: Sequence[Tensor], logits: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Every term, unweighted: of the student's ``maps``, and its ``logits`` [R, C + 1] of ``regions``.

        ``labels`` [R] hold 0 for the background. Terms over logits are 0 where no region trains. Errors: TeacherError
        where the teacher answers NaN or infinity.
        """
        with torch.no_grad():
            # Whoever holds the task may have called train() on everything it could reach.
            network = self.network.to(inputs.device).eval()
            taught = network.dense(inputs)
            teacher_logits, _ = network.classify(taught, regions)
        if not torch.isfinite(teacher_logits).all():
            raise TeacherError("the teacher's logits are not finite; its weights or its normalisation are not its own")
        answers = Answers(logits, teacher_logits, places(maps.f_cem), places(taught.f_cem), labels)
        nothing = logits.sum() * 0
        return {
            name: term.loss(answers) if len(logits) or isinstance(term, MimicTerm) else nothing
            for name, term in self.terms.items()
        }


def places(feature_map: Tensor) -> Tensor:
    """[N, C, H, W] -> the channels of every place, [N * H * W, C]."""
    return feature_map.permute(0, 2, 3, 1).flatten(0, 2)


def load_detector_teacher(folder: Path, student: DetectorConfig, terms: Mapping[str, Term]) -> DetectorTeacher:
    """The detector of ``folder`` as teacher of a ``student``. Errors: CheckpointError, RecipeError, TeacherError."""
    loaded = load_detector(folder)
    config = loaded.config
    if not isinstance(loaded.model, ThunderNet) or not isinstance(student.head, ThunderNetConfig):
        raise TeacherError("distillation compares regions of two ThunderNets; a one-stage detector has none")
    if config.class_names != student.class_names:
        raise TeacherError(
            f"{folder} finds {', '.join(config.class_names)}; the student's data has {', '.join(student.class_names)}"
        )
    if config.normalization != student.normalization:
        raise TeacherError(
            f"{folder} was trained with other normalisation constants than the student's; both see the same pixels, so "
            "give [data] the teacher's normalization"
        )
    if loaded.model.config.channels != student.head.channels:
        raise TeacherError(
            f"the teacher's map has {loaded.model.config.channels} channels, the student's {student.head.channels}"
        )
    return DetectorTeacher(loaded.model, terms)
