"""COCO's own measure of a detector, by pycocotools: average precision over ten overlaps from 0.50 to 0.95."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from vision.detection.detections import Detections
from vision.detection.evaluate import Truth


class EvaluationError(RuntimeError):
    """An evaluation cannot be made here."""


@dataclass(frozen=True)
class CocoFigures:
    """Means over classes; None where no class has such boxes. Small is under 32 x 32 pixels, large over 96 x 96.

    ``ap`` is over overlaps from 0.50 to 0.95, ``ap50`` and ``ap75`` at one; ``recall100`` with 100 detections an image.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    recall100: float | None


def evaluate_coco(
    detections: Sequence[Detections],
    truths: Sequence[Truth],
    class_names: Sequence[str],
    areas: Sequence[np.ndarray[Any, Any]] | None = None,
) -> tuple[CocoFigures, list[float]]:
    """The figures, and AP at 0.50 of every class (NaN for one without boxes).

    Ignored boxes are COCO's crowds. ``areas`` of the true boxes, [G] an image, decide what is small and large; without
    them it is the boxes' own. Errors: EvaluationError where pycocotools is missing.
    """
    if find_spec("pycocotools") is None:
        raise EvaluationError("COCO's figures need pycocotools: pip install 'dovetail-server[train]'")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth = COCO()
        truth.dataset = _dataset(truths, class_names, areas)
        truth.createIndex()
        results = _results(detections)
        found = truth.loadRes(results) if results else _nothing_found(truth)
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = [None if value < 0 else float(value) for value in evaluation.stats]
    precision = evaluation.eval["precision"][0, :, :, 0, 2]  # overlap 0.50, all recalls and classes, all areas, 100
    per_class = np.where((precision < 0).any(axis=0), np.nan, precision.mean(axis=0))
    ap, ap50, ap75, ap_small, ap_medium, ap_large, _, _, recall100, *_ = stats
    figures = CocoFigures(ap, ap50, ap75, ap_small, ap_medium, ap_large, recall100)
    return figures, per_class.tolist()


def _dataset(
    truths: Sequence[Truth], class_names: Sequence[str], areas: Sequence[np.ndarray[Any, Any]] | None
) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for image_id, truth in enumerate(truths):
        for row, box in enumerate(_corner_and_size(truth.boxes)):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(truth.class_ids[row]),
                    "bbox": box,
                    "area": box[2] * box[3] if areas is None else float(areas[image_id][row]),
                    "iscrowd": int(truth.ignored[row]),
                }
            )
    return {
        "images": [{"id": image_id} for image_id in range(len(truths))],
        "categories": [{"id": class_id, "name": name} for class_id, name in enumerate(class_names)],
        "annotations": annotations,
    }


def _results(detections: Sequence[Detections]) -> list[dict[str, Any]]:
    return [
        {"image_id": image_id, "category_id": class_id, "bbox": box, "score": score}
        for image_id, found in enumerate(detections)
        for box, score, class_id in zip(
            _corner_and_size(found.boxes.numpy()), found.scores.tolist(), found.class_ids.tolist(), strict=True
        )
    ]


def _nothing_found(truth: Any) -> Any:
    """An index without detections; pycocotools cannot load an empty list."""
    found = type(truth)()
    found.dataset = {**truth.dataset, "annotations": []}
    found.createIndex()
    return found


def _corner_and_size(boxes: np.ndarray[Any, Any]) -> list[list[float]]:
    """x1, y1, x2, y2 to x, y, width, height."""
    exact = boxes.astype(np.float64)
    joined: list[list[float]] = np.concatenate([exact[:, :2], exact[:, 2:] - exact[:, :2]], axis=1).tolist()
    return joined
