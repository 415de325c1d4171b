"""Train a detector: ThunderNet, or YOLOv2's head, on any backbone, with mined hard examples.

The recipe's tables: ``[model]``, ``[data]``, ``[augmentation]``, ``[mining]``, ``[task]`` (the last three optional),
``[training]``; ``[teacher]`` with ``[[terms]]`` let a trained ThunderNet teach a smaller one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor, nn

from kernels.training import AfterEvaluation, KeepBest, Metric, TrainingReport, run
from vision.data.detection import DetectionData, collate_detection
from vision.data.labelled_boxes import DetectionSource
from vision.detection.checkpoint import load_detector, save_detector
from vision.detection.detections import Detections
from vision.detection.detector import DetectorConfig, LoadedDetector, Network
from vision.detection.evaluate import Truth, average_precisions, mean_present
from vision.detection.report import DetectorReport, evaluate_source, training_recall
from vision.detection.thundernet import ThunderNet
from vision.detection.thundernet_loss import ThunderNetLoss
from vision.detection.yolo_loss import YOLOv2Loss
from vision.distillation.detector import DetectorTeacher, load_detector_teacher
from vision.tasks.averaging import BEST, KeepAverage, MovingAverage, kept_best, training_batches
from vision.tasks.detection_recipe import DetectorRecipe, build_model

logger = logging.getLogger(__name__)


class DetectionTask(nn.Module):
    """The losses of a detector over a batch of byte images, with mining and a moving average of the weights.

    A ``teacher`` adds its terms while training, each times its weight.
    """

    seen: Tensor
    skipped: Tensor

    def __init__(self, model: Network, recipe: DetectorRecipe, teacher: DetectorTeacher | None = None) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher
        self.images_per_step = recipe.training.batch_size * recipe.training.accumulation
        self.warm_up_images = recipe.task.warm_up_images
        self.normalization = recipe.data.constants
        self.train_sizes = recipe.data.train_sizes
        self.num_images = recipe.training.steps * self.images_per_step
        mining = recipe.mining
        # The losses draw from torch's own generator, whose state a checkpoint holds.
        self.thundernet_loss = ThunderNetLoss(
            mining.region_miner,
            mining.anchor_miner,
            recipe.task.budget,
            mining.anchors_per_image,
            reweighing=mining.reweighing,
        )
        self.warm_up_loss = YOLOv2Loss()
        self.yolo_loss = mining.yolo_loss()
        decay = recipe.task.ema_decay
        self.average = None if decay is None else MovingAverage(model, decay)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.long))
        self.found: list[tuple[Detections, Truth]] = []

    @property
    def trained(self) -> Network:
        """The network that evaluations measure: the average where there is one."""
        return self.model if self.average is None else self.average.network

    def forward(
        self, images: Tensor, boxes: Tensor, labels: Tensor, ignored: Tensor, skipped: Tensor
    ) -> dict[str, Tensor]:
        """A batch of ``collate_detection`` -> ``loss`` and its named parts.

        While training, ``skipped`` is added up. While evaluating, what is found is kept in ``found`` beside the truth.
        """
        # A CPU convolves this memory format a third faster.
        inputs = self.normalization(images.float() / 255).contiguous(memory_format=torch.channels_last)
        if not self.training:
            return self.evaluate(inputs, boxes, labels, ignored)
        self.skipped += skipped.sum()
        inputs, boxes = self.resize(inputs, boxes)
        losses = self.losses(self.model, inputs, *_split(boxes, labels, ignored))
        weights = self.teacher.weights_at(int(self.seen) // self.images_per_step + 1) if self.teacher else {}
        self.seen += len(images)
        return _joined(losses, weights)

    def evaluate(self, inputs: Tensor, boxes: Tensor, labels: Tensor, ignored: Tensor) -> dict[str, Tensor]:
        """Losses of the trained network; its detections are kept."""
        model = self.trained
        losses = self.losses(model, inputs, *_split(boxes, labels, ignored))
        for row, detections in enumerate(model(inputs)):
            own = labels[row] >= 0
            truth = Truth(*(values[row, own].cpu().numpy() for values in (boxes, labels, ignored)))
            self.found.append((detections.cpu(), truth))
        return _joined(losses, {})

    def losses(self, model: Network, inputs: Tensor, boxes: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
        """The named losses of the architecture, and while training the teacher's terms, unweighted."""
        if isinstance(model, ThunderNet):
            progress = min(1.0, int(self.seen) / self.num_images)
            lesson = self.teacher.lesson(inputs) if self.teacher and self.training else None
            return self.thundernet_loss(model, inputs, boxes, labels, progress, lesson)
        if int(self.seen) < self.warm_up_images:
            return self.warm_up_loss(model, inputs, boxes, labels, warm_up=True)
        return self.yolo_loss(model, inputs, boxes, labels, warm_up=False)

    def resize(self, inputs: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """A batch and its boxes at one of the training sizes, drawn for the batch as a whole."""
        if not self.train_sizes:
            return inputs, boxes
        size = self.train_sizes[int(torch.randint(len(self.train_sizes), ()))]
        if size == inputs.shape[-1]:
            return inputs, boxes
        resized = F.interpolate(inputs, size=(size, size), mode="bilinear", antialias=True)
        return resized, boxes * (size / inputs.shape[-1])

    def show(self, model: Network, batch: Mapping[str, Tensor]) -> None:
        """Pass a training batch through ``model``, for its statistics alone."""
        inputs = self.normalization(batch["images"].float() / 255).contiguous(memory_format=torch.channels_last)
        self.losses(model, inputs, *_split(batch["boxes"], batch["labels"], batch["ignored"]))

    def take_map50(self) -> float:
        """Mean average precision at an overlap of 0.5 of what was found since the last call, over all processes."""
        found, self.found = gather_object(self.found), []
        detections, truths = [pair[0] for pair in found], [pair[1] for pair in found]
        return mean_present(average_precisions(detections, truths, self.model.num_classes))


def _joined(losses: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    """Their weighted sum as ``loss`` (1 where there is no weight), and each without gradient, to be reported."""
    total = torch.stack([weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum()
    return {"loss": total, **{name: loss.detach() for name, loss in losses.items()}}


def _split(boxes: Tensor, labels: Tensor, ignored: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Boxes and labels of every image, without padding and ignored ones."""
    used = (labels >= 0) & ~ignored
    return [x[own] for x, own in zip(boxes, used, strict=True)], [x[own] for x, own in zip(labels, used, strict=True)]


def train_detector(recipe: dict[str, Any], *, resume: bool = False, console: Console | None = None) -> TrainingReport:
    """Run a recipe; ``output/model`` then holds the trained detector, which ``checkpoint`` names.

    The best of the last weights, their average and the best evaluation's, which stay in ``output/best``, is saved.
    ``final`` gains ``map50``, ``map60``, ``map70`` and, with pycocotools, COCO's ``map`` of the saved detector over the
    evaluation split (see ``DetectorReport``), ``training_recall`` on training images, ``skipped_images``, how often an
    image could not be read, and ``degenerate_boxes``, how many were dropped from the training split. An interrupted run
    (``finished`` False) names the checkpoint to resume from. Errors: RecipeError, DataError, BackboneError,
    CheckpointError, TeacherError, TrainingDivergedError.
    """
    options = DetectorRecipe.parse(recipe)
    train_source = options.data.open_train()
    eval_source = options.data.open_eval(train_source.class_names)
    torch.manual_seed(options.training.seed)
    model, config = build_model(options, train_source)
    teacher = None
    if options.teacher is not None:
        teacher = load_detector_teacher(Path(options.teacher.path).expanduser(), config, options.terms)
    task = DetectionTask(model, options, teacher)
    data = options.data
    train_data = DetectionData(
        train_source, max((data.image_size, *data.train_sizes)), data.resize, options.augmentation,
        options.training.seed, data.train_difficult, data.cache_mib,
    )  # fmt: skip
    average = KeepAverage(
        task, model, task.average, task.show,
        lambda: training_batches(train_data, options.training.batch_size, collate_detection),
    )  # fmt: skip

    def keep() -> None:
        save_detector(task.trained, config, Path(options.training.output) / BEST)

    report = run(
        task,
        train_data,
        options.training,
        eval_data=DetectionData(eval_source, data.image_size, data.resize, cache_mib=data.cache_mib),
        collate=collate_detection,
        callbacks=[*average.callbacks, AfterEvaluation("map50", task.take_map50), KeepBest("map50", keep)],
        recipe=recipe,
        resume=resume,
        console=console,
        metric=Metric("map50", larger_is_better=True),
    )
    if not report.finished:
        return report
    folder = Path(options.training.output) / "model"
    figures = {"skipped_images": float(task.skipped), "degenerate_boxes": float(train_source.degenerate)}
    state = PartialState()
    if state.is_main_process:
        average.settle()
        best = kept_best(report, options.training.output, options.training.steps)
        chosen, result = best_of(task, config, eval_source, best)
        recall = training_recall(LoadedDetector(chosen, config), train_source)
        save_detector(chosen, dataclasses.replace(config, training_recall=recall), folder)
        figures |= {"map50": result.map50, "map60": result.map60, "map70": result.map70, "training_recall": recall}
        figures |= {} if result.map is None else {"map": result.map}
    state.wait_for_everyone()
    return dataclasses.replace(report, final={**report.final, **figures}, checkpoint=str(folder))


def best_of(
    task: DetectionTask, config: DetectorConfig, source: DetectionSource, best: Path | None
) -> tuple[Network, DetectorReport]:
    """The average, the raw weights or those in ``best``, whichever finds most in ``source``, with its figures."""
    candidates = {"average": task.trained} if task.average is not None else {}
    candidates |= {"last": task.model} | ({"best": load_detector(best).model} if best is not None else {})
    measured = {
        name: evaluate_source(LoadedDetector(model.eval(), config), source) for name, model in candidates.items()
    }
    logger.info("map50: %s", ", ".join(f"{name} {result.map50:.4g}" for name, result in measured.items()))
    chosen = max(measured, key=lambda name: measured[name].map50)
    return candidates[chosen], measured[chosen]
