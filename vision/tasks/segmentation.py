"""Train a segmenter, alone or with the help of a teacher.

The recipe's tables: ``[model]``, ``[data]``, ``[teacher]`` with ``[[terms]]`` (both or neither), ``[loss]`` (optional),
``[training]``. Divergences are means over the labelled pixels at the logits' own resolution, so that a weight means the
same here as for whole images (a mean over all elements would be smaller by the number of classes).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kernels.losses import BatchTooSmall
from kernels.training import (
    AfterEvaluation,
    AfterStep,
    KeepBest,
    Metric,
    RecipeError,
    TrainingOptions,
    TrainingReport,
    check_tables,
    run,
    take_table,
)
from vision.data.segmentation import FolderMasks, MaskSource, SegmentationData, ShapeScenes, collate_masks
from vision.distillation.teacher import Teacher
from vision.distillation.terms import Answers, DecoupledTerm, MimicTerm, Term, parse_terms, wants_pairs
from vision.measure.classification import default_device
from vision.segmentation.measure import IGNORED, ConfusionMatrix, SegmentationReport
from vision.segmentation.pspnet import Segmenter, SegmenterConfig, load_segmenter, save_segmenter
from vision.tasks.averaging import BEST, kept_best
from vision.tasks.starting import start_from

TABLES = ("model", "data", "teacher", "terms", "loss", "training")


@dataclass(frozen=True)
class SegmenterOptions:
    """A recipe's ``[model]`` table.

    ``start_from`` is a folder with a trained backbone of that name, or with a segmenter or a detector on it.
    """

    backbone: str
    width: int = 128
    normalization: str = "imagenet"
    start_from: str | None = None


@dataclass(frozen=True)
class SegmentationDataOptions:
    """A recipe's ``[data]`` table: ``root`` names a folder of images and masks; without it, scenes of shapes are made.

    ``train_images``, ``eval_images``, ``scene_seed`` and ``shape_odds`` (how often each of the five shapes is drawn,
    against the others; left out, equally often) belong to the made scenes.
    """

    image_size: int
    root: str | None = None
    train_split: str = "train"
    eval_split: str = "val"
    train_images: int = 1000
    eval_images: int = 200
    scene_seed: int = 0
    shape_odds: tuple[float, ...] | None = None

    def sources(self) -> tuple[MaskSource, MaskSource]:
        """(training, evaluation). Errors: DataError."""
        if self.root is None:
            # Far apart, so that no count of images makes the two overlap.
            evaluation = ShapeScenes(self.eval_images, self.image_size, self.scene_seed + 1_000_003, self.shape_odds)
            return ShapeScenes(self.train_images, self.image_size, self.scene_seed, self.shape_odds), evaluation
        root = Path(self.root).expanduser()
        return FolderMasks(root, self.train_split), FolderMasks(root, self.eval_split)


@dataclass(frozen=True)
class SegmenterTeacher:
    """A recipe's ``[teacher]`` table: a folder that ``train segmenter`` saved."""

    path: str


@dataclass(frozen=True)
class SegmentationLoss:
    """A recipe's ``[loss]`` table: the weight of the labels beside the terms."""

    cross_entropy_weight: float = 1.0


