"""Scorers run by torch, for ``vision.predict``: no export needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vision.face_quality.checkpoint import load_scorer
from vision.face_quality.tinyfqnet import normalize_faces


class TorchScorer:
    """A scorer's own forward pass; see ``vision.assess.ScorerRuntime``."""

    name = "torch"

    def __init__(self, folder: Path, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.model, _ = load_scorer(folder)

    @torch.inference_mode()
    def run(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Aligned RGB crops uint8 [B, 3, 112, 112] to raw scores [B]."""
        scores: NDArray[np.float32] = self.model(normalize_faces(torch.from_numpy(crops).float() / 255)).numpy()
        return scores
