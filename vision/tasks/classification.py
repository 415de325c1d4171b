"""Train a backbone to classify images.

The recipe's tables: ``[model]``, ``[data]``, ``[augmentation]`` (optional), ``[task]`` (optional), ``[training]``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from rich.console import Console
from torch import Tensor, nn
from transformers import TrainerCallback

from kernels.diagonalwise import refactorize, tune
from kernels.training import (
    KeepBest,
    Metric,
    RecipeError,
    TrainingOptions,
    TrainingReport,
    check_tables,
    run,
    take_table,
)
from vision.backbones import create_backbone
from vision.backbones.backbone import Backbone
from vision.backbones.checkpoint import load_backbone, save_backbone
from vision.data.augmentation import AugmentationOptions
from vision.data.classification import ClassificationData, DataOptions, collate
from vision.measure.classification import default_device, evaluate_model, hits
from vision.tasks.averaging import (
    BEST,
    STATISTICS_BATCHES,
    KeepAverage,
    MovingAverage,
    kept_best,
    reestimate,
    training_batches,
)
from vision.tasks.starting import trained_backbone

logger = logging.getLogger(__name__)

TOP1 = Metric("top1", larger_is_better=True)
DEPTHWISE = ("native", "diagonalwise", "tuned")


@dataclass(frozen=True)
class ModelOptions:
    """Which network. ``start_from`` is a saved backbone to fine-tune, or a detector or segmenter whose backbone is.

    The head is replaced where the classes differ.

    ``depthwise`` says how depthwise layers are computed while training: "native", "diagonalwise" (always refactored),
    or "tuned" (whatever is measured to be fastest). The trained weights are those of plain layers in any case.
    ``channels_last`` keeps the maps in that memory format, which on a CPU is up to twice as fast.
    """

    backbone: str | None = None
    start_from: str | None = None
    depthwise: str = "native"
    channels_last: bool = False

    def __post_init__(self) -> None:
        if (self.backbone is None) == (self.start_from is None):
            raise RecipeError("[model] needs either backbone (a name) or start_from (a folder with a saved backbone)")
        if self.depthwise not in DEPTHWISE:
            raise RecipeError(f"model.depthwise is {self.depthwise!r}; allowed are {', '.join(DEPTHWISE)}")


@dataclass(frozen=True)
class TaskOptions:
    """What is optimised.

    ``mixup`` is the parameter of mixup's Beta distribution (arXiv 1710.09412), 0 leaves it out. ``ema_decay`` keeps an
    exponential average of the weights, which is what is evaluated; the better of it and the raw weights is saved.
    ``reestimate_batches`` recomputes the batch-normalisation statistics over so many training batches at the end, as
    SNet's authors do; those of an average always are.
    """

    label_smoothing: float = 0.0
    mixup: float = 0.0
    ema_decay: float | None = None
    reestimate_batches: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1 or self.mixup < 0 or self.reestimate_batches < 0:
            raise RecipeError("[task] label_smoothing must be in [0, 1), mixup and reestimate_batches at least 0")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise RecipeError(f"task.ema_decay is {self.ema_decay}; it must be between 0 and 1, or left out")


class ClassificationTask(nn.Module):
    """Cross-entropy of a backbone over a batch of byte images, with mixup and a moving average of the weights."""

    skipped: Tensor

    def __init__(self, model: Backbone, options: TaskOptions, channels_last: bool = False) -> None:
        super().__init__()
        self.model = model
        self.options = options
        # The layers follow the format of their input; the weights stay as they are, since safetensors takes no other.
        self.memory_format = memory_format(channels_last)
        self.average = None if options.ema_decay is None else MovingAverage(model, options.ema_decay)
        self.register_buffer("skipped", torch.zeros((), dtype=torch.long))

    @property
    def trained(self) -> Backbone:
        """The network that evaluations measure: the average where there is one."""
        return self.model if self.average is None else self.average.network

    def forward(self, images: Tensor, labels: Tensor, skipped: Tensor) -> dict[str, Tensor]:
        """``images`` uint8 [B, 3, H, W], ``labels`` [B] -> mean loss in nats, shares of top-1 and top-5 hits.

        While training, ``skipped`` (images of the batch that could not be read) is added up, once for each epoch.
        """
        x = self.inputs(images)
        if not self.training:
            logits = self.trained(x)
            return {"loss": F.cross_entropy(logits, labels), **self.figures(logits, labels)}
        self.skipped += skipped.sum()
        if self.options.mixup == 0:
            logits = self.model(x)
            return {"loss": self.loss(logits, labels), **self.figures(logits, labels)}
        share = float(torch.distributions.Beta(self.options.mixup, self.options.mixup).sample())
        order = torch.randperm(len(x), device=x.device)
        logits = self.model(share * x + (1 - share) * x[order])
        loss = share * self.loss(logits, labels) + (1 - share) * self.loss(logits, labels[order])
        return {"loss": loss, **self.figures(logits, labels if share >= 0.5 else labels[order])}

    def inputs(self, images: Tensor) -> Tensor:
        """Bytes as the network takes them."""
        return self.model.normalization(images.float() / 255).contiguous(memory_format=self.memory_format)

    def show(self, model: Backbone, batch: Mapping[str, Tensor]) -> None:
        """Pass a training batch through ``model``, for its statistics alone."""
        model(self.inputs(batch["images"]))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy against smoothed labels."""
        return F.cross_entropy(logits, labels, label_smoothing=self.options.label_smoothing)

    def figures(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Shares of hits; with mixup against the label that weighs more."""
        return {f"top{k}": hits(logits, labels, k).float().mean() for k in (1, 5)}


@dataclass(frozen=True)
class ClassifierRecipe:
    """All tables of a recipe, checked."""

    model: ModelOptions
    data: DataOptions
    augmentation: AugmentationOptions
    task: TaskOptions
    training: TrainingOptions

    @classmethod
    def parse(cls, recipe: dict[str, Any]) -> ClassifierRecipe:
        """Read every table. Errors: RecipeError naming the table and the key."""
        check_tables(recipe, (field.name for field in dataclasses.fields(cls)))
        try:
            return cls(
                model=take_table(recipe, "model", ModelOptions),
                data=take_table(recipe, "data", DataOptions),
                augmentation=take_table(recipe, "augmentation", AugmentationOptions),
                task=take_table(recipe, "task", TaskOptions),
                training=take_table(recipe, "training", TrainingOptions),
            )
        except ValueError as error:
            raise error if isinstance(error, RecipeError) else RecipeError(str(error)) from error


def build_model(options: ModelOptions, data: DataOptions, class_names: tuple[str, ...]) -> Backbone:
    """The network of a recipe for these classes, carrying the recipe's preprocessing."""
    if options.backbone is not None:
        model = create_backbone(options.backbone, len(class_names))
    else:
        folder = Path(str(options.start_from)).expanduser()
        model = trained_backbone(folder, len(class_names), data.normalization)
        if model.class_names != class_names:
            model.replace_head(len(class_names))
    model.class_names = class_names
    model.preprocessing = data.preprocessing
    return model


def memory_format(channels_last: bool) -> torch.memory_format:
    """How maps lie in memory."""
    return torch.channels_last if channels_last else torch.contiguous_format


def choose_depthwise(model: Backbone, options: ModelOptions, training: TrainingOptions, side: int) -> None:
    """Replace the depthwise layers as the recipe asks; ``tune`` measures a batch as training will see it.

    Batch size, ``side`` in pixels, memory format and precision are training's.
    """
    if options.depthwise == "diagonalwise":
        refactorize(model)
    elif options.depthwise == "tuned":
        device = default_device()
        batch = torch.zeros(training.batch_size, 3, side, side, device=device)
        batch = batch.contiguous(memory_format=memory_format(options.channels_last))
        half = torch.float16 if training.precision == "fp16" else torch.bfloat16
        with torch.autocast(device.type, half, enabled=training.precision != "fp32"):
            choices = tune(model.to(device).train(), batch)
        logger.info("depthwise layers: %s", ", ".join(f"{choice.layer} {choice.chosen}" for choice in choices))


def train_classifier(recipe: dict[str, Any], *, resume: bool = False, console: Console | None = None) -> TrainingReport:
    """Run a recipe; ``output/model`` then holds the trained backbone, which ``checkpoint`` names.

    ``final`` gains ``top1`` and ``top5`` of the saved model over the evaluation split, and ``skipped_images``, how
    often an image could not be read. An interrupted run (``finished`` False) names the checkpoint to resume from.
    Errors: RecipeError, DataError, BackboneError, TrainingDivergedError.
    """
    options = ClassifierRecipe.parse(recipe)
    train_source, eval_source = options.data.open_train(), options.data.open_eval()
    if train_source.class_names != eval_source.class_names:
        differing = sorted(set(train_source.class_names) ^ set(eval_source.class_names))
        raise RecipeError(f"training and evaluation split have different classes: {', '.join(differing)}")
    torch.manual_seed(options.training.seed)
    model = build_model(options.model, options.data, train_source.class_names)
    side = options.data.image_size
    choose_depthwise(model, options.model, options.training, side)
    task = ClassificationTask(model, options.task, options.model.channels_last)
    train_data = ClassificationData(
        train_source, model.preprocessing, options.augmentation, options.training.seed, options.data.limit
    )
    report = run(
        task,
        train_data,
        options.training,
        eval_data=ClassificationData(eval_source, model.preprocessing),
        collate=collate,
        callbacks=watchers(task, train_data, options),
        recipe=recipe,
        resume=resume,
        console=console,
        metric=TOP1,
    )
    if not report.finished:
        return report
    figures = finish(task, train_data, ClassificationData(eval_source, model.preprocessing), options, report)
    folder = Path(options.training.output) / "model"
    return dataclasses.replace(report, final={**report.final, **figures}, checkpoint=str(folder))


def finish(
    task: ClassificationTask,
    train_data: ClassificationData,
    eval_data: ClassificationData,
    options: ClassifierRecipe,
    report: TrainingReport,
) -> dict[str, float]:
    """Re-estimate the statistics if need be, measure, save the best network. Only the main process works.

    It is that of the last weights, of their average, or of the best evaluation, which stays in ``output/best``.
    """
    state = PartialState()
    figures: dict[str, float] = {"skipped_images": float(task.skipped)}
    if state.is_main_process:
        measured = []
        for model in (task.model,) if task.average is None else (task.trained, task.model):
            settle_statistics(task, model, train_data, options)
            result = evaluate_model(model, eval_data, options.training.batch_size, options.training.loader_workers)
            measured.append((result.top1, result.top5, model))
        best = kept_best(report, options.training.output, options.training.steps)
        if best is not None:
            kept = load_backbone(best).to(task.model.head.weight.device)
            result = evaluate_model(kept, eval_data, options.training.batch_size, options.training.loader_workers)
            measured.append((result.top1, result.top5, kept))
        top1, top5, chosen = max(measured, key=lambda entry: entry[0])
        save_backbone(chosen, Path(options.training.output) / "model")
        figures |= {"top1": top1, "top5": top5}
    state.wait_for_everyone()
    return figures


def watchers(task: ClassificationTask, data: ClassificationData, options: ClassifierRecipe) -> list[TrainerCallback]:
    """What moves the task's average, and keeps the best evaluation's network."""
    average = KeepAverage(
        task, task.model, task.average, task.show,
        lambda: training_batches(data, options.training.batch_size, collate),
    )  # fmt: skip
    folder = Path(options.training.output) / BEST
    return [*average.callbacks, KeepBest(TOP1.name, lambda: save_backbone(task.trained, folder))]


def settle_statistics(
    task: ClassificationTask, model: Backbone, data: ClassificationData, options: ClassifierRecipe
) -> None:
    """The statistics of final weights over ``reestimate_batches``; averaged weights always need them."""
    batches = options.task.reestimate_batches or (0 if model is task.model else STATISTICS_BATCHES)
    if batches:
        shown = training_batches(data, options.training.batch_size, collate, options.training.loader_workers)
        reestimate(task, model, task.show, islice(shown, batches))
