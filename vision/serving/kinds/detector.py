"""Detectors: boxes with classes and scores, by falling score."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vision.data.view import Resize, render, whole_image
from vision.images import LabelledBox, Picture, draw_boxes
from vision.serving.protocol import (
    Answer,
    Answering,
    Ask,
    Card,
    Floats,
    Kind,
    Model,
    ModelInfo,
    OptionError,
    Options,
    Traced,
    option,
)
from vision.serving.shapes import BOX_SHAPES, OBJECT_SHAPES

if TYPE_CHECKING:
    from torch import nn

MIN_SCORE = 1e-3
TAKEN = -1.0
# Above it no box can stay that overlaps a better one of its class by half: Soft-NMS has taken half its score.
DEFAULT_SCORE_THRESHOLD = 0.5
MAX_ID_DIGITS, SHOWN_CLASSES, MAX_SHOWN = 9, 20, 80


@dataclass(frozen=True)
class DetectionOptions(Options):
    """What of the detections is wanted. ``classes`` are names or ids; ``checked`` makes ids of them."""

    score_threshold: float = option(DEFAULT_SCORE_THRESHOLD, "Lowest score.", ge=0, le=1, flag="threshold")
    max_detections: int = option(100, "Most detections of an image.", ge=1, le=1000)
    classes: tuple[str | int, ...] | None = option(
        None, "Names or ids of the classes that are wanted; nothing: all.", min_length=1, max_length=256,
        parse=lambda text: tuple(part.strip() for part in text.split(",")),
    )  # fmt: skip

    def checked(self, info: ModelInfo, place: str = "") -> DetectionOptions:
        """Ids for names. Errors: OptionError for a class the model lacks."""
        if self.classes is None:
            return self
        return dataclasses.replace(self, classes=tuple(class_id(entry, info, place) for entry in self.classes))


def class_id(entry: str | int, info: ModelInfo, place: str) -> int:
    """A class by name, or by id."""
    if entry in info.class_names:
        return info.class_names.index(str(entry))
    digits = str(entry) if isinstance(entry, str) or entry < 10**MAX_ID_DIGITS else ""
    if digits.isdecimal() and len(digits) <= MAX_ID_DIGITS and int(digits) < len(info.class_names):
        return int(digits)
    known = ", ".join(info.class_names[:SHOWN_CLASSES]) + (", ..." if len(info.class_names) > SHOWN_CLASSES else "")
    shown = repr(entry) if isinstance(entry, str) or digits else "a number far too large"
    if len(shown) > MAX_SHOWN:
        shown = shown[: MAX_SHOWN - 3] + "..."
    raise OptionError(f"classes{place}", f"classes holds {shown}; {info.name} knows {known}")


@dataclass(frozen=True)
class DetectorCard(Card):
    """``soft``: what overlaps a better box of its class loses score (Soft-NMS), and does not fall."""

    resize: Resize
    soft: bool
    nms_threshold: float
    score_threshold: float


class DetectorKind(Kind):
    """Answers ``{"detections": [{box, score, class_id, class_name}, ...]}``, x1 y1 x2 y2 in the original's pixels."""

    name: ClassVar = "detector"
    format: ClassVar = "dovetail-detector"
    route: ClassVar = "detections"
    noun: ClassVar = "vision.detection"
    id_prefix: ClassVar = "det"
    summary: ClassVar = "Detect objects: class, score and box in pixels, x1 y1 x2 y2."
    options: ClassVar = DetectionOptions
    shapes: ClassVar = BOX_SHAPES
    object_shapes: ClassVar = OBJECT_SHAPES

    def read_card(self, config: Mapping[str, Any], digest: str) -> DetectorCard:
        """See ``Kind``."""
        head = config["head"]
        soft = "nms_threshold" not in head
        return DetectorCard(
            tuple(config["class_names"]), config["licence"], config["image_size"], config["description"], digest,
            config["resize"], soft, head.get("soft_nms_threshold", 0.5) if soft else head["nms_threshold"],
            head["score_threshold"],
        )  # fmt: skip

    def module(self, folder: Path) -> nn.Module:
        """See ``Kind``."""
        from vision.detection.checkpoint import load_detector
        from vision.detection.traced import Candidates

        return Candidates(load_detector(folder))

    def trace(self, folder: Path, image_size: int | None = None) -> Traced:
        """See ``Kind``."""
        from vision.detection.traced import trace_detector

        return trace_detector(folder, image_size)

    def answer(self, model: Model, picture: Picture, options: DetectionOptions) -> Answering:
        """See ``Kind``."""
        card: DetectorCard = model.card
        view = whole_image(picture.image.width, picture.image.height, card.resize)
        pixels = np.asarray(render(picture.image, view, card.image_size)).transpose(2, 0, 1)[None]
        width, height = picture.width, picture.height
        del picture
        boxes, probabilities = (output[0] for output in (yield Ask(model.network, pixels)))
        kept, scores, class_ids = suppress(boxes, probabilities, card, options)
        view = whole_image(width, height, card.resize)
        limits = np.array([width, height, width, height], dtype=np.float32)
        placed = np.clip(view.boxes_out(kept, card.image_size), 0, limits)
        return {
            "detections": [
                {
                    "box": [round(float(value), 3) for value in box],
                    "score": round(float(score), 5),
                    "class_id": int(class_id),
                    "class_name": card.class_names[class_id],
                }
                for box, score, class_id in zip(placed, scores, class_ids, strict=True)
            ]
        }

    def draw(self, image: Image.Image, answer: Answer) -> Image.Image:
        """Boxes with class and score."""
        boxes = [
            LabelledBox(tuple(entry["box"]), f"{entry['class_name']} {entry['score']:.2f}", entry["class_id"])
            for entry in answer["detections"]
        ]
        return draw_boxes(image, boxes)

    def rows(self, answer: Answer) -> list[Answer]:
        """Class, score and corners."""
        return [
            {"class": entry["class_name"], "score": entry["score"]}
            | dict(zip(("x1", "y1", "x2", "y2"), entry["box"], strict=True))
            for entry in answer["detections"]
        ]


