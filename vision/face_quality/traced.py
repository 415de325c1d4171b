"""A scorer with its normalisation, as it is exported; and the faces that tell an 8-bit export its ranges."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vision.data.classification import to_tensor
from vision.data.faces import DegradedFaces
from vision.data.image_sources import open_source
from vision.data.sources import InMemorySource
from vision.face_quality.alignment import FACE_SIZE
from vision.face_quality.checkpoint import load_scorer
from vision.face_quality.evaluate import spearman
from vision.face_quality.tinyfqnet import TinyFQNet, normalize_faces
from vision.serving.protocol import Outputs, Parity, Traced

TOLERANCE, INT8_TOLERANCE, INT8_SPEARMAN = 1e-4, 0.02, 0.995
CALIBRATION_COPIES = 6
MAX_CALIBRATION = 512


def calibration_faces(kind: str, root: Path, split: str) -> Tensor:
    """Photographs with defects, uint8 [N, 3, 112, 112]. Errors: DataError."""
    source = DegradedFaces(InMemorySource(open_source(kind, root, split)), CALIBRATION_COPIES)
    rows = np.linspace(0, len(source.labels), min(len(source.labels), MAX_CALIBRATION), endpoint=False)
    return torch.stack([to_tensor(source.read(int(row))) for row in rows])


class NormalizedScorer(nn.Module):
    """A scorer that takes plain RGB faces in [0, 1]."""

    def __init__(self, model: TinyFQNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, 112, 112] in [0, 1] -> scores [B]."""
        scores: Tensor = self.model(normalize_faces(images))
        return scores


def trace_scorer(checkpoint: Path) -> Traced:
    """The scorer saved in ``checkpoint`` as it is exported. Errors: CheckpointError."""
    model, config = load_scorer(checkpoint)
    generator = torch.Generator().manual_seed(0)
    return Traced(
        module=NormalizedScorer(model).eval(),
        outputs=("scores",),
        image_size=FACE_SIZE,
        config=dataclasses.asdict(config),
        compare=lambda pairs: compare(pairs, "fp32"),
        images=lambda count: torch.rand(count, 3, FACE_SIZE, FACE_SIZE, generator=generator),
        compare_int8=lambda pairs: compare(pairs, "int8"),
    )


def compare(pairs: Sequence[tuple[Outputs, Outputs]], precision: str) -> Parity:
    """The file's scores against torch's; with 8 bits their ranks as well."""
    expected, found = (np.concatenate([pair[side][0] for pair in pairs]).astype(np.float64) for side in range(2))
    differences = np.abs(expected - found)
    largest = float(differences.max())
    correlation = spearman(expected, found) if precision == "int8" else None
    figures: dict[str, float | int | str | None] = {
        "precision": precision, "max_difference": largest, "mean_difference": float(differences.mean()),
        "spearman": correlation, "faces": len(expected),
    }  # fmt: skip
    tolerance = TOLERANCE if precision == "fp32" else INT8_TOLERANCE
    if largest <= tolerance and (correlation is None or correlation >= INT8_SPEARMAN):
        return Parity(figures)
    ranks = "" if correlation is None else f", rank correlation {correlation:.4f} (allowed {INT8_SPEARMAN})"
    return Parity(figures, f"answered {largest:.2g} apart from torch (allowed {tolerance:g}){ranks}")
