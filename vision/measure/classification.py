"""Accuracy of a classifier over a labelled data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from vision.backbones.backbone import Backbone
from vision.backbones.checkpoint import load_backbone
from vision.data.classification import ClassificationData, Sample, Skipped
from vision.data.image_sources import open_source
from vision.data.sources import DataError

Batch = tuple[Tensor, Tensor, list[str]]


@dataclass(frozen=True)
class ClassifierReport:
    """``top1`` and ``top5`` are shares of ``images``, ``loss`` is in nats; ``skipped`` names what could not be read.

    With fewer than five classes ``top5`` is 1. ``confusion`` counts for each class as what its images were taken, by
    names where the network has them.
    """

    top1: float
    top5: float
    loss: float
    images: int
    skipped: tuple[str, ...]
    confusion: dict[str, dict[str, int]]


def default_device() -> torch.device:
    """The accelerator where there is one that works, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether each label is among the ``k`` largest of its row: ``logits`` [B, classes], ``labels`` [B] -> bool [B]."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(dim=1)


def keep_skipped(samples: Sequence[Sample | Skipped]) -> Batch:
    """Images [B, 3, H, W], labels [B] (both may be empty) and the reasons of the images that could not be read."""
    good = [sample for sample in samples if isinstance(sample, Sample)]
    images = torch.stack([sample.image for sample in good]) if good else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    labels = torch.tensor([sample.label for sample in good], dtype=torch.long)
    return images, labels, [sample.reason for sample in samples if isinstance(sample, Skipped)]


def evaluate_model(
    model: Backbone, data: ClassificationData, batch_size: int = 64, loader_workers: int = 0
) -> ClassifierReport:
    """Measure ``model``, where it is, over all of ``data``. Errors: DataError where no image can be read."""
    device = model.head.weight.device
    was_training = model.training
    model.eval()
    skipped: list[str] = []
    top1 = top5 = images = 0
    loss = 0.0
    counts = torch.zeros(model.num_classes, model.num_classes, dtype=torch.long)
    with torch.no_grad():
        for batch, labels, reasons in DataLoader(data, batch_size, collate_fn=keep_skipped, num_workers=loader_workers):
            skipped += reasons
            if not len(labels):
                continue
            labels = labels.to(device)
            logits = model(model.normalization(batch.to(device).float() / 255))
            images += len(labels)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            top1 += int(hits(logits, labels, 1).sum())
            top5 += int(hits(logits, labels, 5).sum())
            counts.index_put_((labels.cpu(), logits.argmax(dim=1).cpu()), torch.tensor(1), accumulate=True)
    model.train(was_training)
    if images == 0:
        raise DataError(f"none of the {len(data)} images can be read; the first: {skipped[0]}")
    names = model.class_names or tuple(str(index) for index in range(model.num_classes))
    confusion = {
        names[true]: {names[taken]: int(counts[true, taken]) for taken in counts[true].nonzero()[:, 0].tolist()}
        for true in counts.sum(dim=1).nonzero()[:, 0].tolist()
    }
    return ClassifierReport(top1 / images, top5 / images, loss / images, images, tuple(skipped), confusion)


def evaluate_classifier(
    checkpoint: Path, kind: str, root: Path, split: str, *, batch_size: int = 64, loader_workers: int = 0
) -> ClassifierReport:
    """Measure the backbone saved in ``checkpoint`` over ``split`` of the data of ``kind`` in ``root``.

    Size, crop and normalisation are the checkpoint's own. Errors: CheckpointError, DataError (also where the classes
    are not those the network was trained for).
    """
    model = load_backbone(checkpoint)
    source = open_source(kind, root, split)
    if model.class_names and model.class_names != source.class_names:
        differing = sorted(set(model.class_names) ^ set(source.class_names)) or ["their order"]
        raise DataError(
            f"{checkpoint} was trained for other classes than {root} holds; they differ in {differing[:10]}"
        )
    if len(source.class_names) != model.num_classes:
        raise DataError(f"{checkpoint} has {model.num_classes} classes, {root} has {len(source.class_names)}")
    return evaluate_model(
        model.to(default_device()), ClassificationData(source, model.preprocessing), batch_size, loader_workers
    )
