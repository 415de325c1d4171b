"""A segmenter on images in [0, 1], as it is served and exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from vision.segmentation.pspnet import Segmenter, load_segmenter
from vision.serving.folder import SEGMENTER
from vision.serving.protocol import Traced, close_logits

TOLERANCE = 1e-3


class UnitSegmenter(nn.Module):
    """A segmenter that takes plain RGB images in [0, 1]."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> logits [B, classes, H / 8, W / 8]."""
        logits: Tensor = self.model(images * 255)
        return logits


def trace_segmenter(checkpoint: Path, image_size: int | None = None) -> Traced:
    """The segmenter saved in ``checkpoint`` as it is exported, at its own size or another. Errors: CheckpointError."""
    model = load_segmenter(checkpoint)
    side = image_size or model.config.image_size
    generator = torch.Generator().manual_seed(0)
    return Traced(
        module=UnitSegmenter(model).eval(),
        outputs=("logits",),
        image_size=side,
        config={"format": SEGMENTER, **dataclasses.asdict(model.config), "image_size": side},
        compare=close_logits(TOLERANCE),
        images=lambda count: torch.rand(count, 3, side, side, generator=generator),
    )
