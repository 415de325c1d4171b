"""Exported detectors on ONNX Runtime, with Soft-NMS behind the network in numpy. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vision.detect import Candidates, Detector, DetectorDescription, Floats, Pixels
from vision.predict import ModelError

MIN_SOFT_NMS_SCORE = 1e-3
TAKEN = -1.0


class OnnxRuntime:
    """An exported detector on ONNX Runtime, with ``num_threads`` threads."""

    name = "onnxruntime"

    def __init__(self, session: Any, description: DetectorDescription) -> None:
        self.session = session
        self.description = description

    def run(self, images: Pixels, thresholds: Sequence[float]) -> list[Candidates]:
        """See ``Runtime``."""
        boxes, probabilities = self.session.run(None, {"images": images.astype(np.float32) / 255})
        description = self.description
        found = []
        for image_boxes, scores, threshold in zip(boxes, probabilities, thresholds, strict=True):
            rows, class_ids = np.nonzero(scores >= max(threshold, description.score_threshold))
            kept, kept_scores = soft_nms(
                image_boxes[rows],
                scores[rows, class_ids],
                class_ids,
                description.soft_nms_threshold,
                description.max_detections,
            )
            found.append(Candidates(image_boxes[rows[kept]], kept_scores, class_ids[kept]))
        return found


def soft_nms(
    boxes: Floats, scores: Floats, class_ids: NDArray[np.int64], threshold: float, max_kept: int
) -> tuple[NDArray[np.int64], Floats]:
    """``vision.detection.boxes.soft_nms``, linear and class by class, for the few boxes of one image, in numpy."""
    x1, y1, x2, y2 = boxes.T
    areas = np.maximum(x2 - x1, 0) * np.maximum(y2 - y1, 0)
    remaining = scores.copy()
    kept: list[int] = []
    kept_scores: list[float] = []
    while len(kept) < min(max_kept, len(boxes)):
        best = int(remaining.argmax())
        if remaining[best] < MIN_SOFT_NMS_SCORE:
            break
        kept.append(best)
        kept_scores.append(float(remaining[best]))
        width = np.minimum(x2, x2[best]) - np.maximum(x1, x1[best])
        height = np.minimum(y2, y2[best]) - np.maximum(y1, y1[best])
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        overlap = shared / np.maximum(areas + areas[best] - shared, np.finfo(np.float32).tiny)
        decays = (overlap >= threshold) & (class_ids == class_ids[best])
        remaining *= np.where(decays, 1 - overlap, 1)
        remaining[best] = TAKEN
    return np.array(kept, dtype=np.int64), np.array(kept_scores, dtype=np.float32)


def load_onnx(file: Path, num_threads: int, name: str) -> Detector:
    """A detector from a file that ``vision.detection.export`` wrote. Errors: ModelError."""
    session = open_session(file, num_threads)
    metadata = session.get_modelmeta().custom_metadata_map
    if "detector" not in metadata:
        raise ModelError(f"{file} was not written by `dovetail export detector`: its description is missing")
    description = DetectorDescription.from_json(json.loads(metadata["detector"]), str(file))
    return Detector(name, description, OnnxRuntime(session, description))


def open_session(file: Path, num_threads: int) -> Any:
    """An ONNX Runtime session on the CPU. Errors: ModelError."""
    if find_spec("onnxruntime") is None:
        raise ModelError(f"{file} needs onnxruntime: pip install 'dovetail-server[vision]'")
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf) as error:
        raise ModelError(f"{file} is no ONNX model this runtime takes: {error}") from error


def belongs_to(exported: Path, weights: Path) -> bool:
    """Whether the exported file was made from these weights, by the digest it carries; True where there are none."""
    if not weights.is_file():
        return True
    with weights.open("rb") as file:
        return read_metadata(exported).get("weights_sha256") == hashlib.file_digest(file, "sha256").hexdigest()


def read_metadata(file: Path) -> dict[str, str]:
    """What an exported file says of itself. Errors: ModelError."""
    metadata: dict[str, str] = open_session(file, 1).get_modelmeta().custom_metadata_map
    return metadata
