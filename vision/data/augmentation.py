"""Images to the size a network takes: at test time by rule, in training at random."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from vision.backbones.preprocessing import Preprocessing
from vision.data.degradations import degrade_at_random
from vision.data.view import centre_crop, resize_short_side

CROPS = ("resized", "padded", "centre")
CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class AugmentationOptions:
    """Random changes of a training image.

    ``crop`` "resized" cuts a random rectangle of a ``scale`` share of the area and a ``ratio`` of sides, and scales it
    to the network's size; "padded" scales the short side, pads by ``padding`` pixels and cuts at random; "centre" cuts
    as at test time. ``flip`` mirrors half of the images. ``color_jitter`` j draws factors of brightness, contrast and
    saturation from 1 - j to 1 + j, in random order. ``uneven_light`` u multiplies every channel by a smooth random
    field between ``light_cells`` x ``light_cells`` gains, whose logarithms have the deviation u (ours): light and
    colour coarser than a cell then say little, and details must be looked at. ``degrade`` is the share of images that
    get one random defect of ``vision.data.degradations``.
    """

    crop: str = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 8
    flip: bool = True
    color_jitter: float = 0.0
    uneven_light: float = 0.0
    light_cells: int = 8
    degrade: float = 0.0

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"crop is {self.crop!r}; allowed are {', '.join(CROPS)}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {self.scale}; expected two shares of the area, the smaller first")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is {self.ratio}; expected two ratios above 0, the smaller first")
        if not 0 <= self.color_jitter < 1 or self.padding < 0:
            raise ValueError(
                f"color_jitter {self.color_jitter} must be in [0, 1) and padding {self.padding} at least 0"
            )
        if not 0 <= self.uneven_light <= 2 or self.light_cells < 1:
            raise ValueError(
                f"uneven_light {self.uneven_light} must be in [0, 2] and light_cells {self.light_cells} at least 1"
            )
        if not 0 <= self.degrade <= 1:
            raise ValueError(f"degrade is {self.degrade}; it is a share of the images, from 0 to 1")

    @property
    def is_deterministic(self) -> bool:
        """Whether every epoch shows the same images."""
        chances = (self.flip, self.color_jitter, self.uneven_light, self.degrade)
        return self.crop == "centre" and not any(chances)


def augment(
    image: Image.Image, preprocessing: Preprocessing, options: AugmentationOptions, generator: np.random.Generator
) -> Image.Image:
    """A random training view of ``image``, ``image_size`` pixels square; ``generator`` is the only source of chance."""
    if options.crop == "resized":
        image = resized_crop(image, preprocessing.image_size, options, generator)
    elif options.crop == "padded":
        image = padded_crop(image, preprocessing.image_size, options.padding, generator)
    else:
        image = centre_crop(image, preprocessing.resize, preprocessing.image_size)
    if options.flip and generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = jitter_colors(image, options.color_jitter, generator)
    image = light_unevenly(image, options.uneven_light, options.light_cells, generator)
    if options.degrade > 0 and generator.random() < options.degrade:
        image = degrade_at_random(image, generator)
    return image


def resized_crop(
    image: Image.Image, size: int, options: AugmentationOptions, generator: np.random.Generator
) -> Image.Image:
    """A random rectangle, scaled (Szegedy et al., arXiv 1409.4842, section 6); the whole image where none fits."""
    width, height = image.size
    for _ in range(CROP_ATTEMPTS):
        area = width * height * generator.uniform(*options.scale)
        ratio = math.exp(generator.uniform(math.log(options.ratio[0]), math.log(options.ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    return image.resize((size, size), Image.Resampling.BILINEAR)


def padded_crop(image: Image.Image, size: int, padding: int, generator: np.random.Generator) -> Image.Image:
    """Short side to ``size``, black borders of ``padding``, a random square of ``size``."""
    image = resize_short_side(image, size)
    left = int(generator.integers(image.width + 2 * padding - size + 1)) - padding
    top = int(generator.integers(image.height + 2 * padding - size + 1)) - padding
    return image.crop((left, top, left + size, top + size))  # outside of the image Pillow fills with black


def jitter_colors(image: Image.Image, strength: float, generator: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation by random factors, in random order."""
    if strength == 0:
        return image
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for place in generator.permutation(len(enhancers)):
        image = enhancers[place](image).enhance(float(generator.uniform(1 - strength, 1 + strength)))
    return image


def light_unevenly(image: Image.Image, strength: float, cells: int, generator: np.random.Generator) -> Image.Image:
    """Every channel times a field, smooth between gains whose logarithms have the deviation ``strength``."""
    if strength == 0:
        return image
    pixels = np.asarray(image, dtype=np.float32)
    fields = []
    for _ in range(pixels.shape[2]):
        logs = generator.normal(0, strength, (cells, cells)).astype(np.float32)
        fields.append(np.asarray(Image.fromarray(logs).resize(image.size, Image.Resampling.BICUBIC)))
    lit = pixels * np.exp(np.stack(fields, axis=2))
    return Image.fromarray(lit.round().clip(0, 255).astype(np.uint8))
