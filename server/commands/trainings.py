"""What ``dovetail train`` and ``dovetail study`` train: one table, from which both make their commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class Training:
    """``trains``: module and function, for a recipe's tables and ``resume``, or a class whose instances are called so;
    ``noun``: what a study compares."""

    help: str
    trains: str
    noun: str

    def load(self) -> Callable[..., Any]:
        """What trains; made anew from a class, so what its trainings share ends with the command."""
        module, _, name = self.trains.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found() if isinstance(found, type) else found


TRAININGS: Mapping[str, Training] = {
    "classifier": Training(
        "Train an image classifier on one of the compact backbones.", "vision.tasks.classification:train_classifier",
        "image classifiers",
    ),
    "distil": Training(
        "Train an image classifier with the help of a teacher.", "vision.tasks.distillation:train_distilled",
        "image classifiers with the help of a teacher, under several losses",
    ),
    "embedding": Training(
        "Train a backbone for retrieval, alone or with the help of a teacher.",
        "vision.tasks.embedding:train_embedding", "backbones for retrieval",
    ),
    "segmenter": Training(
        "Train a semantic segmenter, alone or with the help of a teacher.",
        "vision.tasks.segmentation:train_segmenter", "semantic segmenters",
    ),
    "drafter": Training(
        "Train a drafter on a target's own features.", "server.feature_source:DrafterTraining",
        "drafters; `eval drafter-study` compares them",
    ),
    "detector": Training(
        "Train an object detector on images with boxes.", "vision.tasks.detection:train_detector",
        "object detectors, for instance with different mining",
    ),
    "face-quality": Training(
        "Train a face-quality scorer on labels that a recognition network makes.",
        "vision.tasks.face_quality:train_face_quality",
        "face-quality scorers, for instance on differently made labels",
    ),
}  # fmt: skip


def with_data(recipe: Path) -> Path:
    """The recipe, once the data that it names are found."""
    from kernels.training.options import check_data

    check_data(recipe)
    return recipe


Recipe = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, help="TOML recipe.", show_default=False, callback=with_data)
]
