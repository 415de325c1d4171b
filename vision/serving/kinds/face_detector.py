"""Face detectors: boxes and five landmarks, by networks that others trained, served from their ONNX files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from vision.images import LabelledBox, Picture, draw_boxes
from vision.serving.folder import ModelError
from vision.serving.kinds.detector import greedy_nms
from vision.serving.networks import FreeSizeNetwork
from vision.serving.protocol import (
    Answer,
    Answering,
    Ask,
    Card,
    Floats,
    Kind,
    Model,
    Options,
    Outputs,
    Traced,
    option,
)

if TYPE_CHECKING:
    from torch import nn

GRID = 32  # sides of an input are multiples of the networks' coarsest stride
LONG_SIDE = 960
NMS_THRESHOLD = 0.3
MAX_FACES = 64
CENTERFACE = "centerface"
OUTPUTS = {"537": 1, "538": 2, "539": 2, "540": 10}  # of its published file, with their channels


@dataclass(frozen=True)
class FaceOptions(Options):
    """Which faces are wanted."""

    score_threshold: float = option(0.5, "Lowest score.", ge=0, le=1, flag="threshold")
    max_faces: int = option(MAX_FACES, "Most faces of an image.", ge=1, le=1000)


@dataclass(frozen=True)
class Faces:
    """Candidates: boxes [K, 4] as x1 y1 x2 y2, scores [K] and landmarks [K, 5, 2], in pixels of the input."""

    boxes: Floats
    scores: Floats
    landmarks: Floats


def decode_centerface(outputs: Outputs, threshold: float) -> Faces:
    """CenterFace (Xu et al., arXiv 1911.03599): a map of stride 4 with a face's middle, size, offset and landmarks.

    Landmarks are shares of the box from its upper left corner, y before x.
    """
    heat, sizes, offsets, marks = (output[0] for output in outputs)
    rows, columns = np.nonzero(heat[0] >= threshold)
    height, width = np.exp(sizes[:, rows, columns]) * 4
    y = (rows + offsets[0, rows, columns] + 0.5) * 4 - height / 2
    x = (columns + offsets[1, rows, columns] + 0.5) * 4 - width / 2
    shares = marks[:, rows, columns].reshape(5, 2, -1)
    landmarks = np.stack([shares[:, 1] * width + x, shares[:, 0] * height + y], axis=-1).transpose(1, 0, 2)
    return Faces(np.stack([x, y, x + width, y + height], axis=1), heat[0, rows, columns], landmarks)


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

    def adopt(self, file: Path, session: Any, num_threads: int) -> tuple[Mapping[str, Any], FreeSizeNetwork] | None:
        """CenterFace's published file, by its outputs; its fixed input is freed."""
        found = {output.name: output.shape[1] for output in session.get_outputs() if len(output.shape) == 4}
        if found != OUTPUTS:
            return None
        config = {"licence": "MIT (Star-Clouds/CenterFace)", "description": CENTERFACE}
        return config, FreeSizeNetwork(file, num_threads, list(OUTPUTS))

    def read_card(self, config: Mapping[str, Any], digest: str) -> Card:
        """See ``Kind``."""
        return Card(("face",), config["licence"], LONG_SIDE, config["description"], digest)

    def module(self, folder: Path) -> nn.Module:
        """Nothing is trained here. Errors: ModelError."""
        raise ModelError(f"{folder}: face detectors are served from the ONNX files of others, such as centerface.onnx")

    def trace(self, folder: Path, image_size: int | None = None) -> Traced:  # noqa: ARG002
        """Nothing is trained here. Errors: ModelError."""
        raise ModelError(f"{folder}: face detectors are ONNX files already")

    def answer(self, model: Model, picture: Picture, options: FaceOptions) -> Answering:
        """See ``Kind``."""
        image, size = picture.image, np.array([picture.width, picture.height], dtype=np.float32)
        scale = min(1.0, LONG_SIDE / max(image.size))
        sides = [max(GRID, GRID * round(side * scale / GRID)) for side in image.size]
        pixels = np.asarray(image.resize(sides, Image.Resampling.BILINEAR)).transpose(2, 0, 1)[None]
        del picture, image
        faces = decode_centerface((yield Ask(model.network, pixels)), options.score_threshold)
        back = size / np.array(sides, dtype=np.float32)
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
            image, [LabelledBox(tuple(face["box"]), f"{face['score']:.2f}", 0) for face in answer["faces"]]
        )

    def rows(self, answer: Answer) -> list[Answer]:
        """Score and corners."""
        return [
            {"score": face["score"]} | dict(zip(("x1", "y1", "x2", "y2"), face["box"], strict=True))
            for face in answer["faces"]
        ]


KIND = FaceDetectorKind()
