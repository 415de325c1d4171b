"""Data sets of labelled images as the classifier's trainer and evaluator read them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vision.backbones.preprocessing import NORMALIZATIONS, Preprocessing
from vision.data.augmentation import AugmentationOptions, augment
from vision.data.epoch import shared_epoch
from vision.data.image_sources import SOURCES, open_source
from vision.data.sources import DataError, FirstClasses, ImageSource, InMemorySource, UnreadableImageError
from vision.data.view import centre_crop

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataOptions:
    """Where the images are, and the size and scale the network sees them in.

    ``kind`` is one of ``vision.data.image_sources.SOURCES``; the splits are names inside ``root`` and default to the
    kind's own. ImageNet is of kind "folder": ``root/train/CLASS/``, ``root/val/CLASS/``. ``resize`` None means
    image_size / 0.875. ``classes`` takes the images of the first so many classes, ``limit`` that many images, evenly
    spread over the training split. ``in_memory`` keeps decoded images for the next epoch.
    """

    kind: str
    root: str
    train_split: str | None = None
    eval_split: str | None = None
    image_size: int = 224
    resize: int | None = None
    normalization: str = "imagenet"
    classes: int | None = None
    limit: int | None = None
    in_memory: bool = False

    def __post_init__(self) -> None:
        if self.kind not in SOURCES:
            raise DataError(f"data.kind is {self.kind!r}; allowed are {', '.join(SOURCES)}")
        if self.normalization not in NORMALIZATIONS:
            raise DataError(f"data.normalization is {self.normalization!r}; allowed are {', '.join(NORMALIZATIONS)}")

    @property
    def preprocessing(self) -> Preprocessing:
        """The test-time preprocessing these options ask for."""
        resize = round(self.image_size / 0.875) if self.resize is None else self.resize
        return Preprocessing(self.image_size, resize, NORMALIZATIONS[self.normalization])

    def open_train(self) -> ImageSource:
        """The training split."""
        return self.open(self.train_split or SOURCES[self.kind].train_split)

    def open_eval(self) -> ImageSource:
        """The split for evaluation."""
        return self.open(self.eval_split or SOURCES[self.kind].eval_split)

    def open(self, split: str) -> ImageSource:
        """The images of ``split``. Errors: DataError."""
        source = open_source(self.kind, Path(self.root), split)
        source = source if self.classes is None else FirstClasses(source, self.classes)
        return InMemorySource(source) if self.in_memory else source


@dataclass(frozen=True)
class Sample:
    """One image as bytes, [3, H, W], and its class."""

    image: Tensor
    label: int


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and why."""

    reason: str


class ClassificationData(Dataset[Sample | Skipped]):
    """Images of a source, augmented where ``augmentation`` is given.

    Chance is a function of seed, epoch and index alone, so the same images come in every process, with any number of
    loader workers, and after a resume. Unreadable images become ``Skipped``.
    """

    def __init__(
        self,
        source: ImageSource,
        preprocessing: Preprocessing,
        augmentation: AugmentationOptions | None = None,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        self.source, self.preprocessing, self.augmentation, self.seed = source, preprocessing, augmentation, seed
        self.indices = spread(len(source.labels), limit)
        self.epoch = shared_epoch()

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of ``epoch``."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Sample | Skipped:
        index = int(self.indices[position])
        try:
            image = self.source.read(index)
        except UnreadableImageError as error:
            return Skipped(str(error))
        if self.augmentation is None:
            image = centre_crop(image, self.preprocessing.resize, self.preprocessing.image_size)
        else:
            generator = np.random.default_rng((self.seed, int(self.epoch), index))
            image = augment(image, self.preprocessing, self.augmentation, generator)
        return Sample(to_tensor(image), int(self.source.labels[index]))


def spread(count: int, limit: int | None) -> NDArray[np.int64]:
    """Indices of ``limit`` of ``count`` images at even distances; all where there is no limit."""
    if limit is None or limit >= count:
        return np.arange(count)
    if limit < 1:
        raise DataError(f"data.limit is {limit}; it must be at least 1")
    return np.linspace(0, count, limit, endpoint=False).astype(np.int64)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def collate(samples: Sequence[Sample | Skipped]) -> dict[str, Tensor]:
    """``images`` uint8 [B, 3, H, W], ``labels`` [B], ``skipped`` [1]: how many of the batch could not be read.

    Every unreadable image is named in the log. Errors: UnreadableImageError where nothing of the batch is left.
    """
    good = [sample for sample in samples if isinstance(sample, Sample)]
    skipped = [sample for sample in samples if isinstance(sample, Skipped)]
    for sample in skipped:
        logger.warning("skipped: %s", sample.reason)
    if not good:
        raise UnreadableImageError(f"no image of a batch of {len(samples)} can be read; the first: {skipped[0].reason}")
    return {
        "images": torch.stack([sample.image for sample in good]),
        "labels": torch.tensor([sample.label for sample in good]),
        "skipped": torch.tensor([len(skipped)]),
    }
