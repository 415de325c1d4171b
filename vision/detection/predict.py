"""Detectors run by torch, for ``vision.predict``: any architecture, no export needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vision.detect import Candidates, Detector, DetectorDescription
from vision.detection.checkpoint import load_detector
from vision.detection.detector import LoadedDetector


class TorchRuntime:
    """A detector's own forward pass; its test-time thresholds hold, so lower ones change nothing."""

    name = "torch"

    def __init__(self, loaded: LoadedDetector) -> None:
        self.loaded = loaded

    @torch.inference_mode()
    def run(self, images: NDArray[np.uint8], thresholds: Sequence[float]) -> list[Candidates]:
        """Candidates of RGB images uint8 [B, 3, S, S]; see ``vision.detect.Runtime``."""
        batch = torch.from_numpy(images).float() / 255
        found = self.loaded.model(self.loaded.config.normalization(batch))
        answers = []
        for detections, threshold in zip(found, thresholds, strict=True):
            wanted = detections.scores >= threshold
            kept = (part[wanted].numpy() for part in (detections.boxes, detections.scores, detections.class_ids))
            answers.append(Candidates(*kept))
        return answers


def load_torch(folder: Path, num_threads: int, name: str) -> Detector:
    """The detector saved in ``folder``, run by torch with ``num_threads`` threads. Errors: CheckpointError."""
    torch.set_num_threads(num_threads)
    loaded = load_detector(folder)
    description = DetectorDescription.from_json(dataclasses.asdict(loaded.config), str(folder))
    return Detector(name, description, TorchRuntime(loaded))
