"""How useful a face image is for recognition: the network, its labels, alignment, scale and evaluation."""

from vision.face_quality.alignment import LandmarkError, align_face, fit_similarity, inter_eye_distance
from vision.face_quality.labels import LabelInputError, QualityLabels, balancing_weights, quality_labels
from vision.face_quality.pooling import pool_template
from vision.face_quality.scale import FAILURE_TO_ASSESS, QualityScale
from vision.face_quality.tinyfqnet import TinyFQNet

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
