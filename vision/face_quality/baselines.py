"""Scores that need no training on labels, to measure a trained scorer against; all higher for better images.

Faces are uint8 [N, 3, H, W].
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

LUMA = np.array([0.299, 0.587, 0.114])
WINDOW_STD, WINDOW_RADIUS = 7 / 6, 3
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
# Ratios E[|x|]^2 / E[x^2] of generalised Gaussians by shape; see ``generalized_gaussian``.
SHAPES = np.arange(0.2, 10.0, 0.001)
RATIOS = np.array([math.gamma(2 / s) ** 2 / (math.gamma(1 / s) * math.gamma(3 / s)) for s in SHAPES])
RIDGE = 1e-3  # of the mean variance: fewer pristine faces than features must not make the covariance singular


def grey(faces: Tensor) -> Floats:
    """Luma float64 [N, H, W]."""
    luma: Floats = np.einsum("nchw,c->nhw", faces.numpy().astype(np.float64), LUMA)
    return luma


def laplacian_sharpness(faces: Tensor) -> Floats:
    """Variance of the Laplacian of the luma, the usual measure of focus."""
    x = grey(faces)
    centre = x[:, 1:-1, 1:-1]
    laplacian = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:] - 4 * centre
    return np.asarray(laplacian.var(axis=(1, 2)), dtype=np.float64)


def brightness(faces: Tensor) -> Floats:
    """Mean luma."""
    return np.asarray(grey(faces).mean(axis=(1, 2)), dtype=np.float64)


def contrast_normalized(luma: Floats) -> Floats:
    """MSCN coefficients [N, H, W] of luma: (x - local mean) / (local deviation + 1), BRISQUE's normalisation."""
    mean = smooth(luma)
    deviation = np.sqrt(np.maximum(smooth(luma**2) - mean**2, 0))
    return np.asarray((luma - mean) / (deviation + 1), dtype=np.float64)


def smooth(images: Floats) -> Floats:
    """Gaussian window of 7 x 7 with the borders repeated."""
    offsets = np.arange(-WINDOW_RADIUS, WINDOW_RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * WINDOW_STD**2))
    weights /= weights.sum()
    padded = np.pad(images, ((0, 0), (WINDOW_RADIUS,) * 2, (WINDOW_RADIUS,) * 2), mode="edge")
    rows = sum(w * padded[:, k : k + images.shape[1]] for k, w in enumerate(weights))
    return np.asarray(sum(w * rows[:, :, k : k + images.shape[2]] for k, w in enumerate(weights)))  # type: ignore[index]


def generalized_gaussian(values: Floats) -> tuple[float, float, float, float]:
    """Shape, mean, left and right variance of an asymmetric generalised Gaussian, by matching moments.

    Lasmar et al. 2009, as BRISQUE uses it (Mittal et al., IEEE TIP 21(12), 2012, section III-A).
    """
    left, right = values[values < 0], values[values > 0]
    left_std = math.sqrt((left**2).mean()) if len(left) else 1e-6
    right_std = math.sqrt((right**2).mean()) if len(right) else 1e-6
    skew = left_std / right_std
    power = float((values**2).mean()) or 1e-12
    ratio = float(np.abs(values).mean()) ** 2 / power
    ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shape = float(SHAPES[np.abs(RATIOS - ratio).argmin()])
    spread = math.sqrt(math.gamma(1 / shape) / math.gamma(3 / shape))
    mean = (right_std - left_std) * spread * math.gamma(2 / shape) / math.gamma(1 / shape)
    return shape, mean, left_std**2, right_std**2


def natural_scene_features(faces: Tensor) -> Floats:
    """BRISQUE's 36 features [N, 36]: MSCN coefficients and products of neighbours, at full and half size."""
    scales = [grey(faces)]
    even = scales[0][:, : scales[0].shape[1] // 2 * 2, : scales[0].shape[2] // 2 * 2]
    scales.append((even[:, ::2, ::2] + even[:, 1::2, ::2] + even[:, ::2, 1::2] + even[:, 1::2, 1::2]) / 4)
    coefficients = [contrast_normalized(luma) for luma in scales]
    rows = []
    for place in range(len(faces)):
        row: list[float] = []
        for scale in coefficients:
            x = scale[place]
            shape, _, left, right = generalized_gaussian(x.ravel())
            row += [shape, (left + right) / 2]
            for down, across in SHIFTS:
                row += generalized_gaussian((x * np.roll(x, (down, across), axis=(0, 1))).ravel())
        rows.append(row)
    return np.array(rows)


class Naturalness:
    """BRISQUE's features scored without human ratings: how far from those of ``pristine`` faces, as NIQE does.

    A Gaussian is fitted to the pristine faces (Mittal et al., IEEE SPL 20(3), 2013); the score is minus the Mahalanobis
    distance to it. BRISQUE's own regressor is trained on rated photographs, which are not at hand.
    """

    def __init__(self, pristine: Tensor) -> None:
        features = natural_scene_features(pristine)
        self.mean, self.std = features.mean(axis=0), features.std(axis=0) + 1e-9
        standard = (features - self.mean) / self.std
        covariance = standard.T @ standard / len(standard) + RIDGE * np.eye(features.shape[1])
        self.precision = np.linalg.inv(covariance)

    def __call__(self, faces: Tensor) -> Floats:
        """Scores [N]."""
        standard = (natural_scene_features(faces) - self.mean) / self.std
        distance: Floats = np.sqrt(np.einsum("ni,ij,nj->n", standard, self.precision, standard))
        return -distance
