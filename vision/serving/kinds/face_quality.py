"""Face quality: landmarks or an aligned crop in, how useful each face is for recognition out.

A face that cannot be scored gets the quality -1 and a status that says why, never a number that means nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from vision.face_quality.alignment import FACE_SIZE, LandmarkError, align_face, fit_similarity, inter_eye_distance
from vision.face_quality.components import COMPONENTS, measure_face
from vision.face_quality.scale import FAILURE_TO_ASSESS, QualityScale
from vision.images import LabelledBox, Picture, draw_boxes
from vision.serving.answers import BOX, POINTS, maybe, number, record, several, text, truth, whole
from vision.serving.protocol import (
    Answer,
    Answering,
    Ask,
    Card,
    Kind,
    Model,
    ModelInfo,
    OptionError,
    Options,
    Pixels,
    Traced,
    option,
)

if TYPE_CHECKING:
    from torch import nn

ALIGNMENT = "similarity of 5 landmarks to the 112 x 112 template of ArcFace"
SCALE = "0-100, higher is better; -1: failure to assess"
OK, NO_FACE, LANDMARKS_MISSING, TOO_SMALL = "ok", "no_face", "landmarks_missing", "too_small"
# With fewer pixels between the eyes the crop is enlarged more than threefold: nothing in it was in the photograph.
MIN_INTER_EYE_PX = 12.0
TEMPLATE_INTER_EYE_PX = 35.2
# Crops with less contrast than this (standard deviation of grey levels) show nothing that could be scored.
MIN_CONTRAST = 2.0
CUT_OFF_SHARE = 0.1
MAX_FACES = 64
FACE_DETECTOR = "face-detector"
MAX_COORDINATE = 1e6  # far beyond every image that is decoded, and no infinity


def read_landmarks(text: str) -> list[Any]:
    """Faces of five points from JSON or a file of it; one face alone may come without the outer list.

    Errors: ValueError, OSError.
    """
    given = text if text.lstrip().startswith("[") else Path(text).read_text(encoding="utf-8")
    try:
        values = json.loads(given)
    except ValueError as error:
        raise ValueError(f"{text[:60]!r} is neither JSON nor a file of it") from error
    if not isinstance(values, list):
        raise ValueError("landmarks are a list of faces of five points")
    is_one_face = len(values) == 5 and all(isinstance(p, list) and len(p) == 2 for p in values)
    return [values] if is_one_face and not isinstance(values[0][0], list) else values


@dataclass(frozen=True)
class FaceQualityOptions(Options):
    """Where the faces are; neither: a face detector looks for them where one is served."""

    landmarks: list[Any] | None = option(  # noqa: RUF009 - a field
        None,
        "For each face of the image five points x, y in pixels of the upright image: left eye, right eye, nose tip, "
        "left and right corner of the mouth, left and right as seen in it.",
        per_image=True,
        parse=read_landmarks,
    )
    aligned: bool = option(False, "The image is one face of 112 x 112 pixels at the template's place.")
    components: bool = option(
        False, "Measure sharpness, light, size and pose of each face as well, each from 0 to 100."
    )

    def __post_init__(self) -> None:
        if self.aligned and self.landmarks is not None:
            message = "landmarks and aligned were both sent; an aligned crop needs no landmarks"
            raise OptionError("landmarks", message)

    def checked(self, info: ModelInfo, place: str = "") -> FaceQualityOptions:  # noqa: ARG002
        """The same. Errors: OptionError naming the face that is none."""
        if self.landmarks is not None:
            check_faces(self.landmarks, f"landmarks{place}")
        return self


def check_faces(faces: Any, param: str) -> None:
    """Faces of five points each. Errors: OptionError naming the face."""
    if not isinstance(faces, list) or len(faces) > MAX_FACES:
        raise OptionError(param, f"{param} must be a list of at most {MAX_FACES} faces")
    for index, face in enumerate(faces):
        if not (isinstance(face, list) and len(face) == 5 and all(is_point(point) for point in face)):
            message = f"{param}.{index} is no face: it needs five points x, y, all numbers"
            raise OptionError(f"{param}.{index}", message)


def is_point(value: Any) -> bool:
    """Two finite numbers."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < MAX_COORDINATE for v in value)
    )


MEASURE = record(
    scalar=whole("100 is the best.", 0, 100),
    raw=number("Within range."),
    range=several("The least and the greatest raw value.", {"type": "number"}, 2),
)
FACE = record(
    index=whole("Its place among the faces that were sent or found.", 0),
    box=maybe(BOX),
    landmarks=maybe(POINTS),
    quality=whole("0 to 100, higher is better; -1: it could not be assessed.", FAILURE_TO_ASSESS, 100),
    raw=maybe(number("The network's own score.")),
    status=text("ok, or why there is no score."),
    inter_eye_px=maybe(number("Pixels between the eyes.", 0)),
    warnings=several("What lowers the worth of the score.", {"type": "string"}),
    components=maybe(record(**dict.fromkeys(COMPONENTS, MEASURE), optional=COMPONENTS)),
    largest=truth("Whether it is the largest of the image."),
    optional=("components",),
)
ANSWER = record(
    status=text("ok, no_face or landmarks_missing."),
    faces=several("The largest first.", FACE),
    count=whole("Faces.", 0),
    scale=text("What quality means."),
    scale_map=record(midpoint=number("The raw score that becomes 50."), width=number("Of the sigmoid.", 0)),
    alignment=text("How a face is cut out."),
    model_sha256=text("Of the weights."),
)


