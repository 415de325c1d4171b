"""Textures made from a seed: many classes that share their parts, so that a teacher's answers have a tail.

Ours, for studies of distillation. Every class is a mixture of four of twenty smooth patterns; two classes with patterns
in common look alike, and a teacher says so in probabilities far below its first. An image is its class's pattern,
shifted around its borders, under noise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vision.data.sources import ArraySource, DataError

NUM_CLASSES, NUM_PARTS, PARTS_OF_A_CLASS = 60, 20, 4
SIDE, COARSE_SIDE = 32, 6
LARGEST_SHIFT = 5
# In units of a pattern's own deviation, which is drawn as so many grey levels.
NOISE, GREY_LEVELS = 1.1, 36
IMAGES_OF_A_CLASS = {"train": 80, "test": 50}
PATTERN_SEED = 1


def textures(root: Path, split: str) -> ArraySource:
    """The grey images [N, 32, 32] of a split, 80 of a class to train on and 50 to measure; ``root`` is not read.

    Classes are the same whatever the split. Errors: DataError for an unknown split.
    """
    del root  # nothing lies on a disk
    if split not in IMAGES_OF_A_CLASS:
        raise DataError(f"textures have no split {split!r}; they have {', '.join(IMAGES_OF_A_CLASS)}")
    generator = np.random.default_rng((PATTERN_SEED, list(IMAGES_OF_A_CLASS).index(split)))
    labels = np.repeat(np.arange(NUM_CLASSES), IMAGES_OF_A_CLASS[split])
    shifts = generator.integers(-LARGEST_SHIFT, LARGEST_SHIFT + 1, (len(labels), 2))
    patterns = class_patterns()
    shifted = np.stack(
        [np.roll(patterns[label], shift, (0, 1)) for label, shift in zip(labels, shifts.tolist(), strict=True)]
    )
    noise = NOISE * generator.standard_normal(shifted.shape, dtype=np.float32)
    values = 128 + GREY_LEVELS * (shifted + noise)
    names = tuple(f"texture_{number:02}" for number in range(NUM_CLASSES))
    return ArraySource(values.clip(0, 255).astype(np.uint8), labels.astype(np.int64), names)


def class_patterns() -> NDArray[np.float32]:
    """One pattern for each class, [60, 32, 32], of mean 0 and deviation 1."""
    generator = np.random.default_rng(PATTERN_SEED)
    coarse = generator.normal(size=(NUM_PARTS, COARSE_SIDE, COARSE_SIDE)).astype(np.float32)
    parts = np.stack(
        [np.asarray(Image.fromarray(part).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for part in coarse]
    )
    patterns = []
    for _ in range(NUM_CLASSES):
        chosen = generator.choice(NUM_PARTS, PARTS_OF_A_CLASS, replace=False)
        mixed = np.tensordot(generator.uniform(0.5, 1.5, PARTS_OF_A_CLASS).astype(np.float32), parts[chosen], axes=1)
        patterns.append((mixed - mixed.mean()) / mixed.std())
    return np.stack(patterns)
