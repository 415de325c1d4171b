"""Faces with their quality labels: every photograph with its defects, judged once by a recogniser, kept in a file."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vision.data.classification import to_tensor
from vision.data.faces import DegradedFaces
from vision.data.sources import DataError, UnreadableImageError
from vision.face_quality.labels import LabelInputError, QualityLabels, quality_labels, ranks_within
from vision.face_quality.recognition import Recogniser

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelOptions:
    """How labels are made of features; see ``quality_labels``. ``batch_size`` faces are embedded at once.

    ``subtract_mean`` takes the mean feature of all faces off first (ours): features behind a ReLU are all positive, so
    that every cosine is near 1 and labels hardly differ. Networks of the ArcFace family do not need it.
    ``rank_within_identity`` makes the label the rank among the person's images instead of the cosine; see
    ``ranks_within``.
    """

    leave_one_out: bool = True
    reweightings: int = 1
    min_images: int = 10
    min_raw: float = 0.05
    subtract_mean: bool = False
    rank_within_identity: bool = False
    balance_power: float = 0.5
    max_oversampling: float = 10.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.reweightings < 0 or self.batch_size < 1 or self.max_oversampling < 1 or self.balance_power < 0:
            raise LabelInputError(
                "[labels] reweightings and balance_power must be at least 0, batch_size and max_oversampling at least 1"
            )


@dataclass(frozen=True)
class LabelledFaces:
    """``faces`` with the recogniser's ``features`` [N, D] (zeros where an image cannot be read) and the labels."""

    faces: DegradedFaces
    features: Tensor
    labels: QualityLabels
    skipped: tuple[str, ...]

    @property
    def usable(self) -> Tensor:
        """Indices of the images that may train."""
        return torch.nonzero(self.labels.usable).squeeze(1)


def label_faces(
    faces: DegradedFaces, recogniser: Recogniser, options: LabelOptions, kept: Path | None = None
) -> LabelledFaces:
    """Judge every image. ``kept`` is a folder whose files keep the features, each for one recogniser and these faces.

    Errors: DataError where no image can be read.
    """
    metadata = {"recogniser": recogniser.digest, "faces": faces_digest(faces)}
    file = None if kept is None else kept / f"features_{text_digest(str(metadata))[:16]}.safetensors"
    features = read_features(file, metadata)
    skipped: tuple[str, ...] = ()
    if features is None:
        features, skipped = embed_faces(faces, recogniser, options.batch_size)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"features": features}, file, metadata)
    return LabelledFaces(faces, features, label_readable(features, torch.from_numpy(faces.labels), options), skipped)


def label_readable(features: Tensor, identities: Tensor, options: LabelOptions) -> QualityLabels:
    """Labels of the images that have a feature; the others get 0 and are not usable."""
    readable = features.norm(dim=1) > 0
    if not readable.any():
        raise DataError(f"none of the {len(features)} faces can be read")
    known = features[readable]
    found = quality_labels(
        known - known.mean(dim=0) if options.subtract_mean else known,
        identities[readable],
        options.leave_one_out,
        options.reweightings,
        options.min_images,
        options.min_raw,
    )
    labels = ranks_within(found.raw, identities[readable]) if options.rank_within_identity else found.labels
    raw, targets = torch.zeros(len(features)), torch.zeros(len(features))
    usable = torch.zeros(len(features), dtype=torch.bool)
    raw[readable], targets[readable], usable[readable] = found.raw.float(), labels.float(), found.usable
    return QualityLabels(raw, targets, usable)


def embed_faces(faces: DegradedFaces, recogniser: Recogniser, batch_size: int) -> tuple[Tensor, tuple[str, ...]]:
    """Features [N, D] of every image, zeros where one cannot be read, and why not."""
    rows: list[Tensor] = []
    places: list[int] = []
    skipped: list[str] = []
    for start in range(0, len(faces.labels), batch_size):
        batch = []
        for index in range(start, min(start + batch_size, len(faces.labels))):
            try:
                batch.append(to_tensor(faces.read(index)))
                places.append(index)
            except UnreadableImageError as error:
                logger.warning("skipped: %s", error)
                skipped.append(str(error))
        if batch:
            rows.append(recogniser.embed(torch.stack(batch)))
    if not rows:
        raise DataError(f"none of the {len(faces.labels)} faces can be read; the first: {skipped[0]}")
    found = torch.cat(rows)
    features = torch.zeros(len(faces.labels), found.shape[1])
    features[torch.tensor(places)] = found.float()
    return features, tuple(skipped)


def read_features(file: Path | None, metadata: dict[str, str]) -> Tensor | None:
    """Kept features, None where there are none of this recogniser for these faces."""
    if file is None or not file.is_file():
        return None
    with safe_open(file, "pt") as opened:
        if opened.metadata() == metadata:
            return load_file(file)["features"]
    logger.warning("%s holds another recogniser's or other faces' features and is written anew", file)
    return None


def faces_digest(faces: DegradedFaces) -> str:
    """What of the faces decides their features: people, copies, seed and the photographs' count."""
    return text_digest(f"{faces.class_names} {faces.labels.tolist()} {faces.copies} {faces.seed}")


def text_digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def label_rule(options: LabelOptions, recogniser: Recogniser) -> dict[str, object]:
    """For a scorer's description: by whom and how its labels were made."""
    return {"recogniser": recogniser.name, "recogniser_sha256": recogniser.digest, **asdict(options)}
