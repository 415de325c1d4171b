"""How useful a face image is for recognition: the network, its labels, alignment, scale and evaluation.

Names are imported when first used: alignment and scale serve without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision.face_quality.alignment import LandmarkError, align_face, fit_similarity, inter_eye_distance
    from vision.face_quality.labels import LabelInputError, QualityLabels, balancing_weights, quality_labels
    from vision.face_quality.pooling import pool_template
    from vision.face_quality.scale import FAILURE_TO_ASSESS, QualityScale
    from vision.face_quality.tinyfqnet import TinyFQNet

MODULES = {
    "alignment": ("LandmarkError", "align_face", "fit_similarity", "inter_eye_distance"),
    "labels": ("LabelInputError", "QualityLabels", "balancing_weights", "quality_labels"),
    "pooling": ("pool_template",),
    "scale": ("FAILURE_TO_ASSESS", "QualityScale"),
    "tinyfqnet": ("TinyFQNet",),
}

__all__ = [
    "FAILURE_TO_ASSESS",
    "LabelInputError",
    "LandmarkError",
    "QualityLabels",
    "QualityScale",
    "TinyFQNet",
    "align_face",
    "balancing_weights",
    "fit_similarity",
    "inter_eye_distance",
    "pool_template",
    "quality_labels",
]


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
