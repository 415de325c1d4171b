"""Others' face detectors, known by what their ONNX files answer, and their answers as faces. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vision.serving.protocol import Floats, Outputs

STRIDES = (8, 16, 32)
LANDMARKS = 5


@dataclass(frozen=True)
class Faces:
    """Candidates: boxes [K, 4] as x1 y1 x2 y2, scores [K] and landmarks [K, 5, 2], in pixels of the input."""

    boxes: Floats
    scores: Floats
    landmarks: Floats


@dataclass(frozen=True)
class Family:
    """Files of one network: the licence of its weights as published, how pixels go in, and how answers come out.

    ``outputs`` gives the names of the outputs that ``decode`` takes, in its order, from (name, length of the last
    axis) of those a file has; None where the file is another's. ``decode`` takes one image's outputs, the input's
    width and height, and the least score. Pixels go in as (value - ``mean``) / ``std``, in the order blue, green, red
    with ``bgr``. ``free``: an input of fixed size may be freed; else the picture is laid into it.
    """

    licence: str
    outputs: Callable[[Sequence[tuple[str, Any]]], list[str] | None]
    decode: Callable[[Outputs, tuple[int, int], float], Faces]
    bgr: bool = False
    mean: float = 0.0
    std: float = 1.0
    free: bool = False


def decode_centerface(outputs: Outputs, size: tuple[int, int], threshold: float) -> Faces:  # noqa: ARG001
    """CenterFace (Xu et al., arXiv 1911.03599): a map of stride 4 with a face's middle, size, offset and landmarks.

    Landmarks are shares of the box from its upper left corner, y before x.
    """
    heat, sizes, offsets, marks = outputs
    rows, columns = np.nonzero(heat[0] >= threshold)
    height, width = np.exp(sizes[:, rows, columns]) * 4
    y = (rows + offsets[0, rows, columns] + 0.5) * 4 - height / 2
    x = (columns + offsets[1, rows, columns] + 0.5) * 4 - width / 2
    shares = marks[:, rows, columns].reshape(5, 2, -1)
    landmarks = np.stack([shares[:, 1] * width + x, shares[:, 0] * height + y], axis=-1).transpose(1, 0, 2)
    return Faces(np.stack([x, y, x + width, y + height], axis=1), heat[0, rows, columns], landmarks)


def decode_yunet(outputs: Outputs, size: tuple[int, int], threshold: float) -> Faces:
    """YuNet (Wu et al., Machine Intelligence Research 20, 2023), as OpenCV's zoo has it since March 2023.

    For each stride, a row a cell: face, object, middle and logarithm of the size, and landmarks, in cells from the
    cell's corner. The score is the geometric mean of face and object.
    """
    found = []
    for level, stride in enumerate(STRIDES):
        faces, objects, boxes, marks = (outputs[3 * part + level] for part in range(4))
        scores = np.sqrt(np.clip(faces[:, 0], 0, 1) * np.clip(objects[:, 0], 0, 1))
        kept = np.flatnonzero(scores >= threshold)
        corners = cells(size, stride, 1)[kept]
        middles, sides = (corners + boxes[kept, :2]) * stride, np.exp(boxes[kept, 2:]) * stride
        landmarks = (corners[:, None] + marks[kept].reshape(-1, LANDMARKS, 2)) * stride
        found.append(Faces(np.concatenate([middles - sides / 2, middles + sides / 2], axis=1), scores[kept], landmarks))
    return joined(found)


def decode_scrfd(outputs: Outputs, size: tuple[int, int], threshold: float) -> Faces:
    """SCRFD (Guo et al., arXiv 2105.04714) with landmarks, as InsightFace publishes it.

    For each stride, rows of one or two anchors a cell: score, distances to the four sides, and landmarks, all from the
    cell's corner and in cells.
    """
    found = []
    for level, stride in enumerate(STRIDES):
        scores, sides, marks = (outputs[3 * part + level] for part in range(3))
        num_cells = -(-size[0] // stride) * -(-size[1] // stride)
        kept = np.flatnonzero(scores[:, 0] >= threshold)
        corners = cells(size, stride, len(scores) // num_cells)[kept] * stride
        reach = sides[kept] * stride
        landmarks = corners[:, None] + marks[kept].reshape(-1, LANDMARKS, 2) * stride
        boxes = np.concatenate([corners - reach[:, :2], corners + reach[:, 2:]], axis=1)
        found.append(Faces(boxes, scores[kept, 0], landmarks))
    return joined(found)


def cells(size: tuple[int, int], stride: int, anchors: int) -> NDArray[np.float32]:
    """Column and row of every cell of a map [rows * columns * anchors, 2], row by row."""
    columns, rows = -(-size[0] // stride), -(-size[1] // stride)
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
    return np.repeat(grid, anchors, axis=0).astype(np.float32)


def joined(parts: Sequence[Faces]) -> Faces:
    """All of them."""
    boxes, scores, landmarks = zip(*((part.boxes, part.scores, part.landmarks) for part in parts), strict=True)
    return Faces(np.concatenate(boxes), np.concatenate(scores), np.concatenate(landmarks))


def centerface_outputs(found: Sequence[tuple[str, Any]]) -> list[str] | None:
    """Its published file numbers them."""
    names = ["537", "538", "539", "540"]
    return names if {name for name, _ in found} == set(names) else None


def yunet_outputs(found: Sequence[tuple[str, Any]]) -> list[str] | None:
    """They have names."""
    names = [f"{part}_{stride}" for part in ("cls", "obj", "bbox", "kps") for stride in STRIDES]
    return names if {name for name, _ in found} == set(names) else None


def scrfd_outputs(found: Sequence[tuple[str, Any]]) -> list[str] | None:
    """Scores, boxes and landmarks of three strides, in that order whatever their names."""
    return [name for name, _ in found] if [last for _, last in found] == [1] * 3 + [4] * 3 + [10] * 3 else None


FAMILIES = {
    "centerface": Family("MIT (Star-Clouds/CenterFace)", centerface_outputs, decode_centerface, free=True),
    "yunet": Family("MIT (opencv/opencv_zoo)", yunet_outputs, decode_yunet, bgr=True),
    "scrfd": Family(
        "non-commercial research, as published (deepinsight/insightface)", scrfd_outputs, decode_scrfd,
        mean=127.5, std=128.0,
    ),
}  # fmt: skip
