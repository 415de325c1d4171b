"""A teacher's answers, kept: asked once for each image, written beside the run, read back when it is resumed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vision.data.classification import ClassificationData, Sample, Skipped, collate
from vision.distillation.teacher import Teacher

logger = logging.getLogger(__name__)

CACHE_FILE = "teacher.safetensors"


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
    """``data`` with the teacher's answers, from ``folder`` where they are this teacher's to this many images."""
    file, fingerprint = folder / CACHE_FILE, teacher.fingerprint()
    if file.is_file():
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        if metadata == {"teacher": fingerprint, "images": str(len(data))}:
            kept = load_file(file)
            return TaughtData(data, kept["logits"], kept["embedding"])
        logger.warning("%s holds another teacher's answers and is written anew", file)
    logits, embedding = ask_all(data, teacher, batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"teacher": fingerprint, "images": str(len(data))}
    save_file({"logits": logits, "embedding": embedding}, file, metadata)
    return TaughtData(data, logits, embedding)


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
