"""Random changes of a training image and its boxes, after SSD (Liu et al., arXiv 1512.02325, section 2.2).

The numbers are those of ThunderNet's authors' configuration. Two choices are ours and cost nothing in kind: colours are
changed after resizing, on fewer pixels, and the canvas of a zoomed-out image with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vision.data.view import Boxes, Colour, View

BRIGHTNESS = 32.0
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
# 18 degrees of Pillow's hue circle of 256 steps.
HUE = round(18 / 360 * 256)
CROP_TRIES = 50
CROP_ASPECT = (0.5, 2.0)
# ImageNet's mean, the canvas of a zoomed-out image.
MEAN_COLOUR: Colour = (124, 116, 104)


@dataclass(frozen=True)
class DetectionAugmentation:
    """Which changes are drawn.

    ``photometric``: brightness, contrast, saturation, hue and, with ``channel_swap``, the order of channels, each on
    half of the images. ``expand`` is the largest ratio by which half of the images are zoomed out, 1 for none.
    ``crop_overlaps`` are the least overlaps with the boxes that a crop may have; one of them, any crop or no crop is
    drawn with equal chance, and sides are at least ``min_crop`` of the whole; none leaves crops out. ``flip`` mirrors
    half of the images. ``vertical_flip`` and ``transpose`` (ours) are for pictures without an upright, such as those of
    a microscope.
    """

    photometric: bool = True
    channel_swap: bool = True
    expand: float = 4.0
    crop_overlaps: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    min_crop: float = 0.3
    flip: bool = True
    vertical_flip: bool = False
    transpose: bool = False

    def __post_init__(self) -> None:
        if self.expand < 1:
            raise ValueError(f"expand is {self.expand}; it must be at least 1, which leaves it out")
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"min_crop is {self.min_crop}; it must be above 0 and at most 1")
        if any(not 0 <= overlap < 1 for overlap in self.crop_overlaps):
            raise ValueError(f"crop_overlaps are {self.crop_overlaps}; each must be at least 0 and under 1")


def draw_view(
    width: int, height: int, boxes: Boxes, options: DetectionAugmentation, generator: np.random.Generator
) -> View:
    """A random view of an image of ``width`` by ``height`` with ``boxes`` [G, 4]: zoomed out, cropped, or whole."""
    view = View(0, 0, width, height)
    if options.expand > 1 and generator.random() < 0.5:
        ratio = generator.uniform(1, options.expand)
        left, top = generator.uniform(0, (ratio - 1) * width), generator.uniform(0, (ratio - 1) * height)
        view = View(-left, -top, ratio * width - left, ratio * height - top)
    if not options.crop_overlaps:
        return view
    choices = (None, *options.crop_overlaps, 0.0)
    while True:
        overlap = choices[generator.integers(len(choices))]
        if overlap is None:
            return view
        for _ in range(CROP_TRIES):
            crop = _draw_crop(view, options.min_crop, generator)
            if crop is not None and _fits(crop, boxes, overlap):
                return crop


def squared(view: View) -> View:
    """The square around ``view``, which a letterbox shows in training as at test time: no side is stretched."""
    width, height = view.right - view.left, view.bottom - view.top
    x, y = (max(width, height) - width) / 2, (max(width, height) - height) / 2
    return View(view.left - x, view.top - y, view.right + x, view.bottom + y)


def _draw_crop(view: View, min_crop: float, generator: np.random.Generator) -> View | None:
    """A part of ``view``; None where its aspect is out of bounds."""
    whole_width, whole_height = view.right - view.left, view.bottom - view.top
    width, height = (side * generator.uniform(min_crop, 1) for side in (whole_width, whole_height))
    if not CROP_ASPECT[0] <= height / width <= CROP_ASPECT[1]:
        return None
    left = view.left + generator.uniform(0, whole_width - width)
    top = view.top + generator.uniform(0, whole_height - height)
    return View(left, top, left + width, top + height)


def _fits(crop: View, boxes: Boxes, overlap: float) -> bool:
    """Whether every box has an IoU of at least ``overlap`` with the crop and some box's centre lies in it."""
    if len(boxes) == 0:
        return True
    width = np.minimum(boxes[:, 2], crop.right) - np.maximum(boxes[:, 0], crop.left)
    height = np.minimum(boxes[:, 3], crop.bottom) - np.maximum(boxes[:, 1], crop.top)
    intersection = width.clip(0) * height.clip(0)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    union = areas + (crop.right - crop.left) * (crop.bottom - crop.top) - intersection
    return bool((intersection / union).min() >= overlap and centres_inside(crop, boxes).any())


def centres_inside(view: View, boxes: Boxes) -> NDArray[np.bool_]:
    """Which of ``boxes`` [G, 4] have their centre in ``view``."""
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    inside: NDArray[np.bool_] = (x > view.left) & (x < view.right) & (y > view.top) & (y < view.bottom)
    return inside


def distort_colours(image: Image.Image, options: DetectionAugmentation, generator: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation, hue and channel order of an RGB image, each with one chance in two."""
    brightness, contrast, saturation, hue, swap = generator.random(5) < 0.5
    shift = generator.uniform(-BRIGHTNESS, BRIGHTNESS) if brightness else 0.0
    factor = generator.uniform(*CONTRAST) if contrast else 1.0
    levels = np.arange(256, dtype=np.float32)
    if brightness or contrast:
        image = image.point(_table((levels + shift).clip(0, 255) * factor) * 3)
    if saturation or hue:
        turn = int(generator.integers(-HUE, HUE + 1)) if hue else 0
        strength = generator.uniform(*SATURATION) if saturation else 1.0
        tables = _table((levels + turn) % 256) + _table(levels * strength) + _table(levels)
        image = image.convert("HSV").point(tables).convert("RGB")
    if swap and options.channel_swap:
        channels = image.split()
        image = Image.merge("RGB", [channels[place] for place in generator.permutation(3)])
    return image


def _table(values: NDArray[np.floating[Any]]) -> list[int]:
    """A Pillow lookup table."""
    return [int(value) for value in values.round().clip(0, 255)]


def reflect(
    image: Image.Image, boxes: Boxes, options: DetectionAugmentation, generator: np.random.Generator
) -> tuple[Image.Image, Boxes]:
    """A square image and its ``boxes``, mirrored left to right, top to bottom and along the diagonal.

    Each that ``options`` allow has one chance in two.
    """
    size = image.width
    across, down, diagonal = generator.random(3) < 0.5
    if across and options.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = np.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], axis=1)
    if down and options.vertical_flip:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        boxes = np.stack([boxes[:, 0], size - boxes[:, 3], boxes[:, 2], size - boxes[:, 1]], axis=1)
    if diagonal and options.transpose:
        image = image.transpose(Image.Transpose.TRANSPOSE)
        boxes = boxes[:, [1, 0, 3, 2]]
    return image, boxes
