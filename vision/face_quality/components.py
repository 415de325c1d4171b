"""Measures of single defects of a face, beside its one score: sharpness, light, size and pose. No torch here.

Names, and the scalars from 0 to 100 with 100 the best, are those of OFIQ, the reference implementation of ISO/IEC
29794-5. OFIQ masks the face by 98 landmarks and takes pose and sharpness from networks; here there are five landmarks
and an aligned crop, so raw values are near OFIQ's in meaning, not equal to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vision.face_quality.alignment import TEMPLATE, inter_eye_distance

Floats = NDArray[np.float64]

LUMA = np.array([0.2126, 0.7152, 0.0722])  # ITU-R BT.709
# Histograms of a cheek have few bins here: it has about 120 pixels, where OFIQ's larger crop has 3,000.
BINS, CHEEK = 16, 0.3
# How far the five points stand out towards the camera, in distances between the eyes (ours; about 45 mm of 63 for the
# nose tip before the eyes).
DEPTHS = np.array([0.0, 0.0, 0.7, 0.2, 0.2])
# Portraits of the London set measure 3.1 in the median, the same blurred by 1.5 pixels of the crop 1.4.
SHARP_MIDPOINT, SHARP_WIDTH = 2.2, 0.3
REST_PITCH = 10.4  # of the same portraits, which look straight ahead: the template's nose lies higher than theirs
MAX_COORDINATE_PX = 23_170  # the diagonal of the largest image


@dataclass(frozen=True)
class Component:
    """A measure: the least and the greatest raw value, and how a raw value becomes a scalar from 0 to 100."""

    low: float
    high: float
    scalar: Callable[[float], float]

    def json(self, raw: float) -> dict[str, Any]:
        """One measure of one face."""
        return {
            "scalar": round(min(100.0, max(0.0, self.scalar(raw)))),
            "raw": round(raw, 4),
            "range": [self.low, self.high],
        }


def sigmoid(x: float, midpoint: float, width: float) -> float:
    """OFIQ's, from 0 to 1."""
    return 1 / (1 + math.exp((midpoint - x) / width))


def by_angle(degrees: float) -> float:
    """OFIQ's scalar of an angle."""
    return 100 * max(0.0, math.cos(math.radians(degrees))) ** 2


COMPONENTS = {
    "sharpness": Component(0, 6.1, lambda x: 100 * sigmoid(x, SHARP_MIDPOINT, SHARP_WIDTH)),
    "illumination_uniformity": Component(0, 1, lambda x: 100 * x**0.3),
    "luminance_mean": Component(0, 1, lambda x: 100 * sigmoid(x, 0.2, 0.05) * (1 - sigmoid(x, 0.8, 0.05))),
    "inter_eye_distance": Component(0, MAX_COORDINATE_PX, lambda x: 100 * sigmoid(x, 70, 20)),
    "head_pose_yaw": Component(-90, 90, by_angle),
    "head_pose_pitch": Component(-180, 180, by_angle),
    "head_pose_roll": Component(-180, 180, by_angle),
}


def measure_face(crop: NDArray[np.uint8], landmarks: ArrayLike | None) -> dict[str, dict[str, Any]]:
    """Every measure of an aligned ``crop`` uint8 [3, 112, 112]; size and pose only with ``landmarks`` [5, 2] in pixels.

    ``scalar``: 0 to 100; ``raw`` within ``range``: the logarithm of 1 + the Laplacian's variance, the shares of both
    cheeks' histograms that agree, luma from 0 to 1, pixels, degrees (positive to the right
    of the image, down, and clockwise).
    """
    light = np.einsum("chw,c->hw", crop.astype(np.float64), LUMA)
    raw = {
        "sharpness": math.log10(1 + laplacian_variance(light)),
        "illumination_uniformity": cheeks_agree(light),
        "luminance_mean": float(light.mean()) / 255,
    }
    if landmarks is not None:
        yaw, pitch, roll = head_pose(landmarks)
        raw["inter_eye_distance"] = inter_eye_distance(landmarks)
        raw |= {"head_pose_yaw": yaw, "head_pose_pitch": pitch, "head_pose_roll": roll}
    return {name: COMPONENTS[name].json(value) for name, value in raw.items()}


def laplacian_variance(light: Floats) -> float:
    """The usual measure of focus, of luma [H, W]."""
    centre = light[1:-1, 1:-1]
    return float((light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:] - 4 * centre).var())


def cheeks_agree(light: Floats) -> float:
    """Share of the luma histograms of both cheeks that they have in common, of an aligned crop [112, 112].

    A cheek is a square half way from an eye to the mouth, its side ``CHEEK`` of the distance between the eyes.
    """
    left, right = TEMPLATE[:2]
    half = CHEEK * (right[0] - left[0]) / 2
    y = (left[1] + right[1] + TEMPLATE[3, 1] + TEMPLATE[4, 1]) / 4
    rows = slice(round(y - half), round(y + half) + 1)
    found = []
    for x in (left[0], right[0]):
        cheek = light[rows, round(x - half) : round(x + half) + 1]
        counts = np.histogram(cheek, bins=BINS, range=(0, 256))[0]
        found.append(counts / counts.sum())
    return float(np.minimum(*found).sum())


def head_pose(landmarks: ArrayLike) -> tuple[float, float, float]:
    """Yaw, pitch and roll in degrees of five landmarks, the head as one rigid set of points far from the camera.

    The affine map from the template with depths to the landmarks, brought to the nearest scaled rotation (scaled
    orthography, DeMenthon and Davis, IJCV 15, 1995). Noses differ in length, so yaw and pitch are estimates.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    flat = (TEMPLATE - TEMPLATE.mean(axis=0)) / inter_eye_distance(TEMPLATE)
    depths = DEPTHS - DEPTHS.mean()
    model = np.column_stack([flat, depths])  # x to the right, y down, z towards the camera
    affine = np.linalg.lstsq(model, points - points.mean(axis=0), rcond=None)[0].T  # [2, 3]
    u, _, vt = np.linalg.svd(affine, full_matrices=False)
    right, down = u @ vt
    away = np.cross(right, down)
    yaw, pitch = math.asin(np.clip(-away[0], -1, 1)), math.atan2(-away[1], away[2])
    roll = math.atan2(down[0], right[0])
    return math.degrees(yaw), math.degrees(pitch) - REST_PITCH, math.degrees(roll)
