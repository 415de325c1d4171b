"""Average precision of a detector by the rules of PASCAL VOC, at any overlap.

Everingham et al., "The PASCAL Visual Object Classes Challenge", 2010, section 4.2. Detections are taken by falling
score; one is right if it overlaps its best true box by more than the threshold and that box has not been found before.
A second hit is wrong; a hit on an ignored box counts for nothing. COCO's own measure: ``vision.detection.coco``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vision.detection.boxes import box_iou
from vision.detection.detections import Detections

Floats = NDArray[np.float64]

# Stratified mining claims its gain at the two stricter overlaps (arXiv 1705.02233).
OVERLAPS = (0.5, 0.6, 0.7)
ELEVEN_POINTS = 11


@dataclass(frozen=True)
class Truth:
    """What is on one image: ``boxes`` [G, 4], ``class_ids`` [G], and ``ignored`` [G] for those that do not count."""

    boxes: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    ignored: NDArray[np.bool_]


@dataclass(frozen=True)
class Curve:
    """Precision and recall of one class after each counted detection, by falling ``scores``; ``num_boxes`` to find."""

    scores: Floats
    recall: Floats
    precision: Floats
    num_boxes: int

    def area(self) -> float:
        """Area under the curve whose precision never rises again: VOC's measure since 2010. NaN without boxes."""
        if self.num_boxes == 0:
            return float("nan")
        envelope = np.maximum.accumulate(self.precision[::-1])[::-1]
        return float((np.diff(self.recall, prepend=0.0) * envelope).sum())

    def interpolated(self, points: int = ELEVEN_POINTS) -> float:
        """Mean over ``points`` recalls from 0 to 1 of the best precision there or beyond: VOC 2007 with 11 points.

        With 101 it is COCO's rule. NaN without boxes.
        """
        if self.num_boxes == 0:
            return float("nan")
        envelope = np.append(np.maximum.accumulate(self.precision[::-1])[::-1], 0.0)
        places = np.searchsorted(self.recall, np.linspace(0, 1, points), side="left")
        return float(envelope[places].mean())


@dataclass(frozen=True)
class ClassDetections:
    """One class over all images: ``scores`` [D] by falling score, and for each detection its best true box.

    ``overlaps`` [D] with that box; ``box_ids`` [D], counted over all images, -1 where the image has none; ``ignored``
    [boxes] of the true boxes.
    """

    scores: Floats
    overlaps: Floats
    box_ids: NDArray[np.int64]
    ignored: NDArray[np.bool_]

    def curve(self, overlap: float) -> Curve:
        """Precision and recall where a right answer overlaps by more than ``overlap``."""
        hit = (self.overlaps > overlap) & (self.box_ids >= 0)
        counted = np.ones(len(hit), dtype=np.bool_)
        counted[hit] = ~self.ignored[self.box_ids[hit]]
        right = np.zeros(len(hit), dtype=np.bool_)
        hits = np.flatnonzero(hit)
        # The best-scored hit of each box comes first.
        _, firsts = np.unique(self.box_ids[hits], return_index=True)
        right[hits[firsts]] = True
        right = right[counted]
        found = right.cumsum()
        num_boxes = int((~self.ignored).sum())
        return Curve(
            self.scores[counted],
            found / max(num_boxes, 1),
            found / np.arange(1, len(found) + 1),
            num_boxes,
        )


def match_class(detections: Sequence[Detections], truths: Sequence[Truth], class_id: int) -> ClassDetections:
    """All detections of ``class_id`` beside the true boxes of it; one entry an image in both sequences."""
    scores, overlaps, box_ids, ignored, first_id = [], [], [], [], 0
    for found, truth in zip(detections, truths, strict=True):
        of_class = found.class_ids == class_id
        boxes, wanted = found.boxes[of_class], truth.class_ids == class_id
        scores.append(found.scores[of_class].double().numpy())
        ignored.append(truth.ignored[wanted])
        count = int(wanted.sum())
        if count == 0:
            overlaps.append(np.zeros(len(boxes)))
            box_ids.append(np.full(len(boxes), -1))
        else:
            best = box_iou(boxes.double(), torch.from_numpy(truth.boxes[wanted]).double()).max(dim=1)
            overlaps.append(best.values.numpy())
            box_ids.append(best.indices.numpy() + first_id)
        first_id += count
    joined = np.concatenate(scores) if scores else np.zeros(0)
    order = np.argsort(-joined, kind="stable")
    return ClassDetections(
        joined[order],
        np.concatenate(overlaps)[order] if overlaps else joined,
        np.concatenate(box_ids)[order] if box_ids else np.zeros(0, dtype=np.int64),
        np.concatenate(ignored) if ignored else np.zeros(0, dtype=np.bool_),
    )


def average_precisions(
    detections: Sequence[Detections], truths: Sequence[Truth], num_classes: int, overlap: float = 0.5
) -> list[float]:
    """Area under the curve of every class at ``overlap``; NaN for a class without boxes."""
    return [match_class(detections, truths, class_id).curve(overlap).area() for class_id in range(num_classes)]


def mean_present(values: Sequence[float]) -> float:
    """Mean over the classes that have boxes; 0 where none has."""
    present = [value for value in values if not np.isnan(value)]
    return float(np.mean(present)) if present else 0.0
