"""Train a face-quality scorer on labels that a recognition network makes.

The recipe's tables: ``[recogniser]``, ``[data]``, ``[training]``, and optional ``[model]``, ``[labels]``, ``[task]``,
``[teacher]``, ``[augmentation]``. Photographs and their degraded copies are judged by the recogniser first; its
features are kept in the output folder.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from kernels.training import Metric, RecipeError, TrainingOptions, TrainingReport, check_tables, run, take_table
from vision.data.faces import DegradedFaces, fold_split
from vision.data.image_sources import SOURCES, open_source
from vision.data.labelled_faces import BalancedSampler, FaceAugmentation, LabelledFaceData, collate_faces
from vision.data.sources import DataError, InMemorySource
from vision.distillation.kd import KDLoss
from vision.face_quality.checkpoint import DEFAULT_SCALE, ScorerConfig, load_scorer, save_scorer
from vision.face_quality.evaluate import EvaluationError, spearman
from vision.face_quality.labelling import LabelledFaces, LabelOptions, label_faces, label_rule
from vision.face_quality.recognition import Recogniser, RecogniserOptions, load_recogniser
from vision.face_quality.scale import QualityScale
from vision.face_quality.tinyfqnet import TinyFQNet, normalize_faces
from vision.measure.classification import default_device
from vision.tasks.averaging import KeepAverage, MovingAverage, training_batches

logger = logging.getLogger(__name__)

LOSSES = ("smooth_l1", "mse", "bce")
SMOOTH_L1_BETA = 0.1
GOOD_QUALITY, POOR_SEVERITY = 75, 0.5


@dataclass(frozen=True)
class FaceDataOptions:
    """Which people, and how many degraded ``copies`` of each photograph. The splits default to the kind's own.

    With ``folds`` the people are dealt to so many folds, and the training's seed s picks them: the fold s modulo
    ``folds`` is left for whoever measures, the next one is the evaluation split, the others train. ``features`` is a
    folder that keeps what the recogniser said of the faces, for several trainings; by default each keeps its own.
    """

    kind: str
    root: str
    train_split: str | None = None
    eval_split: str | None = None
    copies: int = 20
    folds: int | None = None
    features: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in SOURCES:
            raise RecipeError(f"data.kind is {self.kind!r}; allowed are {', '.join(SOURCES)}")
        if self.copies < 1:
            raise RecipeError(f"data.copies is {self.copies}; without degraded copies there is nothing to tell apart")
        if self.folds is not None and (self.folds < 3 or self.train_split or self.eval_split):
            raise RecipeError(
                f"data.folds is {self.folds}, train_split {self.train_split}, eval_split {self.eval_split}; at least 3 "
                "folds, one each to measure, to evaluate and to train, take the place of both splits"
            )

    def splits(self, seed: int) -> tuple[str, str]:
        """What trains and what evaluates."""
        if self.folds is None:
            kind = SOURCES[self.kind]
            return self.train_split or kind.train_split, self.eval_split or kind.eval_split
        measured, chosen = seed % self.folds, (seed + 1) % self.folds
        others = [place for place in range(self.folds) if place not in (measured, chosen)]
        return fold_split(others, self.folds), fold_split([chosen], self.folds)

    def faces(self, split: str, seed: int) -> DegradedFaces:
        """The photographs of ``split`` and their copies."""
        return DegradedFaces(InMemorySource(open_source(self.kind, Path(self.root), split)), self.copies, seed)


@dataclass(frozen=True)
class ScorerOptions:
    """``width`` multiplies tinyFQnet's channels; ``licence`` and ``description`` go into the saved scorer."""

    width: int = 1
    licence: str = "unknown"
    description: str = ""