class SegmentationTask(nn.Module):
    """Cross-entropy of every labelled pixel at the labels' resolution, and distillation terms at the logits'."""

    steps_done: Tensor

    def __init__(
        self, model: Segmenter, loss: SegmentationLoss, teacher: Teacher | None, terms: Mapping[str, Term]
    ) -> None:
        super().__init__()
        self.model, self.loss, self.teacher, self.terms = model, loss, teacher, dict(terms)
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.long))
        self.matrix = ConfusionMatrix(len(model.config.class_names))

    def forward(self, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """``images`` uint8 [B, 3, H, W], ``masks`` uint8 [B, H, W] -> ``loss``, its parts, ``pixel_accuracy``."""
        logits, embedding = self.model.answer(images)
        full = F.interpolate(logits.float(), masks.shape[1:], mode="bilinear")
        counted = masks != IGNORED
        cross_entropy = F.cross_entropy(full, masks.long(), ignore_index=IGNORED)
        right = (full.argmax(dim=1) == masks) & counted
        figures = {"pixel_accuracy": right.sum() / counted.sum().clamp_min(1)}
        if not self.training:
            self.matrix.add(logits, masks)
        if not self.training or self.teacher is None:
            return {"loss": cross_entropy, **figures}
        teacher_logits, teacher_embedding = self.teacher(images)
        labels = F.interpolate(masks[:, None].float(), logits.shape[2:], mode="nearest")[:, 0].long()
        answers = Answers(logits, teacher_logits, embedding, teacher_embedding, labels, labels != IGNORED)
        losses = {name: term.loss(answers) for name, term in self.terms.items()}
        step = int(self.steps_done) + 1
        total = self.loss.cross_entropy_weight * cross_entropy
        total = total + sum(self.terms[name].weight_at(step) * loss for name, loss in losses.items())
        figures |= {"cross_entropy": cross_entropy, **losses}
        return {"loss": total, **{name: value.detach() for name, value in figures.items()}}

    def take_mean_iou(self) -> float:
        """Mean intersection over union of the evaluations since the last call, over all processes."""
        matrix, self.matrix = self.matrix, ConfusionMatrix(len(self.model.config.class_names))
        matrix.counts = torch.stack(gather_object([matrix.counts])).sum(dim=0)
        return matrix.report(self.model.config.class_names).mean_iou

    def after_step(self) -> None:
        """Count the step; called after each optimiser step."""
        self.steps_done += 1


def segmenter_teacher(folder: Path) -> Teacher:
    """A saved segmenter as a teacher; it normalises its images itself. Errors: CheckpointError."""
    network = load_segmenter(folder)
    names = network.config.class_names
    return Teacher(network, network.answer, lambda images: images * 255, len(names), names)


def parse_teacher(recipe: dict[str, Any], class_names: tuple[str, ...]) -> tuple[Teacher | None, dict[str, Term]]:
    """Teacher and terms of a recipe, both or neither. Errors: RecipeError, TeacherError, CheckpointError."""
    terms = parse_terms(recipe.get("terms", []))
    if ("teacher" in recipe) != bool(terms):
        raise RecipeError("[teacher] and [[terms]] belong together; give both, or neither")
    unfit = [name for name, term in terms.items() if isinstance(term, DecoupledTerm | MimicTerm)]
    if unfit:
        raise RecipeError(f"terms {', '.join(unfit)} compare whole images; pixels take kd, bdd and cckd")
    if wants_pairs(terms) and take_table(recipe, "training", TrainingOptions).batch_size < 2:
        raise BatchTooSmall("training.batch_size is 1; a correlation term compares samples and needs at least 2")
    if not terms:
        return None, terms
    teacher = segmenter_teacher(Path(take_table(recipe, "teacher", SegmenterTeacher).path).expanduser())
    teacher.check_classes(class_names)
    return teacher, terms


def train_segmenter(recipe: dict[str, Any], *, resume: bool = False, console: Console | None = None) -> TrainingReport:
    """Run a recipe; ``output/model`` then holds the segmenter, which ``checkpoint`` names.

    It is the better of the last weights and the best evaluation's, which stay in ``output/best``. ``final`` gains
    ``mean_iou`` and ``pixel_accuracy`` over the evaluation split, and ``rare_iou`` where some class has less than two
    in a hundred pixels there. Errors: RecipeError, DataError, TeacherError, BackboneError, TrainingDivergedError.
    """
    check_tables(recipe, TABLES)
    shape = take_table(recipe, "model", SegmenterOptions)
    data = take_table(recipe, "data", SegmentationDataOptions)
    options = take_table(recipe, "training", TrainingOptions)
    train_source, eval_source = data.sources()
    teacher, terms = parse_teacher(recipe, train_source.class_names)
    torch.manual_seed(options.seed)
    model = Segmenter(
        SegmenterConfig(shape.backbone, train_source.class_names, shape.width, shape.normalization, data.image_size)
    )
    if shape.start_from is not None:
        start_from(model, shape.start_from, shape.backbone, train_source.class_names, shape.normalization)
    task = SegmentationTask(model, take_table(recipe, "loss", SegmentationLoss), teacher, terms)
    eval_data = SegmentationData(eval_source, data.image_size)
    keep_best = KeepBest("mean_iou", lambda: save_segmenter(model, Path(options.output) / BEST))
    report = run(
        task,
        SegmentationData(train_source, data.image_size, mirrored=True, seed=options.seed),
        options,
        eval_data=eval_data,
        collate=collate_masks,
        callbacks=[AfterStep(task.after_step), AfterEvaluation("mean_iou", task.take_mean_iou), keep_best],
        recipe=recipe,
        resume=resume,
        console=console,
        metric=Metric("mean_iou", larger_is_better=True),
    )
    if not report.finished:
        return report
    folder = Path(options.output) / "model"
    figures: dict[str, float] = {}
    if PartialState().is_main_process:
        measured, chosen = evaluate_segmenter(model, eval_data, options.batch_size), model
        best = kept_best(report, options.output, options.steps)
        if best is not None:
            kept = load_segmenter(best)
            again = evaluate_segmenter(kept, eval_data, options.batch_size)
            measured, chosen = (again, kept) if again.mean_iou > measured.mean_iou else (measured, model)
        save_segmenter(chosen, folder)
        figures = {"mean_iou": measured.mean_iou, "pixel_accuracy": measured.pixel_accuracy}
        figures |= {} if measured.rare_iou is None else {"rare_iou": measured.rare_iou}
    PartialState().wait_for_everyone()
    return dataclasses.replace(report, final={**report.final, **figures}, checkpoint=str(folder))


@torch.no_grad()
def evaluate_segmenter(model: Segmenter, data: SegmentationData, batch_size: int = 16) -> SegmentationReport:
    """Mean intersection over union of ``model`` over all of ``data``."""
    model.to(default_device()).eval()
    matrix = ConfusionMatrix(len(model.config.class_names))
    for batch in DataLoader(data, batch_size, collate_fn=collate_masks):
        matrix.add(model(batch["images"].to(default_device())).cpu(), batch["masks"])
    return matrix.report(model.config.class_names)
