"""Labelled faces as the scorer's trainer and evaluator read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from vision.data.classification import to_tensor
from vision.data.epoch import shared_epoch
from vision.data.faces import DegradedFaces
from vision.face_quality.labels import balancing_weights


@dataclass(frozen=True)
class FaceAugmentation:
    """Changes that leave a face's usefulness alone: mirroring, and the noise of alignment.

    ``shift`` in pixels, ``rotation`` in degrees and ``scale`` as a share are drawn from minus to plus that much.
    Blur or occlusion would need new labels; they belong into the data as degraded copies.
    """

    flip: bool = True
    shift: float = 2.0
    rotation: float = 3.0
    scale: float = 0.03

    def __post_init__(self) -> None:
        if self.shift < 0 or self.rotation < 0 or not 0 <= self.scale < 0.5:
            raise ValueError("[augmentation] shift and rotation must be at least 0, scale from 0 to below 0.5")


class FaceSample(NamedTuple):
    """One face as bytes [3, H, W] and its quality label."""

    image: Tensor
    label: float


class LabelledFaceData(Dataset[FaceSample]):
    """The faces at ``indices`` with their labels; ``augmentation`` draws are a function of seed, epoch and index."""

    def __init__(
        self,
        faces: DegradedFaces,
        labels: Tensor,
        indices: Tensor,
        augmentation: FaceAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.faces, self.labels, self.indices = faces, labels, indices.tolist()
        self.augmentation, self.seed, self.epoch = augmentation, seed, shared_epoch()

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of ``epoch``."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> FaceSample:
        index = self.indices[position]
        image = self.faces.read(index)
        if self.augmentation is not None:
            image = jitter(image, self.augmentation, np.random.default_rng((self.seed, int(self.epoch), index)))
        return FaceSample(to_tensor(image), float(self.labels[index]))


def jitter(image: Image.Image, options: FaceAugmentation, generator: np.random.Generator) -> Image.Image:
    """A mirrored, moved, turned and scaled copy."""
    if options.flip and generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    dx, dy = (float(draw) for draw in generator.uniform(-options.shift, options.shift, 2))
    angle = float(np.radians(generator.uniform(-options.rotation, options.rotation)))
    size = 1 + float(generator.uniform(-options.scale, options.scale))
    cosine, sine = np.cos(angle) / size, np.sin(angle) / size
    x, y = image.width / 2, image.height / 2
    coefficients = (cosine, sine, x + dx - cosine * x - sine * y, -sine, cosine, y + dy + sine * x - cosine * y)
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


def collate_faces(samples: Sequence[FaceSample]) -> dict[str, Tensor]:
    """``images`` uint8 [B, 3, H, W], ``labels`` [B]."""
    return {
        "images": torch.stack([sample.image for sample in samples]),
        "labels": torch.tensor([sample.label for sample in samples]),
    }


class BalancedSampler(Sampler[list[int]]):
    """Batches that draw labels evenly (``balancing_weights``), with replacement; a function of seed and epoch."""

    def __init__(self, labels: Tensor, batch_size: int, power: float, max_oversampling: float, seed: int) -> None:
        self.weights = balancing_weights(labels, power, max_oversampling=max_oversampling)
        self.batch_size, self.drop_last, self.seed, self.epoch = batch_size, False, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of ``epoch``."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.weights) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        drawn = torch.multinomial(self.weights, len(self.weights), replacement=True, generator=generator)
        indices: list[int] = drawn.tolist()
        for start in range(0, len(indices), self.batch_size):
            yield indices[start : start + self.batch_size]
