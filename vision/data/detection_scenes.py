"""Scenes with boxes made from a seed, for studies that need many trainings or a property no small data set has.

Ours. A scene is a function of its kind, split and index; colour says nothing of a class, only outlines do. Splits are
``train``, ``val`` and ``kept``, the latter for what is trained on top of a detector that has seen ``train``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vision.data.labelled_boxes import DetectionSource, LabelledImage
from vision.data.segmentation import draw_shape
from vision.data.sources import DataError

SPLITS = {"train": 480, "val": 160, "kept": 240}

NEEDLES, LOOK_ALIKES = ("cross", "ring"), ("square", "circle", "triangle")
NEEDLE_SIDE, NEEDLE_SCENE, NEEDLE_COUNT, LOOK_ALIKE_COUNT = (12, 21), 256, (1, 4), (12, 21)
SHAPES = ("circle", "cross", "ring", "square", "triangle")
SHAPE_SIDE, SHAPE_SCENE, SHAPE_COUNT = (20, 57), 128, (2, 6)
# Grey levels between a shape and the ground under it at least, and the noise over both.
CONTRAST, NOISE = 60, 16
TRIES = 50
# Boxes of one scene overlap by at most this share of the smaller one.
MOST_HIDDEN = 0.25

Box = tuple[int, int, int, int]
Drawn = tuple[Image.Image, list[tuple[str, Box]]]
Draw = Callable[[np.random.Generator], Drawn]


def needles(root: Path, split: str, class_names: tuple[str, ...] | None) -> DetectionSource:
    """Scenes of 256 pixels with one to three objects of 12 to 20 pixels among 12 to 20 look-alikes, which count not.

    YOLOv2's head has 320 predictions on them, under 1 % with a true box. ``root`` is not read. Errors: DataError.
    """
    del root  # nothing lies on a disk
    return source("needles", split, class_names or NEEDLES, NEEDLES)


def shapes(root: Path, split: str, class_names: tuple[str, ...] | None) -> DetectionSource:
    """Scenes of 128 pixels with two to five shapes of 20 to 56 pixels, of five classes; ``root`` is not read.

    Errors: DataError.
    """
    del root  # nothing lies on a disk
    return source("shapes", split, class_names or SHAPES, SHAPES)


def source(kind: str, split: str, class_names: tuple[str, ...], known: tuple[str, ...]) -> DetectionSource:
    """The scenes of one split. Errors: DataError for an unknown split, or class names that lack one of ``known``."""
    if split not in SPLITS:
        raise DataError(f"{kind} have no split {split!r}; they have {', '.join(SPLITS)}")
    if missing := sorted(set(known) - set(class_names)):
        raise DataError(f"{kind} show the class {', '.join(missing)}; known are {', '.join(class_names)}")
    return DetectionSource(class_names, scenes(kind, split, class_names), degenerate=0)


@lru_cache(maxsize=4)
def scenes(kind: str, split: str, class_names: tuple[str, ...]) -> tuple[LabelledImage, ...]:
    """All scenes of a split, drawn once."""
    draw: Draw = {"needles": draw_needles, "shapes": draw_shapes}[kind]
    place = list(SPLITS).index(split)
    made = []
    for index in range(SPLITS[split]):
        image, objects = draw(np.random.default_rng((place, index)))
        boxes = np.array([box for _, box in objects], dtype=np.float32).reshape(-1, 4)
        labels = np.array([class_names.index(name) for name, _ in objects], dtype=np.int64)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        name = Path(f"{kind}_{split}_{index:04}.png")
        made.append(LabelledImage(name, boxes, labels, np.zeros(len(boxes), np.bool_), areas, image.size, image))
    return tuple(made)


def draw_needles(generator: np.random.Generator) -> Drawn:
    """One scene and the classes and boxes of what is to be found on it."""
    wanted = generator.choice(NEEDLES, generator.integers(*NEEDLE_COUNT)).tolist()
    others = generator.choice(LOOK_ALIKES, generator.integers(*LOOK_ALIKE_COUNT)).tolist()
    image, drawn = draw_all(generator, NEEDLE_SCENE, [*wanted, *others], NEEDLE_SIDE)
    return image, [(name, box) for name, box in drawn if name in NEEDLES]


def draw_shapes(generator: np.random.Generator) -> Drawn:
    """One scene and the classes and boxes of all that is on it."""
    names = generator.choice(SHAPES, generator.integers(*SHAPE_COUNT)).tolist()
    return draw_all(generator, SHAPE_SCENE, names, SHAPE_SIDE)


def draw_all(generator: np.random.Generator, scene: int, names: list[str], sides: tuple[int, int]) -> Drawn:
    """A noisy picture of ``scene`` pixels with the named shapes; one that finds no place is left out, the first never.

    ``sides`` are the least size in pixels and one more than the largest.
    """
    ground = generator.integers(60, 196, 3)
    image = Image.new("RGB", (scene, scene), tuple(ground.tolist()))
    drawn: list[tuple[str, Box]] = []
    for name in names:
        for _ in range(TRIES):
            side = int(generator.integers(*sides))
            x, y = generator.integers(0, scene - side + 1, 2).tolist()
            box = (x, y, x + side, y + side)
            if all(hidden(box, other) <= MOST_HIDDEN for _, other in drawn):
                image.paste(contrasting(generator, ground), (x, y), draw_shape(name, side))
                drawn.append((name, box))
                break
    pixels = np.asarray(image) + generator.normal(0, NOISE, (scene, scene, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), drawn


def hidden(box: Box, other: Box) -> float:
    """The share of the smaller box that lies in the other."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    smaller = min((each[2] - each[0]) * (each[3] - each[1]) for each in (box, other))
    return max(0, width) * max(0, height) / smaller


def contrasting(generator: np.random.Generator, ground: NDArray[np.int64]) -> tuple[int, int, int]:
    """A colour at least ``CONTRAST`` away from the ground in its mean."""
    while True:
        colour = generator.integers(0, 256, 3)
        if abs(float(colour.mean() - ground.mean())) >= CONTRAST:
            red, green, blue = colour.tolist()
            return red, green, blue