@dataclass(frozen=True)
class ScorerCard(Card):
    """``scale`` says what a score means."""

    scale: QualityScale


@dataclass(frozen=True)
class PreparedFace:
    """One face's crop uint8 [3, 112, 112], None where there is none, and what is known of it already."""

    crop: Pixels | None
    record: dict[str, Any]


class FaceQualityKind(Kind):
    """Answers ``{"faces": [{box, landmarks, quality, raw, status, ...}, ...], ...}``, the largest face first.

    No embedding is made, and nothing of an image is kept.
    """

    name: ClassVar = "face-quality"
    format: ClassVar = "dovetail-face-quality"
    route: ClassVar = "face-quality"
    noun: ClassVar = "vision.face_quality"
    id_prefix: ClassVar = "fq"
    summary: ClassVar = "Score faces from 0 to 100; -1 with a status where a face cannot be scored."
    options: ClassVar = FaceQualityOptions
    schema: ClassVar = ANSWER
    asks: ClassVar = (FACE_DETECTOR,)

    def read_card(self, config: Mapping[str, Any], digest: str) -> ScorerCard:
        """See ``Kind``."""
        scale = QualityScale(**config["scale"])
        return ScorerCard((), config["licence"], FACE_SIZE, config["description"], digest, scale)

    def module(self, folder: Path) -> nn.Module:
        """See ``Kind``."""
        from vision.face_quality.checkpoint import load_scorer
        from vision.face_quality.traced import NormalizedScorer

        return NormalizedScorer(load_scorer(folder)[0])

    def trace(self, folder: Path, image_size: int | None = None) -> Traced:  # noqa: ARG002
        """See ``Kind``; there is one size."""
        from vision.face_quality.traced import trace_scorer

        return trace_scorer(folder)

    def full_size(self, options: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Faces are cut out of it."""
        return True

    def answer(self, model: Model, picture: Picture, options: FaceQualityOptions) -> Answering:
        """See ``Kind``."""
        status, faces = OK, list[PreparedFace]()
        marks = options.landmarks
        detector = model.companions.get(FACE_DETECTOR)
        if marks is None and not options.aligned and detector is not None:
            found = yield from detector.answer(picture, {"max_faces": MAX_FACES})
            marks = [face["landmarks"] for face in found["faces"]]
        if options.aligned:
            faces = [prepare_crop(picture.image)]
        elif marks is None:
            status = LANDMARKS_MISSING
        else:
            faces = [prepare_face(picture.image, landmarks) for landmarks in marks]
            status = OK if faces else NO_FACE
        del picture
        crops = [face.crop for face in faces if face.crop is not None]
        raw = iter((yield Ask(model.network, np.stack(crops)))[0].astype(np.float64).tolist() if crops else [])
        if options.components:
            faces = [with_components(face) for face in faces]
        records = [
            face.record | {"index": index} if face.crop is None else scored(face.record, next(raw), model.card, index)
            for index, face in enumerate(faces)
        ]
        records.sort(key=lambda record: -area(record["box"]))
        scale = model.card.scale
        return {
            "status": status,
            "faces": [record | {"largest": place == 0} for place, record in enumerate(records)],
            "count": len(records),
            "scale": SCALE,
            "scale_map": {"midpoint": scale.midpoint, "width": scale.width},
            "alignment": ALIGNMENT,
            "model_sha256": model.card.digest,
        }

    def draw(self, image: Image.Image, answer: Answer) -> Image.Image:
        """Boxes with quality or status."""
        boxes = [
            LabelledBox(
                tuple(face["box"]),
                str(face["quality"]) if face["status"] == OK else face["status"],
                int(face["status"] != OK),
            )
            for face in answer["faces"]
            if face["box"] is not None
        ]
        return draw_boxes(image, boxes)

    def says_something(self, answer: Answer) -> bool:
        """Whether any face was scored."""
        return any(face["quality"] >= 0 for face in answer["faces"])

    def nothing(self, answer: Answer) -> str:
        """Why there is no face."""
        hints = {
            LANDMARKS_MISSING: "no face detector is part of this; give --faces, --landmarks, or --aligned for a crop",
            NO_FACE: "no face was given or found",
        }
        return f"{answer['status']}: {hints[answer['status']]}"

    def rows(self, answer: Answer) -> list[Answer]:
        """Quality, and why there is none."""
        shown = ("index", "quality", "raw", "status", "inter_eye_px")
        return [
            {key: face[key] for key in shown}
            | {name: found["scalar"] for name, found in (face.get("components") or {}).items()}
            | {"warnings": "; ".join(face["warnings"])}
            for face in answer["faces"]
        ]


def scored(record: dict[str, Any], raw: float, card: ScorerCard, index: int) -> dict[str, Any]:
    """A face's entry with its score; ``index`` is its place in the caller's order, since the answer has another."""
    quality = card.scale.quality(raw)
    if quality == FAILURE_TO_ASSESS:
        return failed(record, "failure_to_assess", "the network's answer is not a number") | {"index": index}
    return record | {"index": index, "quality": quality, "raw": round(raw, 6)}


def with_components(face: PreparedFace) -> PreparedFace:
    """The face with its single measures; None where nothing can be seen of it."""
    found = None if face.crop is None else measure_face(face.crop, face.record["landmarks"])
    return dataclasses.replace(face, record=face.record | {"components": found})


def prepare_crop(image: Image.Image) -> PreparedFace:
    """An image that is said to be an aligned crop already."""
    record = new_record([0.0, 0.0, float(image.width), float(image.height)], None, None)
    if image.size != (FACE_SIZE, FACE_SIZE):
        reason = f"the crop is {image.width}x{image.height} pixels; an aligned one has {FACE_SIZE}x{FACE_SIZE}"
        return PreparedFace(None, failed(record, "failure_to_assess", reason))
    return with_contrast(image, record)


def prepare_face(image: Image.Image, landmarks: Any) -> PreparedFace:
    """One face by its five landmarks."""
    try:
        points = np.asarray(landmarks, dtype=np.float64)
        if points.shape != (5, 2):
            raise LandmarkError(f"landmarks have shape {points.shape}; a face has five points x, y")
        similarity = fit_similarity(points)
        crop = align_face(image, points)
    except (LandmarkError, ValueError, TypeError) as error:
        return PreparedFace(None, failed(new_record(None, None, None), "failure_to_assess", str(error)))
    corners = np.array([[0, 0], [FACE_SIZE, 0], [FACE_SIZE, FACE_SIZE], [0, FACE_SIZE]], dtype=np.float64) - 0.5
    back = (corners[:, 0] + 1j * corners[:, 1] - similarity.shift) / similarity.factor
    low = np.array([back.real.min() + 0.5, back.imag.min() + 0.5])
    high = np.array([back.real.max() + 0.5, back.imag.max() + 0.5])
    limits = np.array(image.size, dtype=np.float64)
    box = np.concatenate([np.clip(low, 0, limits), np.clip(high, 0, limits)])
    eyes = inter_eye_distance(points)
    record = new_record(np.round(box, 3).tolist(), points.tolist(), round(eyes, 2))
    if eyes < MIN_INTER_EYE_PX:
        reason = f"the eyes are {eyes:.1f} pixels apart; at least {MIN_INTER_EYE_PX:.0f} are needed"
        return PreparedFace(None, failed(record, TOO_SMALL, reason))
    if eyes < TEMPLATE_INTER_EYE_PX:
        record["warnings"].append(f"enlarged: the eyes are {eyes:.1f} pixels apart, the network sees them 35.2 apart")
    inside = area(record["box"]) / max(float(np.prod(high - low)), 1e-9)
    if 1 - inside > CUT_OFF_SHARE:
        record["warnings"].append(f"cut off: {1 - inside:.0%} of the face's surroundings lie outside the image")
    return with_contrast(crop, record)


def with_contrast(crop: Image.Image, record: dict[str, Any]) -> PreparedFace:
    """The crop, unless nothing can be seen on it."""
    if float(np.asarray(crop.convert("L"), dtype=np.float32).std()) < MIN_CONTRAST:
        return PreparedFace(None, failed(record, "failure_to_assess", "the crop is of one colour: no face can be seen"))
    return PreparedFace(np.ascontiguousarray(np.asarray(crop).transpose(2, 0, 1)), record)


def new_record(
    box: list[float] | None, landmarks: list[list[float]] | None, inter_eye_px: float | None
) -> dict[str, Any]:
    """A face's entry before it is scored."""
    return {
        "box": box, "landmarks": landmarks, "quality": FAILURE_TO_ASSESS, "raw": None, "status": OK,
        "inter_eye_px": inter_eye_px, "warnings": [],
    }  # fmt: skip


def failed(record: dict[str, Any], status: str, reason: str) -> dict[str, Any]:
    """An entry without a score."""
    return record | {
        "quality": FAILURE_TO_ASSESS,
        "raw": None,
        "status": status,
        "warnings": [*record["warnings"], reason],
    }


def area(box: Sequence[float] | None) -> float:
    """Square pixels; 0 where there is no box."""
    return 0.0 if box is None else (box[2] - box[0]) * (box[3] - box[1])


KIND = FaceQualityKind()
