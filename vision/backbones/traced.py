"""A classifier with its normalisation, as it is exported."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from vision.backbones.backbone import Backbone
from vision.backbones.checkpoint import describe, load_backbone
from vision.serving.protocol import Traced, close_logits

TOLERANCE = 1e-4


class NormalizedClassifier(nn.Module):
    """A backbone that takes plain RGB images in [0, 1]: the normalisation travels inside the exported file."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> logits [B, classes]."""
        logits: Tensor = self.model(self.model.normalization(images))
        return logits


def trace_classifier(checkpoint: Path, image_size: int | None = None) -> Traced:
    """The classifier saved in ``checkpoint`` as it is exported, at its own size or another. Errors: CheckpointError."""
    backbone = load_backbone(checkpoint)
    side = image_size or backbone.preprocessing.image_size
    generator = torch.Generator().manual_seed(0)
    return Traced(
        module=NormalizedClassifier(backbone).eval(),
        outputs=("logits",),
        image_size=side,
        config=describe(backbone),
        compare=close_logits(TOLERANCE),
        images=lambda count: torch.rand(count, 3, side, side, generator=generator),
        metadata={
            "class_names": json.dumps(backbone.class_names),
            "backbone": backbone.name,
            "resize": str(backbone.preprocessing.resize),
        },
    )
