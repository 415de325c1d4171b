"""Anchors for new data: the typical shapes of its boxes (YOLOv2, arXiv 1612.08242, section 2, "Dimension Clusters")."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vision.data.labelled_boxes import DetectionSource
from vision.data.sources import UnreadableImageError, read_image
from vision.data.view import Resize, whole_image
from vision.detection.yolo_v2 import STRIDE, shape_iou

NUM_ANCHORS = 5
MAX_ROUNDS = 100


def cluster_shapes(shapes: NDArray[np.float32], k: int = NUM_ANCHORS) -> tuple[tuple[float, float], ...]:
    """``k`` typical (width, height) of ``shapes`` [N, 2], by rising area: k-means with the distance 1 - IoU.

    Starts from shapes at even ranks of area, so that the answer is always the same. Errors: ValueError where there are
    fewer than ``k`` different shapes.
    """
    different = np.unique(shapes, axis=0)
    if len(different) < k:
        raise ValueError(f"the boxes have {len(different)} different shapes; {k} anchors need at least as many")
    by_area = different[np.argsort(different.prod(axis=1), kind="stable")]
    centres = by_area[((np.arange(k) + 0.5) * len(by_area) / k).astype(int)]
    for _ in range(MAX_ROUNDS):
        nearest = shape_iou(torch.from_numpy(shapes), centres.tolist()).argmax(dim=1).numpy()
        moved = np.stack([shapes[nearest == i].mean(axis=0) if (nearest == i).any() else centres[i] for i in range(k)])
        if np.allclose(moved, centres):
            break
        centres = moved
    return tuple((float(width), float(height)) for width, height in sorted(centres, key=lambda c: float(c.prod())))


def shapes_in_cells(source: DetectionSource, image_size: int, resize: Resize) -> NDArray[np.float32]:
    """Width and height [N, 2] of all boxes of ``source`` in cells of YOLOv2's map, at an input of ``image_size``.

    Images whose size is not annotated are opened for it; those that cannot be read are left out.
    """
    shapes = [np.zeros((0, 2), dtype=np.float32)]
    for image in source.images:
        size = image.size or _size_of(image.path)
        if size is not None:
            boxes = whole_image(*size, resize).boxes_in(image.boxes, image_size)
            shapes.append(((boxes[:, 2:] - boxes[:, :2]) / STRIDE).astype(np.float32))
    return np.concatenate(shapes)


def _size_of(path: Path) -> tuple[int, int] | None:
    try:
        return read_image(path).size
    except UnreadableImageError:
        return None
