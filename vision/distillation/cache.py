"""A teacher's answers, kept: asked once for each image, and read back by every run that trains on the same images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vision.data.classification import ClassificationData, Sample, Skipped, collate, spread
from vision.distillation.teacher import Teacher

# Images whose pixels go into a data set's fingerprint; the labels of all do.
SAMPLED_IMAGES = 16


@dataclass(frozen=True)
class TaughtSample:
    """A sample (or why there is none) with the teacher's logits [C] and embedding [D]."""

    sample: Sample | Skipped
    logits: Tensor
    embedding: Tensor


class TaughtData(Dataset[TaughtSample]):
    """Images with the teacher's answers. Chance plays no part: the data must not be augmented."""

    def __init__(self, data: ClassificationData, logits: Tensor, embedding: Tensor) -> None:
        self.data, self.logits, self.embedding = data, logits, embedding

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> TaughtSample:
        return TaughtSample(self.data[position], self.logits[position], self.embedding[position])


def collate_taught(samples: Sequence[TaughtSample]) -> dict[str, Tensor]:
    """``collate`` of the samples, with ``teacher_logits`` and ``teacher_embedding`` of those that could be read."""
    batch = collate([taught.sample for taught in samples])
    kept = [taught for taught in samples if isinstance(taught.sample, Sample)]
    batch["teacher_logits"] = torch.stack([taught.logits for taught in kept])
    batch["teacher_embedding"] = torch.stack([taught.embedding for taught in kept])
    return batch


def with_answers(data: ClassificationData, teacher: Teacher, folder: Path, batch_size: int) -> TaughtData:
    """``data`` with the teacher's answers, from ``folder`` where it was asked for these images before.

    The file is named by the teacher's weights and the images, so that studies may share the folder.
    """
    file = folder / f"{teacher.fingerprint()}-{fingerprint(data)}.safetensors"
    if file.is_file():
        kept = load_file(file)
        return TaughtData(data, kept["logits"], kept["embedding"])
    logits, embedding = ask_all(data, teacher, batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed when whole: a killed run leaves no half file, and two runs at once do no harm.
    half = file.with_name(f"{file.name}.{os.getpid()}")
    save_file({"logits": logits, "embedding": embedding}, half)
    os.replace(half, file)
    return TaughtData(data, logits, embedding)


def fingerprint(data: ClassificationData) -> str:
    """A digest of how the images are shown, of all labels, and of the pixels of some images over the whole set."""
    digest = hashlib.sha256(repr(data.preprocessing).encode())
    digest.update(data.source.labels[data.indices].tobytes())
    for position in spread(len(data), SAMPLED_IMAGES):
        sample = data[int(position)]
        digest.update(sample.image.numpy().tobytes() if isinstance(sample, Sample) else b"unreadable")
    return digest.hexdigest()[:16]


def ask_all(data: ClassificationData, teacher: Teacher, batch_size: int) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and embeddings [N, D] of every image; what cannot be read answers zeros (and is never trained)."""
    logits: list[Tensor] = []
    embeddings: list[Tensor] = []
    for batch in DataLoader(data, batch_size, collate_fn=list):
        readable = torch.tensor([isinstance(sample, Sample) for sample in batch])
        if not readable.any():
            # The width of an answer is unknown until something could be read; an all-broken batch asks a grey image.
            images = torch.full((1, 3, *([data.preprocessing.image_size] * 2)), 127, dtype=torch.uint8)
        else:
            images = torch.stack([sample.image for sample in batch if isinstance(sample, Sample)])
        answers, points = teacher(images)
        logits.append(spread_rows(answers, readable))
        embeddings.append(spread_rows(points, readable))
    return torch.cat(logits), torch.cat(embeddings)


def spread_rows(rows: Tensor, present: Tensor) -> Tensor:
    """``rows`` at the places where ``present`` [B] is true, zeros elsewhere."""
    spread = torch.zeros(len(present), rows.shape[1])
    if present.any():
        spread[present] = rows.cpu()
    return spread
