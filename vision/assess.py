"""A face-quality scorer as the server uses it: landmarks or an aligned crop in, JSON out. No torch here.

There is no face detector in it: the caller says where the faces are. A face that cannot be scored gets the quality -1
and a status that says why, never a number that means nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vision.face_quality.alignment import FACE_SIZE, LandmarkError, align_face, fit_similarity, inter_eye_distance
from vision.face_quality.scale import FAILURE_TO_ASSESS, QualityScale
from vision.images import LabelledBox, Picture, draw_boxes
from vision.predict import CONFIG_FILE, ONNX_FILE, WEIGHTS_FILE, ModelError, ModelInfo

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

FACE_QUALITY = "face-quality"
FORMAT = "dovetail-face-quality"
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


@dataclass(frozen=True)
class AssessmentOptions:
    """``landmarks``: five points of each face, None where none were sent. ``aligned``: the image is a crop."""

    landmarks: tuple[Any, ...] | None = None
    aligned: bool = False

    @classmethod
    def from_json(cls, options: Mapping[str, Any]) -> AssessmentOptions:
        """From a JSON object. Errors: ModelError."""
        if unknown := sorted(set(options) - {"landmarks", "aligned"}):
            raise ModelError(f"the options {', '.join(unknown)} are not known to a face-quality model")
        landmarks = options.get("landmarks")
        if landmarks is not None and options.get("aligned"):
            raise ModelError("landmarks and aligned were both given; an aligned crop needs no landmarks")
        return cls(None if landmarks is None else tuple(landmarks), bool(options.get("aligned")))


@dataclass(frozen=True)
class PreparedFace:
    """One face's crop uint8 [3, 112, 112], None where there is none, and what is known of it already."""

    crop: Pixels | None
    record: dict[str, Any]


@dataclass(frozen=True)
class PreparedFaces:
    """All faces of an image, largest first; ``status`` is set where there are none."""

    faces: tuple[PreparedFace, ...]
    status: str


class ScorerRuntime(Protocol):
    """A scorer's network on some engine."""

    @property
    def name(self) -> str:
        """onnxruntime or torch."""

    def run(self, crops: Pixels) -> Floats:
        """Aligned RGB crops uint8 [B, 3, 112, 112] to raw scores [B]."""


@dataclass(frozen=True)
class ScorerDescription:
    """What a scorer's numbers mean; ``digest`` is the SHA-256 of its weights."""

    scale: QualityScale
    licence: str
    description: str
    digest: str

    @classmethod
    def from_json(cls, values: Mapping[str, Any], digest: str, source: str) -> ScorerDescription:
        """From the object in config.json. Errors: ModelError."""
        try:
            return cls(QualityScale(**values["scale"]), values["licence"], values["description"], digest)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{source} does not describe a scorer ({type(error).__name__}: {error})") from error


class FaceQualityModel:
    """A ``VisionModel`` that answers ``{"faces": [{box, landmarks, quality, raw, status, ...}, ...], ...}``.

    Faces come largest first. No embedding is made, and nothing of an image is kept.
    """

    def __init__(self, name: str, description: ScorerDescription, runtime: ScorerRuntime) -> None:
        self.description, self.runtime = description, runtime
        self.info = ModelInfo(
            name, FACE_QUALITY, (), description.licence, FACE_SIZE, runtime.name, description.description,
            full_size=True,
        )  # fmt: skip

    def prepare(self, picture: Picture, options: Mapping[str, Any]) -> PreparedFaces:
        """Cut the faces out; the decoded image is not kept. Errors: ModelError for options that are not its own."""
        wanted = AssessmentOptions.from_json(options)
        if wanted.aligned:
            face = prepare_crop(picture.image)
            face.record["index"] = 0
            return PreparedFaces((face,), OK)
        if wanted.landmarks is None:
            return PreparedFaces((), LANDMARKS_MISSING)
        faces = [prepare_face(picture.image, landmarks) for landmarks in wanted.landmarks]
        for index, face in enumerate(faces):
            face.record["index"] = index  # the caller's order, since the answer has another
        faces.sort(key=lambda face: -area(face.record["box"]))
        return PreparedFaces(tuple(faces), OK if faces else NO_FACE)

    def predict(self, prepared: Sequence[PreparedFaces]) -> list[dict[str, Any]]:
        """Scores of every face of every image; all crops run as one batch."""
        crops = [face.crop for image in prepared for face in image.faces if face.crop is not None]
        scores = iter(self.runtime.run(np.stack(crops)).astype(np.float64).tolist() if crops else [])
        return [self._answer(image, [self._score(face, scores) for face in image.faces]) for image in prepared]

    def _score(self, face: PreparedFace, scores: Iterator[float]) -> dict[str, Any]:
        record = dict(face.record)
        if face.crop is None:
            return record
        raw = next(scores)
        quality = self.description.scale.quality(raw)
        if quality == FAILURE_TO_ASSESS:
            return failed(record, "failure_to_assess", "the network's answer is not a number")
        return record | {"quality": quality, "raw": round(raw, 6)}

    def _answer(self, image: PreparedFaces, faces: list[dict[str, Any]]) -> dict[str, Any]:
        for place, face in enumerate(faces):
            face["largest"] = place == 0
        scale = self.description.scale
        return {
            "status": image.status,
            "faces": faces,
            "count": len(faces),
            "scale": SCALE,
            "scale_map": {"midpoint": scale.midpoint, "width": scale.width},
            "alignment": ALIGNMENT,
            "model_sha256": self.description.digest,
        }

    def draw(self, image: Image.Image, answer: Mapping[str, Any]) -> Image.Image:
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


class OnnxScorer:
    """An exported scorer on ONNX Runtime."""

    name = "onnxruntime"

    def __init__(self, session: Any) -> None:
        self.session = session

    def run(self, crops: Pixels) -> Floats:
        """See ``ScorerRuntime``."""
        scores: Floats = self.session.run(["scores"], {"images": crops.astype(np.float32) / 255})[0]
        return scores


def load_onnx_scorer(file: Path, num_threads: int, name: str) -> FaceQualityModel:
    """A scorer from a file that ``vision.face_quality.export`` wrote. Errors: ModelError."""
    from vision.onnx_runtime import open_session

    session = open_session(file, num_threads)
    metadata = session.get_modelmeta().custom_metadata_map
    if FACE_QUALITY not in metadata:
        raise ModelError(f"{file} was not written by `dovetail export face-quality`: its description is missing")
    description = ScorerDescription.from_json(
        json.loads(metadata[FACE_QUALITY]), metadata.get("weights_sha256", ""), str(file)
    )
    return FaceQualityModel(name, description, OnnxScorer(session))


def load_scorer_folder(folder: Path, num_threads: int, name: str, use_onnx: bool) -> FaceQualityModel:
    """The scorer saved in ``folder``; on ONNX Runtime where ``use_onnx``, else in torch. Errors: ModelError."""
    if use_onnx:
        return load_onnx_scorer(folder / ONNX_FILE, num_threads, name)
    from vision.face_quality.predict import TorchScorer

    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with (folder / WEIGHTS_FILE).open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is no scorer: {error}") from error
    description = ScorerDescription.from_json(values, digest, str(folder))
    return FaceQualityModel(name, description, TorchScorer(folder, num_threads))
