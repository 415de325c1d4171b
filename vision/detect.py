"""A detector as the server uses it: small input out of a decoded image, one batch through the network, JSON out.

No torch here: the network stands behind ``Runtime``, which is ONNX Runtime where an export exists, else torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vision.data.view import Resize, render, whole_image
from vision.images import LabelledBox, Picture, draw_boxes
from vision.predict import ModelError, ModelInfo

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

DETECTOR = "detector"
# Above it no box can stay that overlaps a better one of its class by half: Soft-NMS has taken half its score.
DEFAULT_SCORE_THRESHOLD = 0.5
DEFAULT_MAX_DETECTIONS = 100


@dataclass(frozen=True)
class DetectionOptions:
    """What of the detections is wanted: scores from ``score_threshold`` on, the best ``max_detections`` of them,

    of these classes only (None: of all).
    """

    score_threshold: float = DEFAULT_SCORE_THRESHOLD
    max_detections: int = DEFAULT_MAX_DETECTIONS
    class_ids: frozenset[int] | None = None

    @classmethod
    def from_json(cls, options: Mapping[str, Any]) -> DetectionOptions:
        """From a JSON object; missing keys take the defaults."""
        values = dict(options)
        if values.get("class_ids") is not None:
            values["class_ids"] = frozenset(values["class_ids"])
        try:
            return cls(**values)
        except TypeError as error:
            raise ModelError(f"the options {', '.join(options)} are not all known to a detector") from error


@dataclass(frozen=True)
class PreparedImage:
    """A detector's input uint8 [3, S, S], the size of the image it was made from, and what is wanted."""

    pixels: Pixels
    width: int
    height: int
    options: DetectionOptions


@dataclass(frozen=True)
class Candidates:
    """Boxes [K, 4] in input pixels by falling score, scores [K], class ids [K]; suppressed already."""

    boxes: Floats
    scores: Floats
    class_ids: NDArray[np.int64]


class Runtime(Protocol):
    """A detector's network on some engine."""

    @property
    def name(self) -> str:
        """onnxruntime or torch."""

    def run(self, images: Pixels, thresholds: Sequence[float]) -> list[Candidates]:
        """RGB images uint8 [B, 3, S, S] to candidates with at least ``thresholds[b]`` of score."""


@dataclass(frozen=True)
class DetectorDescription:
    """What is needed of a detector's config.json to use it, read without torch."""

    class_names: tuple[str, ...]
    licence: str
    image_size: int
    resize: Resize
    description: str
    soft_nms_threshold: float
    score_threshold: float
    max_detections: int

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str) -> DetectorDescription:
        """From the object in config.json. Errors: ModelError."""
        try:
            head = values["head"]
            return cls(
                class_names=tuple(values["class_names"]),
                licence=values["licence"],
                image_size=values["image_size"],
                resize=values["resize"],
                description=values["description"],
                soft_nms_threshold=head.get("soft_nms_threshold", 0.5),
                score_threshold=head["score_threshold"],
                max_detections=head["max_detections"],
            )
        except (KeyError, TypeError) as error:
            raise ModelError(f"{source} does not describe a detector ({type(error).__name__}: {error})") from error


class Detector:
    """A ``VisionModel`` that answers ``{"detections": [{box, score, class_id, class_name}, ...]}`` by falling score.

    A box is x1, y1, x2, y2 in pixels of the upright original, clipped to it.
    """

    def __init__(self, name: str, description: DetectorDescription, runtime: Runtime) -> None:
        self.description = description
        self.runtime = runtime
        self.info = ModelInfo(
            name,
            DETECTOR,
            description.class_names,
            description.licence,
            description.image_size,
            runtime.name,
            description.description,
        )

    def prepare(self, picture: Picture, options: Mapping[str, Any]) -> PreparedImage:
        """Resize to the network's input; the decoded image is not kept."""
        image, description = picture.image, self.description
        view = whole_image(image.width, image.height, description.resize)
        pixels = np.asarray(render(image, view, description.image_size)).transpose(2, 0, 1)
        return PreparedImage(pixels, picture.width, picture.height, DetectionOptions.from_json(options))

    def predict(self, prepared: Sequence[PreparedImage]) -> list[dict[str, Any]]:
        """Detections of every image."""
        images = np.stack([image.pixels for image in prepared])
        found = self.runtime.run(images, [image.options.score_threshold for image in prepared])
        return [self._answer(image, candidates) for image, candidates in zip(prepared, found, strict=True)]

    def _answer(self, image: PreparedImage, found: Candidates) -> dict[str, Any]:
        options, description = image.options, self.description
        wanted = found.scores >= options.score_threshold
        if options.class_ids is not None:
            wanted &= np.isin(found.class_ids, list(options.class_ids))
        rows = np.flatnonzero(wanted)[: options.max_detections]
        view = whole_image(image.width, image.height, description.resize)
        limits = np.array([image.width, image.height, image.width, image.height], dtype=np.float32)
        boxes = np.clip(view.boxes_out(found.boxes[rows], description.image_size), 0, limits)
        return {
            "detections": [
                {
                    "box": [round(float(value), 3) for value in box],
                    "score": round(float(found.scores[row]), 5),
                    "class_id": int(found.class_ids[row]),
                    "class_name": description.class_names[found.class_ids[row]],
                }
                for box, row in zip(boxes, rows, strict=True)
            ]
        }

    def draw(self, image: Image.Image, answer: Mapping[str, Any]) -> Image.Image:
        """Boxes with class and score."""
        boxes = [
            LabelledBox(tuple(entry["box"]), f"{entry['class_name']} {entry['score']:.2f}", entry["class_id"])
            for entry in answer["detections"]
        ]
        return draw_boxes(image, boxes)
