"""Data sets of images with boxes as the detector's trainer and evaluator read them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vision.backbones.preprocessing import NORMALIZATIONS, Normalization
from vision.data.classification import Skipped, to_tensor
from vision.data.detection_augmentation import (
    MEAN_COLOUR,
    DetectionAugmentation,
    centres_inside,
    distort_colours,
    draw_view,
    reflect,
    squared,
)
from vision.data.detection_sources import DETECTION_SOURCES, open_detection
from vision.data.epoch import shared_epoch
from vision.data.labelled_boxes import MIN_SIDE, DetectionSource, LabelledImage, of_classes
from vision.data.sources import DataError, UnreadableImageError
from vision.data.view import RESIZES, Resize, render, whole_image

logger = logging.getLogger(__name__)

NO_BOX = -1


@dataclass(frozen=True)
class DetectionDataOptions:
    """Where the images are, and the size and scale the network sees them in.

    ``kind`` is "voc", "coco", "yolo" or, for made scenes, "needles" or "shapes"; splits are named as in
    ``vision.data.detection_sources``. ``class_names`` None takes those of the training split. ``image_size`` is that of
    test time; with ``train_sizes`` each training batch is brought to one of them by chance. ``cache_mib`` bounds the
    memory in which decoded images are kept.
    ``only_classes`` trains on these alone: boxes of others are left out, in both splits.
    ``train_difficult`` also trains on VOC's difficult boxes; crowds never train.
    """

    kind: str
    root: str
    train_split: str = "train"
    eval_split: str = "val"
    class_names: tuple[str, ...] | None = None
    only_classes: tuple[str, ...] = ()
    image_size: int = 320
    train_sizes: tuple[int, ...] = ()
    resize: Resize = "stretch"
    normalization: str = "imagenet"
    train_difficult: bool = False
    cache_mib: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in DETECTION_SOURCES:
            raise DataError(f"data.kind is {self.kind!r}; allowed are {', '.join(DETECTION_SOURCES)}")
        if self.normalization not in NORMALIZATIONS:
            raise DataError(f"data.normalization is {self.normalization!r}; allowed are {', '.join(NORMALIZATIONS)}")
        if self.resize not in RESIZES:
            raise DataError(f"data.resize is {self.resize!r}; allowed are {', '.join(RESIZES)}")
        if min(self.image_size, *self.train_sizes, self.image_size) < 32:
            raise DataError("data.image_size and data.train_sizes must be at least 32 pixels")
        if self.limit is not None and self.limit < 1:
            raise DataError(f"data.limit is {self.limit}; it must be at least 1")

    @property
    def constants(self) -> Normalization:
        """Mean and deviation of the channels."""
        return NORMALIZATIONS[self.normalization]

    def open_train(self) -> DetectionSource:
        """The training split, its first ``limit`` images."""
        source = self._open(self.train_split, self.class_names)
        return self._with_boxes(DetectionSource(source.class_names, source.images[: self.limit], source.degenerate))

    def open_eval(self, class_names: tuple[str, ...]) -> DetectionSource:
        """The split for evaluation, with the classes of the training split."""
        return self._with_boxes(self._open(self.eval_split, class_names))

    def _open(self, split: str, class_names: tuple[str, ...] | None) -> DetectionSource:
        if not self.only_classes:
            return open_detection(self.kind, Path(self.root), split, class_names)
        everything = open_detection(self.kind, Path(self.root), split, self.class_names)
        return of_classes(everything, self.only_classes, self.only_classes)

    def _with_boxes(self, source: DetectionSource) -> DetectionSource:
        if source.count_boxes(difficult=self.train_difficult) == 0:
            dropped = f" {source.degenerate} were dropped as degenerate;" if source.degenerate else ""
            raise DataError(
                f"no box is left on {len(source.images)} images of {self.root};{dropped} check the label files' place, "
                "names and coordinates"
            )
        return source


@dataclass(frozen=True)
class DetectionSample:
    """One image as bytes, [3, S, S], with its boxes [G, 4] in its pixels, ``labels`` [G] and ``ignored`` [G]."""

    image: Tensor
    boxes: Tensor
    labels: Tensor
    ignored: Tensor


class ImageCache:
    """Decoded images, kept until ``limit`` bytes are full."""

    def __init__(self, limit: int) -> None:
        self.free = limit
        self.images: dict[Path, Image.Image] = {}

    def read(self, truth: LabelledImage) -> Image.Image:
        """The image as RGB, as its boxes were drawn on it. Errors: UnreadableImageError."""
        if truth.path in self.images:
            return self.images[truth.path]
        image = truth.read()
        size = image.width * image.height * 3
        if size <= self.free:
            self.free -= size
            self.images[truth.path] = image
        return image


class DetectionData(Dataset[DetectionSample | Skipped]):
    """Images of a source as ``size`` pixel squares, augmented where ``augmentation`` is given.

    Training leaves out ignored boxes, unless ``train_difficult`` is set. Chance is a function of seed, epoch and index
    alone. Unreadable images become ``Skipped``.
    """

    def __init__(
        self,
        source: DetectionSource,
        size: int,
        resize: Resize = "stretch",
        augmentation: DetectionAugmentation | None = None,
        seed: int = 0,
        train_difficult: bool = False,
        cache_mib: int = 0,
    ) -> None:
        self.source, self.size, self.resize = source, size, resize
        self.augmentation, self.seed, self.train_difficult = augmentation, seed, train_difficult
        self.cache = ImageCache(cache_mib << 20)
        self.epoch = shared_epoch()

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of ``epoch``."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.source.images)

    def __getitem__(self, index: int) -> DetectionSample | Skipped:
        truth = self.source.images[index]
        try:
            image = self.cache.read(truth)
        except UnreadableImageError as error:
            return Skipped(str(error))
        if self.augmentation is None:
            return self._plain(image, truth)
        return self._augmented(
            image, truth, self.augmentation, np.random.default_rng((self.seed, int(self.epoch), index))
        )

    def _plain(self, image: Image.Image, truth: LabelledImage) -> DetectionSample:
        view = whole_image(image.width, image.height, self.resize)
        boxes = torch.from_numpy(view.boxes_in(truth.boxes, self.size))
        picture = to_tensor(render(image, view, self.size))
        return DetectionSample(picture, boxes, torch.from_numpy(truth.labels), torch.from_numpy(truth.ignored))

    def _augmented(
        self,
        image: Image.Image,
        truth: LabelledImage,
        options: DetectionAugmentation,
        generator: np.random.Generator,
    ) -> DetectionSample:
        used = np.ones_like(truth.ignored) if self.train_difficult else ~truth.ignored
        boxes, labels = truth.boxes[used], truth.labels[used]
        view = draw_view(image.width, image.height, boxes, options, generator)
        kept = centres_inside(view, boxes)
        if self.resize == "letterbox":
            view = squared(view)
        boxes, labels = view.boxes_in(boxes[kept], self.size).clip(0, self.size), labels[kept]
        picture = render(image, view, self.size, MEAN_COLOUR)
        if options.photometric:
            picture = distort_colours(picture, options, generator)
        picture, boxes = reflect(picture, boxes, options, generator)
        whole = ((boxes[:, 2:] - boxes[:, :2]) > MIN_SIDE).all(axis=1)
        boxes, labels = np.ascontiguousarray(boxes[whole]), labels[whole]
        ignored = torch.zeros(len(boxes), dtype=torch.bool)
        return DetectionSample(to_tensor(picture), torch.from_numpy(boxes), torch.from_numpy(labels), ignored)


def collate_detection(samples: Sequence[DetectionSample | Skipped]) -> dict[str, Tensor]:
    """``images`` uint8 [B, 3, S, S]; ``boxes`` [B, G, 4], ``labels`` [B, G], ``ignored`` [B, G]; ``skipped`` [1].

    G is the most boxes an image has; labels beyond an image's own are -1. Every unreadable image is named in the log.
    Errors: UnreadableImageError where nothing of the batch is left.
    """
    good = [sample for sample in samples if isinstance(sample, DetectionSample)]
    skipped = [sample for sample in samples if isinstance(sample, Skipped)]
    for sample in skipped:
        logger.warning("skipped: %s", sample.reason)
    if not good:
        raise UnreadableImageError(f"no image of a batch of {len(samples)} can be read; the first: {skipped[0].reason}")
    most = max(len(sample.labels) for sample in good)
    boxes = torch.zeros(len(good), most, 4)
    labels = torch.full((len(good), most), NO_BOX)
    ignored = torch.zeros(len(good), most, dtype=torch.bool)
    for row, image in enumerate(good):
        count = len(image.labels)
        boxes[row, :count], labels[row, :count], ignored[row, :count] = image.boxes, image.labels, image.ignored
    return {
        "images": torch.stack([sample.image for sample in good]),
        "boxes": boxes,
        "labels": labels,
        "ignored": ignored,
        "skipped": torch.tensor([len(skipped)]),
    }
