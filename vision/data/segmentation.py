"""Images with a class for every pixel: folders of images and masks, and scenes of shapes made from a seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from vision.data.epoch import shared_epoch
from vision.data.sources import IMAGE_SUFFIXES, DataError, check_stems, read_image, split_folders
from vision.images import DAMAGE
from vision.segmentation.measure import IGNORED

SHAPES = ("background", "disc", "square", "triangle", "ring", "cross")


class MaskSource(Protocol):
    """Pairs of image and mask; the mask is one byte of class a pixel, 255 where it does not count."""

    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of pairs."""

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """RGB image and mask of one size."""


class FolderMasks:
    """``root/SPLIT/images/NAME.jpg`` with ``root/SPLIT/masks/NAME.png`` and ``root/classes.json``, a list of names."""

    def __init__(self, root: Path, split: str) -> None:
        try:
            names = json.loads((root / "classes.json").read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise DataError(f"{root / 'classes.json'} must hold a JSON list of class names: {error}") from error
        if not isinstance(names, list) or len(names) < 2 or len(set(map(str, names))) < len(names):
            raise DataError(f"{root / 'classes.json'} must hold a list of at least two different names, not {names!r}")
        self.class_names = tuple(str(name) for name in names)
        folders = split_folders(root, split)
        part = next((place for place in folders if place.is_dir()), folders[0])
        folder = part / "images"
        self.images = sorted(file for file in folder.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not self.images:
            raise DataError(f"{folder} holds no images")
        masks = part / "masks"
        missing = [file.name for file in self.images if not (masks / f"{file.stem}.png").is_file()]
        if missing:
            raise DataError(f"{masks} lacks the masks of {len(missing)} images, the first: {', '.join(missing[:5])}")
        self.masks = [masks / f"{file.stem}.png" for file in self.images]
        check_stems(self.images)
        self._check_values(masks)

    def _check_values(self, folder: Path) -> None:
        """Errors: DataError where no mask holds a class but the first: nothing would be learned."""
        values: set[int] = set()
        for file in self.masks:
            values |= set(np.unique(read_mask(file)).tolist())
            if values - {0, IGNORED}:  # values beyond the classes are refused with their picture
                return
        hint = f", and {IGNORED} marks pixels that do not count: write class 1 as 1" if IGNORED in values else ""
        raise DataError(
            f"the masks in {folder} hold the values {sorted(values)} only; "
            f"classes are 0 to {len(self.class_names) - 1} ({', '.join(self.class_names)}){hint}"
        )

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """The pair; DataError where sizes or classes do not fit."""
        pixels = read_mask(self.masks[index])
        mask = Image.fromarray(pixels)
        image = read_image(self.images[index], mask.size)
        classes = np.unique(pixels)
        if mask.size != image.size or classes[classes != IGNORED].max(initial=0) >= len(self.class_names):
            raise DataError(
                f"{self.masks[index]} is {mask.size} with classes {classes.tolist()}; its image is {image.size}, the "
                f"classes are 0 to {len(self.class_names) - 1} and {IGNORED} for pixels that do not count"
            )
        return image, mask


def read_mask(file: Path) -> NDArray[np.uint8]:
    """The class of every pixel, [H, W]. Palette masks, as VOC's, hold it in the index and not in the colour.

    Errors: DataError where the file is no image, has colours, or values that are no byte.
    """
    try:
        with Image.open(file) as opened:
            values = np.asarray(opened)
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise DataError(f"{file} is not a readable mask ({error})") from error
    if values.ndim == 3:
        colours = values[..., :3]
        if values.shape[2] == 2 or (colours != colours[..., :1]).any():
            raise DataError(
                f"{file} is a picture in colours; a mask holds the class of a pixel as one number, in grey or a palette"
            )
        values = colours[..., 0]
    if values.min(initial=0) < 0 or values.max(initial=0) > IGNORED:
        raise DataError(f"{file} holds values up to {values.max()}; classes go up to {IGNORED}")
    return values.astype(np.uint8)


class ShapeScenes:
    """Noisy scenes of overlapping shapes whose colour says nothing of their class; a function of seed and index.

    Outlines of one pixel do not count, as the borders of VOC's objects do not. ``odds`` says how often each of the five
    shapes is drawn, against the others; without it, all equally often. Errors: DataError.
    """

    class_names: tuple[str, ...] = SHAPES

    def __init__(self, count: int, size: int, seed: int, odds: Sequence[float] | None = None) -> None:
        if odds is not None and (len(odds) != len(SHAPES) - 1 or min(odds) <= 0):
            raise DataError(
                f"data.shape_odds is {list(odds)}; it must hold a number above 0 for each of {', '.join(SHAPES[1:])}"
            )
        self.count, self.size, self.seed = count, size, seed
        self.shares = None if odds is None else np.array(odds) / sum(odds)

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """One scene of three to six shapes."""
        generator = np.random.default_rng((self.seed, index))
        image = Image.new("RGB", (self.size, self.size), tuple(generator.integers(60, 196, 3).tolist()))
        mask = Image.new("L", (self.size, self.size), 0)
        for _ in range(generator.integers(3, 7)):
            kind = self.draw_kind(generator)
            side = int(generator.integers(self.size // 6, self.size // 2))
            x, y = generator.integers(-side // 4, self.size - side // 2, 2).tolist()
            colour = tuple(generator.integers(0, 256, 3).tolist())
            stamp = draw_shape(SHAPES[kind], side)
            image.paste(colour, (x, y), stamp)
            mask.paste(IGNORED, (x, y), stamp)
            mask.paste(kind, (x + 1, y + 1), draw_shape(SHAPES[kind], side - 2))
        pixels = np.asarray(image) + generator.normal(0, 24, (self.size, self.size, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask

    def draw_kind(self, generator: np.random.Generator) -> int:
        """The class of the next shape."""
        if self.shares is None:
            return int(generator.integers(1, len(SHAPES)))
        return 1 + int(generator.choice(len(self.shares), p=self.shares))


def draw_shape(name: str, side: int) -> Image.Image:
    """A stamp of ``side`` pixels, 255 inside the shape."""
    stamp = Image.new("L", (side, side), 0)
    draw, last, third = ImageDraw.Draw(stamp), side - 1, side // 3
    if name == "square":
        draw.rectangle((0, 0, last, last), fill=255)
    elif name == "triangle":
        draw.polygon([(0, last), (last, last), (last // 2, 0)], fill=255)
    elif name == "cross":
        draw.rectangle((third, 0, last - third, last), fill=255)
        draw.rectangle((0, third, last, last - third), fill=255)
    else:
        draw.ellipse((0, 0, last, last), fill=255)
        if name == "ring":
            draw.ellipse((third, third, last - third, last - third), fill=0)
    return stamp


@dataclass(frozen=True)
class MaskedSample:
    """Bytes [3, H, W] and classes [H, W], uint8."""

    image: Tensor
    mask: Tensor


class SegmentationData(Dataset[MaskedSample]):
    """Scenes scaled to ``size`` pixels square; half of them mirrored while training, by seed, epoch and index."""

    def __init__(self, source: MaskSource, size: int, *, mirrored: bool = False, seed: int = 0) -> None:
        self.source, self.size, self.mirrored, self.seed = source, size, mirrored, seed
        self.epoch = shared_epoch()

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of ``epoch``."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> MaskedSample:
        image, mask = self.source.read(index)
        square = (self.size, self.size)
        pixels: NDArray[np.uint8] = np.array(image.resize(square, Image.Resampling.BILINEAR))
        classes: NDArray[np.uint8] = np.array(mask.resize(square, Image.Resampling.NEAREST))
        if self.mirrored and np.random.default_rng((self.seed, int(self.epoch), index)).random() < 0.5:
            pixels, classes = pixels[:, ::-1].copy(), classes[:, ::-1].copy()
        return MaskedSample(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), torch.from_numpy(classes))


def collate_masks(samples: list[MaskedSample]) -> dict[str, Tensor]:
    """``images`` uint8 [B, 3, H, W], ``masks`` uint8 [B, H, W]."""
    return {
        "images": torch.stack([sample.image for sample in samples]),
        "masks": torch.stack([sample.mask for sample in samples]),
    }