@dataclass(frozen=True)
class ScorerTaskOptions:
    """What is optimised.

    ``loss`` compares score and label: "smooth_l1" (beta 0.1), "mse", or "bce" with the label as a soft target.
    ``ranking_weight`` adds max(0, ``ranking_margin`` - (score_i - score_j) sign(label_i - label_j)) over the batch's
    pairs. ``ema_decay`` keeps a moving average of the weights, which is what is evaluated; the better
    of it and the raw weights is saved.
    """

    loss: str = "smooth_l1"
    ranking_weight: float = 0.0
    ranking_margin: float = 0.05
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise RecipeError(f"task.loss is {self.loss!r}; allowed are {', '.join(LOSSES)}")
        if self.ranking_weight < 0 or self.ranking_margin < 0:
            raise RecipeError("[task] ranking_weight and ranking_margin must be at least 0")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise RecipeError(f"task.ema_decay is {self.ema_decay}; it must be between 0 and 1, or left out")


@dataclass(frozen=True)
class ScorerTeacherOptions:
    """A wider scorer to learn from: its folder, the weight of its loss, and the softening of both scores.

    "{seed}" in ``path`` stands for the training's own seed, so that a study's trainings have each their teacher.
    """

    path: str
    weight: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True)
class FaceQualityRecipe:
    """All tables of a recipe, checked."""

    recogniser: RecogniserOptions
    data: FaceDataOptions
    model: ScorerOptions
    labels: LabelOptions
    task: ScorerTaskOptions
    augmentation: FaceAugmentation
    training: TrainingOptions
    teacher: ScorerTeacherOptions | None

    @classmethod
    def parse(cls, recipe: dict[str, Any]) -> FaceQualityRecipe:
        """Read every table. Errors: RecipeError naming the table and the key."""
        check_tables(recipe, (field.name for field in dataclasses.fields(cls)))
        try:
            return cls(
                recogniser=take_table(recipe, "recogniser", RecogniserOptions),
                data=take_table(recipe, "data", FaceDataOptions),
                model=take_table(recipe, "model", ScorerOptions),
                labels=take_table(recipe, "labels", LabelOptions),
                task=take_table(recipe, "task", ScorerTaskOptions),
                augmentation=take_table(recipe, "augmentation", FaceAugmentation),
                training=take_table(recipe, "training", TrainingOptions),
                teacher=take_table(recipe, "teacher", ScorerTeacherOptions) if "teacher" in recipe else None,
            )
        except ValueError as error:
            raise error if isinstance(error, RecipeError) else RecipeError(str(error)) from error


