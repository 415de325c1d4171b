"""Defects of a photograph, each of a severity from 0 (none) to 1: for training, and for measuring what a score notices.

The strengths are ours. At severity 1 a face is past recognising for most systems, at 0.5 it is plainly worse.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

MAX_BLUR = 0.055  # standard deviation, as a share of the side: 6 pixels of 112
MAX_REDUCTION = 0.92
MAX_NOISE = 90.0
MAX_OCCLUSION = 0.85
MAX_YAW_DEGREES = 60.0
CAMERA_DISTANCE = 2.5  # from the face, in half widths of it
BEST_JPEG, WORST_JPEG = 60, 2
DARKEST_EXPOSURE = 0.04
# The noise of the sensor stays where light goes, which is what makes a dark photograph bad: a gain alone would not.
READ_NOISE = 3.0


def blur(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:  # noqa: ARG001
    """Gaussian blur."""
    return image.filter(ImageFilter.GaussianBlur(MAX_BLUR * severity * max(image.size)))


def downsample(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:  # noqa: ARG001
    """Fewer pixels, enlarged again."""
    share = 1 - MAX_REDUCTION * severity
    small = max(2, round(share * image.width)), max(2, round(share * image.height))
    return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BILINEAR)


def jpeg(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:  # noqa: ARG001
    """JPEG at falling quality; severity 0 leaves the image as it is."""
    if severity == 0:
        return image.copy()
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=round(BEST_JPEG + (WORST_JPEG - BEST_JPEG) * severity))
    with Image.open(buffer) as opened:
        return opened.convert("RGB")


def occlude(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """A grey rectangle over a share of the area, anywhere."""
    share = math.sqrt(MAX_OCCLUSION * severity)
    width, height = round(share * image.width), round(share * image.height)
    left, top = (int(generator.integers(room + 1)) for room in (image.width - width, image.height - height))
    covered = image.copy()
    covered.paste((int(generator.integers(256)),) * 3, (left, top, left + width, top + height))
    return covered


def darken(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Less light: a lower exposure with the sensor's noise as strong as ever."""
    if severity == 0:
        return image.copy()
    exposure = DARKEST_EXPOSURE**severity
    pixels = np.asarray(image, dtype=np.float32) * exposure
    return _image(pixels + generator.normal(0, READ_NOISE * severity, pixels.shape))


def add_noise(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Gaussian noise in every channel."""
    pixels = np.asarray(image, dtype=np.float32)
    return _image(pixels + generator.normal(0, MAX_NOISE * severity, pixels.shape))


def turn(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """A head turned aside, as far as a flat picture allows: seen under perspective from the left or the right.

    A real profile hides one half of the face; this only foreshortens it.
    """
    angle = math.radians(MAX_YAW_DEGREES * severity) * (1 if generator.random() < 0.5 else -1)
    half_x, half_y = image.width / 2, image.height / 2
    # X = x cos / (1 + x sin / d), Y = y / (1 + x sin / d), from the middle in half sides; Pillow wants the way back:
    # x = (X / cos) / (1 - X tilt), y = Y / (1 - X tilt).
    tilt = math.tan(angle) / CAMERA_DISTANCE
    stretch, scale = 1 / math.cos(angle), 1 + tilt
    coefficients = (
        *((stretch - tilt) / scale, 0.0, half_x * (1 + tilt - stretch) / scale),
        *(-tilt * half_y / half_x / scale, 1 / scale, half_y * tilt / scale),
        *(-tilt / half_x / scale, 0.0),
    )
    return image.transform(image.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)


Degradation = Callable[[Image.Image, float, np.random.Generator], Image.Image]

DEGRADATIONS: dict[str, Degradation] = {
    "blur": blur,
    "downsampling": downsample,
    "jpeg": jpeg,
    "occlusion": occlude,
    "darkness": darken,
    "noise": add_noise,
    "yaw": turn,
}


def degrade(image: Image.Image, kind: str, severity: float, generator: np.random.Generator) -> Image.Image:
    """One defect of an RGB image; size and mode stay. Errors: ValueError for an unknown kind or severity."""
    if kind not in DEGRADATIONS:
        raise ValueError(f"degradation {kind!r} is not known; allowed are {', '.join(DEGRADATIONS)}")
    if not 0 <= severity <= 1:
        raise ValueError(f"severity is {severity}; it must be from 0 to 1")
    return DEGRADATIONS[kind](image, severity, generator)


def degrade_at_random(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """One defect of any kind and severity."""
    kind = list(DEGRADATIONS)[int(generator.integers(len(DEGRADATIONS)))]
    return degrade(image, kind, float(generator.random()), generator)


def _image(pixels: np.ndarray[tuple[int, ...], np.dtype[np.floating]]) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
