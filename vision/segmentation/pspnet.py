"""PSPNet's pyramid pooling (Zhao et al., CVPR 2017, arXiv 1612.01105) on a compact backbone.

The paper's backbone is dilated to stride 8. Ours keep their strides, as published and as fast; the pyramid stands on
the last map, and a lateral 1x1 convolution brings the detail of stride 8 back. Both are ours.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from vision.backbones import create_backbone
from vision.backbones.backbone import Backbone
from vision.backbones.preprocessing import NORMALIZATIONS
from vision.serving.folder import (
    MALFORMED,
    SEGMENTER,
    WEIGHTS_FILE,
    CheckpointError,
    check_state,
    read_described,
    read_weights,
    save_folder,
)

BINS = (1, 2, 3, 6)


@dataclass(frozen=True)
class SegmenterConfig:
    """What rebuilds a segmenter: a registered backbone, its classes, the head's ``width``, the images' constants.

    Images are stretched to ``image_size`` pixels square.
    """

    backbone: str
    class_names: tuple[str, ...]
    width: int = 128
    normalization: str = "imagenet"
    image_size: int = 320


class PyramidPooling(nn.Module):
    """Means over 1x1, 2x2, 3x3 and 6x6 regions, each reduced to a quarter of the channels, beside the map itself."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        part = width // len(BINS)
        self.reduce = nn.ModuleList([conv_norm(channels, part, 1) for _ in BINS])
        self.merge = conv_norm(channels + part * len(BINS), width, 3)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, width, H, W]."""
        size = features.shape[2:]
        pooled = [
            functional.interpolate(reduce(functional.adaptive_avg_pool2d(features, bins)), size, mode="bilinear")
            for bins, reduce in zip(BINS, self.reduce, strict=True)
        ]
        merged: Tensor = self.merge(torch.cat([features, *pooled], dim=1))
        return merged


class Segmenter(nn.Module):
    """Backbone, pyramid pooling, and a classifier of every pixel at stride 8."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        if len(config.class_names) < 2:
            raise ValueError(f"{len(config.class_names)} classes; a segmenter tells at least two apart")
        if config.width % len(BINS):
            raise ValueError(f"width {config.width} must be a multiple of {len(BINS)}, the number of pooled maps")
        self.config = config
        self.backbone: Backbone = create_backbone(config.backbone, 1)
        # The classifier of images has no use here.
        self.backbone.head = nn.Identity()  # type: ignore[assignment]
        fine, _, coarse = self.backbone.feature_channels
        self.pyramid = PyramidPooling(coarse, config.width)
        self.lateral = conv_norm(fine, config.width, 1)
        self.smooth = conv_norm(config.width, config.width, 3)
        self.classify = nn.Conv2d(config.width, len(config.class_names), 1)

    def forward(self, images: Tensor) -> Tensor:
        """Bytes [B, 3, H, W] -> logits [B, classes, H / 8, W / 8], rounded up."""
        return self.answer(images)[0]

    def answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of ``forward``, and the pyramid's map pooled to an embedding [B, width]."""
        fine, _, coarse = self.backbone.forward_features(
            NORMALIZATIONS[self.config.normalization](images.float() / 255)
        )
        context = self.pyramid(coarse)
        merged = self.smooth(
            self.lateral(fine) + functional.interpolate(context, fine.shape[2:], mode="bilinear", align_corners=False)
        )
        logits: Tensor = self.classify(merged)
        return logits, context.mean((2, 3))


def conv_norm(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU; the size stays."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def save_segmenter(model: Segmenter, folder: Path) -> None:
    """Write weights and configuration into ``folder``."""
    config = {"format": SEGMENTER, "version": 1, "architecture": "pspnet", **dataclasses.asdict(model.config)}
    save_folder(folder, config, model.state_dict())


def load_segmenter(folder: Path) -> Segmenter:
    """The segmenter saved in ``folder``, in evaluation mode. Errors: CheckpointError."""
    config = read_described(folder, SEGMENTER, "segmenter; `dovetail train segmenter` writes one")
    try:
        del config["architecture"]
        model = Segmenter(SegmenterConfig(**{**config, "class_names": tuple(config["class_names"])}))
    except MALFORMED as error:
        raise CheckpointError(f"{folder} holds no segmenter ({type(error).__name__}: {error})") from error
    state = read_weights(folder / WEIGHTS_FILE)
    check_state(model.state_dict(), state, source=str(folder), network=f"pspnet on {model.config.backbone}")
    model.load_state_dict(state)
    return model.eval()