class FaceQualityTask(nn.Module):
    """A scorer's regression on labels, with a ranking term and a teacher where the recipe asks for them."""

    def __init__(self, model: TinyFQNet, options: ScorerTaskOptions, teacher: ScorerTeacherOptions | None) -> None:
        super().__init__()
        self.model, self.options, self.teacher_options = model, options, teacher
        self.average = None if options.ema_decay is None else MovingAverage(model, options.ema_decay)
        # In a list, so that the teacher is not part of this module's state.
        self.teachers: list[TinyFQNet] = []
        if teacher is not None:
            self.teachers.append(load_scorer(Path(teacher.path).expanduser())[0].requires_grad_(False))
            self.kd_loss = KDLoss(teacher.temperature)

    @property
    def trained(self) -> TinyFQNet:
        """The network that evaluations measure: the average where there is one."""
        return self.model if self.average is None else self.average.network

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``images`` uint8 [B, 3, H, W], ``labels`` [B] -> ``loss`` and its parts; ``mae`` between score and label."""
        x = self.inputs(images)
        logits = (self.model if self.training else self.trained).logits(x)
        loss = self.regression(logits, labels)
        figures = {"mae": (logits.sigmoid() - labels).abs().mean().detach()}
        if not self.training:
            return {"loss": loss, **figures}
        figures["regression"] = loss.detach()
        if self.options.ranking_weight > 0:
            ranking = self.ranking(logits.sigmoid(), labels)
            loss = loss + self.options.ranking_weight * ranking
            figures["ranking"] = ranking.detach()
        if self.teacher_options is not None:
            teacher = self.teachers[0].to(x.device)
            # A score is a softmax over two classes, the first of which has the logit 0.
            distilled = self.kd_loss(two_classes(logits), two_classes(teacher.logits(x)))
            loss = loss + self.teacher_options.weight * distilled
            figures["distillation"] = distilled.detach()
        return {"loss": loss, **figures}

    def inputs(self, images: Tensor) -> Tensor:
        """Bytes as the network takes them."""
        # Depthwise layers train twice as fast on a CPU with the channels last; the maps keep the images' format.
        return normalize_faces(images.float() / 255).contiguous(memory_format=torch.channels_last)

    def show(self, model: TinyFQNet, batch: Mapping[str, Tensor]) -> None:
        """Pass a training batch through ``model``, for its statistics alone."""
        model.logits(self.inputs(batch["images"]))

    def regression(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The recipe's loss between scores and labels."""
        if self.options.loss == "bce":
            return functional.binary_cross_entropy_with_logits(logits, labels)
        if self.options.loss == "mse":
            return functional.mse_loss(logits.sigmoid(), labels)
        return functional.smooth_l1_loss(logits.sigmoid(), labels, beta=SMOOTH_L1_BETA)

    def ranking(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean hinge over all pairs of the batch whose labels differ."""
        wanted = torch.sign(labels[:, None] - labels[None])
        losses = (self.options.ranking_margin - (scores[:, None] - scores[None]) * wanted).clamp(min=0)
        return (losses * wanted.abs()).sum() / wanted.abs().sum().clamp(min=1)


def two_classes(logits: Tensor) -> Tensor:
    """[N] to [N, 2], whose softmax has the sigmoid in its second column."""
    return torch.stack([torch.zeros_like(logits), logits], dim=1)


def train_face_quality(
    recipe: dict[str, Any], *, resume: bool = False, console: Console | None = None
) -> TrainingReport:
    """Run a recipe; ``output/model`` then holds the scorer, which ``checkpoint`` names.

    ``final`` gains ``spearman`` between score and label and their mean absolute difference ``mae`` over the evaluation
    split, ``train_images``, ``unusable_images`` and ``skipped_images``. Errors: RecipeError where the splits share a
    person; DataError, RecogniserError, CheckpointError, TrainingDivergedError.
    """
    options = FaceQualityRecipe.parse(recipe)
    recogniser = load_recogniser(options.recogniser)
    train_labelled, eval_labelled = label_splits(options, recogniser)
    torch.manual_seed(options.training.seed)
    teacher = options.teacher
    if teacher is not None:
        teacher = dataclasses.replace(teacher, path=teacher.path.replace("{seed}", str(options.training.seed)))
    task = FaceQualityTask(TinyFQNet(options.model.width), options.task, teacher)
    batch_size, labels = options.training.batch_size, train_labelled.labels.labels
    data = LabelledFaceData(
        train_labelled.faces, labels, train_labelled.usable, options.augmentation, options.training.seed
    )
    average = KeepAverage(
        task, task.model, task.average, task.show, lambda: training_batches(data, batch_size, collate_faces)
    )
    report = run_task(task, average, data, eval_labelled, options, recipe, resume, console)
    if not report.finished:
        return report
    usable = len(train_labelled.usable)
    figures = {
        "train_images": float(usable),
        "unusable_images": float(len(train_labelled.features) - usable),
        "skipped_images": float(len(train_labelled.skipped) + len(eval_labelled.skipped)),
    }
    if PartialState().is_main_process:
        average.settle()
        figures |= finish(task, eval_labelled, options, label_rule(options.labels, recogniser))
    PartialState().wait_for_everyone()
    folder = Path(options.training.output) / "model"
    return dataclasses.replace(report, final={**report.final, **figures}, checkpoint=str(folder))


def label_splits(options: FaceQualityRecipe, recogniser: Recogniser) -> tuple[LabelledFaces, LabelledFaces]:
    """Training and evaluation split with their labels. Errors: RecipeError, DataError."""
    seed = options.training.seed
    train_faces, eval_faces = (options.data.faces(split, seed) for split in options.data.splits(seed))
    if shared := sorted(set(train_faces.class_names) & set(eval_faces.class_names)):
        raise RecipeError(f"people {', '.join(shared[:5])} stand in both splits ({len(shared)} in all)")
    kept = Path(options.data.features or options.training.output)
    labelled = (
        label_faces(train_faces, recogniser, options.labels, kept),
        label_faces(eval_faces, recogniser, options.labels, kept),
    )
    for faces in labelled:
        if not len(faces.usable):
            raise DataError(
                f"none of {len(faces.features)} faces of a split is usable: people need "
                f"{options.labels.min_images} images and cosines of {options.labels.min_raw}; add copies, or lower them"
            )
    return labelled


def run_task(
    task: FaceQualityTask,
    average: KeepAverage[TinyFQNet],
    data: LabelledFaceData,
    eval_labelled: LabelledFaces,
    options: FaceQualityRecipe,
    recipe: dict[str, Any],
    resume: bool,
    console: Console | None,
) -> TrainingReport:
    """Train ``task`` in place on balanced batches."""
    training, rules = options.training, options.labels
    return run(
        task,
        data,
        training,
        eval_data=LabelledFaceData(eval_labelled.faces, eval_labelled.labels.labels, eval_labelled.usable),
        collate=collate_faces,
        batch_sampler=BalancedSampler(
            data.labels[data.indices], training.batch_size, rules.balance_power, rules.max_oversampling, training.seed
        ),
        callbacks=average.callbacks,
        recipe=recipe,
        resume=resume,
        console=console,
        metric=Metric("mae"),
    )


def finish(
    task: FaceQualityTask, labelled: LabelledFaces, options: FaceQualityRecipe, rule: dict[str, object]
) -> dict[str, float]:
    """Measure the scorer on people it never saw, fit its scale there, save it; with an average the better of both."""
    labels = labelled.labels.labels[labelled.usable].numpy()
    errors = []
    for model in (task.model,) if task.average is None else (task.trained, task.model):
        scores = score_faces(model, labelled.faces, labelled.usable, options.training.batch_size)
        errors.append((float(np.abs(scores - labels).mean()), scores, model))
    mae, scores, model = min(errors, key=lambda entry: entry[0])
    scale = fit_scale(scores, labelled.faces.severities[labelled.usable.numpy()])
    config = ScorerConfig(options.model.width, scale, options.model.licence, options.model.description, rule)
    save_scorer(model, config, Path(options.training.output) / "model")
    figures = {"mae": mae}
    try:
        figures["spearman"] = spearman(scores, labels)
    except EvaluationError as error:
        logger.warning("no rank correlation: %s", error)
    return figures


@torch.no_grad()
def score_faces(model: TinyFQNet, faces: DegradedFaces, indices: Tensor, batch_size: int = 64) -> np.ndarray[Any, Any]:
    """Raw scores float64 [N] of the faces at ``indices``, all readable."""
    device = default_device()
    model.to(device).eval()
    data = LabelledFaceData(faces, torch.zeros(len(faces.labels)), indices)
    batches = DataLoader(data, batch_size, collate_fn=collate_faces)
    scores = [model(normalize_faces(batch["images"].to(device).float() / 255)).cpu() for batch in batches]
    return torch.cat(scores).double().numpy()


def fit_scale(scores: np.ndarray[Any, Any], severities: np.ndarray[Any, Any]) -> QualityScale:
    """The map to 0-100 that gives the median undegraded face 75 and the median face of severity 0.5 or more 25.

    Ours: the reference point moves with the evaluation split's photographs. A scorer that does not tell the two apart
    keeps the default, and the log says so.
    """
    good, poor = scores[severities == 0], scores[severities >= POOR_SEVERITY]
    if len(good) and len(poor) and np.median(good) > np.median(poor):
        high, low = float(np.median(good)), float(np.median(poor))
        return QualityScale((high + low) / 2, (high - low) / (2 * float(np.log(GOOD_QUALITY / (100 - GOOD_QUALITY)))))
    logger.warning("the scorer does not tell good faces from degraded ones; its scale stays the default")
    return DEFAULT_SCALE
