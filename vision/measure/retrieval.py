"""Retrieval: how well a network's embeddings find other images of the same identity.

Every image is a query once and all others are the gallery, the protocol for data without query and gallery splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from vision.backbones.backbone import Backbone
from vision.backbones.checkpoint import load_backbone
from vision.data.classification import ClassificationData
from vision.data.image_sources import open_source
from vision.data.sources import DataError
from vision.measure.classification import default_device, keep_skipped


@dataclass(frozen=True)
class RetrievalReport:
    """``rank1``: share of queries whose nearest image shows the same identity; ``mean_average_precision`` over queries.

    ``queries`` counts images whose identity has another image; ``skipped`` names what could not be read.
    """

    rank1: float
    mean_average_precision: float
    queries: int
    identities: int
    skipped: tuple[str, ...] = ()


def retrieval_figures(embeddings: Tensor, identities: Tensor) -> RetrievalReport:
    """Rank by cosine: ``embeddings`` [N, D] of any length, ``identities`` [N].

    Average precision is the mean, over the right images of a query, of the precision at their ranks. Errors: DataError
    where no identity has two images.
    """
    points = functional.normalize(embeddings.double())
    similarity = points @ points.T
    similarity.fill_diagonal_(-torch.inf)
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, :-1]
    right = (identities[order] == identities[:, None]).double()
    wanted = right.sum(dim=1)
    answerable = wanted > 0
    if not answerable.any():
        raise DataError(f"none of the {len(identities)} images has a partner of its identity; retrieval needs pairs")
    ranks = torch.arange(1, right.shape[1] + 1, dtype=torch.float64)
    precision = right.cumsum(dim=1) / ranks
    average = (precision * right).sum(dim=1)[answerable] / wanted[answerable]
    return RetrievalReport(
        rank1=float(right[answerable, 0].mean()),
        mean_average_precision=float(average.mean()),
        queries=int(answerable.sum()),
        identities=len(set(identities.tolist())),
    )


@torch.no_grad()
def embed_all(
    model: Backbone, data: ClassificationData, batch_size: int = 64
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Embeddings [N, D], labels [N] of every readable image, and the reasons of the others."""
    device = model.head.weight.device
    model.eval()
    points: list[Tensor] = []
    labels: list[Tensor] = []
    skipped: list[str] = []
    for images, of_images, reasons in DataLoader(data, batch_size, collate_fn=keep_skipped):
        skipped += reasons
        if len(of_images):
            points.append(model.embed(model.normalization(images.to(device).float() / 255)).cpu())
            labels.append(of_images)
    if not points:
        raise DataError(f"none of the {len(data)} images can be read; the first: {skipped[0]}")
    return torch.cat(points), torch.cat(labels), tuple(skipped)


def evaluate_retrieval(checkpoint: Path, kind: str, root: Path, split: str, *, batch_size: int = 64) -> RetrievalReport:
    """Measure a saved backbone on identities it need not know. Errors: CheckpointError, DataError."""
    model = load_backbone(checkpoint).to(default_device())
    source = open_source(kind, root, split)
    points, identities, skipped = embed_all(model, ClassificationData(source, model.preprocessing), batch_size)
    report = retrieval_figures(points, identities)
    return RetrievalReport(report.rank1, report.mean_average_precision, report.queries, report.identities, skipped)
