"""Five landmarks to the 112 x 112 face template of ArcFace, by a similarity transform.

Landmarks are [5, 2], x and y in pixels with the first pixel's centre at (0, 0): left eye, right eye, nose tip, left and
right corner of the mouth, left and right as seen in the image.
"""

from __future__ import annotations

import cmath
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

FACE_SIZE = 112

# The template of ArcFace (arXiv 1801.07698). The list of the 96-wide crop has 8 less in x and does not fit here.
TEMPLATE: NDArray[np.float64] = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


class LandmarkError(ValueError):
    """Landmarks that do not describe a face."""


@dataclass(frozen=True)
class Similarity:
    """z -> factor z + shift, points as complex numbers x + iy: rotation and scale in ``factor``, no reflection."""

    factor: complex
    shift: complex

    @property
    def scale(self) -> float:
        """Target pixels for each source pixel."""
        return abs(self.factor)

    @property
    def angle(self) -> float:
        """Rotation in degrees, from x towards y (clockwise on the screen)."""
        return float(np.degrees(cmath.phase(self.factor)))

    def apply(self, points: ArrayLike) -> NDArray[np.float64]:
        """Transform points [N, 2]."""
        moved = self.factor * _as_complex(np.asarray(points, dtype=np.float64)) + self.shift
        return np.stack([moved.real, moved.imag], axis=1)


def fit_similarity(source: ArrayLike, target: ArrayLike = TEMPLATE) -> Similarity:
    """The similarity that moves ``source`` [N, 2] closest to ``target`` [N, 2], least squares of the distances.

    Raises ``LandmarkError`` for points that are not finite, that coincide, or that fit better as a mirror image.
    """
    z, w = (_as_complex(np.asarray(points, dtype=np.float64)) for points in (source, target))
    if z.shape != w.shape or not np.isfinite([z.real, z.imag]).all():
        raise LandmarkError(f"landmarks have shape {np.shape(source)}; give {len(w)} finite points x, y")
    centred, target_centred = z - z.mean(), w - w.mean()
    spread = float((np.abs(centred) ** 2).sum())
    if spread < 1e-6 * len(z):
        raise LandmarkError("the landmarks coincide; a face needs five different points")
    # For complex numbers the least-squares similarity is one division; its residual falls with the size of the factor.
    factor = complex((np.conj(centred) * target_centred).sum() / spread)
    mirrored = complex((centred * target_centred).sum() / spread)
    if abs(mirrored) > abs(factor):
        raise LandmarkError("the landmarks fit the mirrored face better; left and right are as seen in the image")
    return Similarity(factor, complex(w.mean() - factor * z.mean()))


def align_face(image: Image.Image, landmarks: ArrayLike) -> Image.Image:
    """The face at the template's place: RGB, 112 x 112, bilinear, black where the image ends.

    Raises ``LandmarkError``, also for landmarks outside the image.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    similarity = fit_similarity(points)
    if (points < -0.5).any() or (points > np.array(image.size) - 0.5).any():
        raise LandmarkError(f"landmarks lie outside the image of {image.width}x{image.height} pixels")
    # Pillow wants the way back, from the template to the image, and counts from the corner of the first pixel.
    factor = 1 / similarity.factor
    half = complex(0.5, 0.5)
    shift = half - factor * (half + similarity.shift)
    coefficients = (factor.real, -factor.imag, shift.real, factor.imag, factor.real, shift.imag)
    # ``convert`` copies an RGB image as well: 75 MB for each face of a large photograph.
    source = image if image.mode == "RGB" else image.convert("RGB")
    return source.transform((FACE_SIZE, FACE_SIZE), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


def inter_eye_distance(landmarks: ArrayLike) -> float:
    """Pixels between the eyes; the template has 35.2, so much smaller faces are enlarged by alignment."""
    points = np.asarray(landmarks, dtype=np.float64)
    return float(np.linalg.norm(points[1] - points[0]))


def _as_complex(points: NDArray[np.float64]) -> NDArray[np.complex128]:
    if points.ndim != 2 or points.shape[1] != 2:
        raise LandmarkError(f"landmarks have shape {points.shape}; give [N, 2]")
    return points[:, 0] + 1j * points[:, 1]
