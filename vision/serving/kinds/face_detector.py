"""Face detectors: boxes and five landmarks, by networks that others trained, served from their ONNX files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from vision.images import LabelledBox, Picture, draw_boxes
from vision.serving.answers import BOX, POINTS, SCORE, record, several
from vision.serving.faces import FAMILIES, Family
from vision.serving.folder import ModelError
from vision.serving.kinds.detector import greedy_nms, numbered
from vision.serving.networks import SingleNetwork, with_free_size
from vision.serving.protocol import (
    Answer,
    Answering,
    Ask,
    Card,
    Kind,
    Model,
    Options,
    Traced,
    option,
)

if TYPE_CHECKING:
    from torch import nn

GRID = 32  # sides of a free input are multiples of the networks' coarsest stride
LONG_SIDE = 960
NMS_THRESHOLD = 0.3
MAX_FACES = 64


@dataclass(frozen=True)
class FaceOptions(Options):
    """Which faces are wanted."""

    score_threshold: float = option(0.5, "Lowest score.", ge=0, le=1, flag="threshold")
    max_faces: int = option(MAX_FACES, "Most faces of an image.", ge=1, le=1000)


@dataclass(frozen=True)
class FaceCard(Card):
    """``family``: whose answers these are; ``size``: width and height of an input that has one size, else None."""

    family: Family
    size: tuple[int, int] | None


class FaceDetectorKind(Kind):
    """Answers ``{"faces": [{box, score, landmarks}, ...]}`` by falling score, in pixels of the original.

    Landmarks are left eye, right eye, nose tip, left and right corner of the mouth, as seen.
    """

    name: ClassVar = "face-detector"
    format: ClassVar = "dovetail-face-detector"
    route: ClassVar = "faces"
    noun: ClassVar = "vision.faces"
    id_prefix: ClassVar = "face"
    summary: ClassVar = "Find faces: score, box and five landmarks."
    options: ClassVar = FaceOptions
    schema: ClassVar = record(faces=several("By falling score.", record(box=BOX, score=SCORE, landmarks=POINTS)))
    boxes: ClassVar = "faces"

    def adopt(self, file: Path, session: Any, num_threads: int) -> tuple[Mapping[str, Any], SingleNetwork] | None:
        """A file of one of the families, by its outputs."""
        found = [(output.name, output.shape[-1] if output.shape else None) for output in session.get_outputs()]
        for name, family in FAMILIES.items():
            if (outputs := family.outputs(found)) is not None:
                session = with_free_size(file, num_threads) if family.free else session
                sides = session.get_inputs()[0].shape[:1:-1]
                size = sides if all(isinstance(side, int) for side in sides) else None
                network = SingleNetwork(session, outputs, family.bgr, family.mean, family.std)
                return {"family": name, "size": size}, network
        return None

    def read_card(self, config: Mapping[str, Any], digest: str) -> FaceCard:
        """See ``Kind``."""
        family, size = FAMILIES[config["family"]], config["size"]
        long_side = LONG_SIDE if size is None else max(size)
        fixed = None if size is None else (size[0], size[1])
        return FaceCard(("face",), family.licence, long_side, config["family"], digest, family, fixed)

    def module(self, folder: Path) -> nn.Module:
        """Nothing is trained here. Errors: ModelError."""
        raise ModelError(f"{folder}: face detectors are served from the ONNX files of others, such as centerface.onnx")

    def trace(self, folder: Path, image_size: int | None = None) -> Traced:  # noqa: ARG002
        """Nothing is trained here. Errors: ModelError."""
        raise ModelError(f"{folder}: face detectors are ONNX files already")

    def answer(self, model: Model, picture: Picture, options: FaceOptions) -> Answering:
        """See ``Kind``."""
        card: FaceCard = model.card
        image, size = picture.image, np.array([picture.width, picture.height], dtype=np.float32)
        laid, shown = laid_out(image, card.size)
        del picture, image
        outputs = [output[0] for output in (yield Ask(model.network, np.asarray(laid).transpose(2, 0, 1)[None]))]
        faces = card.family.decode(outputs, laid.size, options.score_threshold)
        back = size / np.array(shown, dtype=np.float32)
        kept, scores = greedy_nms(
            faces.boxes, faces.scores, np.zeros(len(faces.scores), dtype=np.int64), NMS_THRESHOLD, options.max_faces,
            soft=False,
        )  # fmt: skip
        boxes = np.clip(faces.boxes[kept].reshape(-1, 2, 2) * back, 0, size).reshape(-1, 4)
        landmarks = np.clip(faces.landmarks[kept] * back, 0, size - 1)
        return {
            "faces": [
                {
                    "box": [round(float(value), 2) for value in box],
                    "score": round(float(score), 5),
                    "landmarks": [[round(float(value), 2) for value in point] for point in points],
                }
                for box, score, points in zip(boxes, scores, landmarks, strict=True)
            ]
        }

    def draw(self, image: Image.Image, answer: Answer) -> Image.Image:
        """Boxes with their scores."""
        return draw_boxes(
            image,
            [LabelledBox(tuple(face["box"]), f"{face['score']:.2f}{numbered(face)}", 0) for face in answer["faces"]],
        )

    def rows(self, answer: Answer) -> list[Answer]:
        """Score and corners."""
        return [
            ({"track": face["track_id"]} if "track_id" in face else {})
            | {"score": face["score"]}
            | dict(zip(("x1", "y1", "x2", "y2"), face["box"], strict=True))
            for face in answer["faces"]
        ]


def laid_out(image: Image.Image, fixed: tuple[int, int] | None) -> tuple[Image.Image, tuple[int, int]]:
    """The image as an input: as large as a free one may be, or in the upper left of one of ``fixed`` size.

    With it width and height of the part that it fills.
    """
    if fixed is None:
        scale = min(1.0, LONG_SIDE / max(image.size))
        width, height = (max(GRID, GRID * round(side * scale / GRID)) for side in image.size)
        return image.resize((width, height), Image.Resampling.BILINEAR), (width, height)
    scale = min(fixed[0] / image.width, fixed[1] / image.height)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGB", fixed)
    canvas.paste(image.resize((width, height), Image.Resampling.BILINEAR), (0, 0))
    return canvas, (width, height)


KIND = FaceDetectorKind()