def suppress(
    boxes: Floats, probabilities: Floats, card: DetectorCard, options: DetectionOptions
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """What is wanted of an image's candidates [P, 4], [P, classes]: boxes [K, 4], scores [K] falling, class ids [K]."""
    likely = probabilities >= max(options.score_threshold, card.score_threshold)
    if options.classes is not None:
        likely &= np.isin(np.arange(probabilities.shape[1]), options.classes)
    rows, class_ids = np.nonzero(likely)
    kept, scores = greedy_nms(
        boxes[rows], probabilities[rows, class_ids], class_ids, card.nms_threshold, options.max_detections, card.soft
    )
    wanted = scores >= options.score_threshold  # Soft-NMS leaves some below it
    kept = kept[wanted]
    return boxes[rows[kept]], scores[wanted], class_ids[kept]


def greedy_nms(
    boxes: Floats, scores: Floats, class_ids: NDArray[np.int64], threshold: float, max_kept: int, soft: bool
) -> tuple[NDArray[np.int64], Floats]:
    """``vision.detection.boxes.soft_nms``, linear, or ``nms``, class by class, for one image, in numpy."""
    x1, y1, x2, y2 = boxes.T
    areas = np.maximum(x2 - x1, 0) * np.maximum(y2 - y1, 0)
    remaining = scores.copy()
    kept: list[int] = []
    kept_scores: list[float] = []
    while len(kept) < min(max_kept, len(boxes)):
        best = int(remaining.argmax())
        if remaining[best] < MIN_SCORE:
            break
        kept.append(best)
        kept_scores.append(float(remaining[best]))
        width = np.minimum(x2, x2[best]) - np.maximum(x1, x1[best])
        height = np.minimum(y2, y2[best]) - np.maximum(y1, y1[best])
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        overlap = shared / np.maximum(areas + areas[best] - shared, np.finfo(np.float32).tiny)
        suffers = (overlap >= threshold if soft else overlap > threshold) & (class_ids == class_ids[best])
        remaining *= np.where(suffers, 1 - overlap if soft else 0, 1)
        remaining[best] = TAKEN
    return np.array(kept, dtype=np.int64), np.array(kept_scores, dtype=np.float32)


KIND = DetectorKind()
