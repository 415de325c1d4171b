"""A bare chain of convolutions: students and teachers of studies that need hundreds of trainings on a small machine.

Ours; no paper describes it and no weights of it are shipped. It has nothing that a compact network is made of
(depthwise filters, shuffles, residuals), so that what a study finds is about the loss and not about a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vision.backbones.backbone import Backbone, ConfigurationError, FeatureMaps
from vision.backbones.layers import conv_bn_relu


@dataclass(frozen=True)
class PlainConfig:
    """``width`` is the channel count of the first layer; the last three have four times as many."""

    width: int

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigurationError(f"width is {self.width}; it must be at least 1")


class Plain(Backbone):
    """Five 3x3 convolutions of stride 2, each with batch normalisation and ReLU."""

    config_type = PlainConfig
    variants: ClassVar[Mapping[str, PlainConfig]] = {f"plain_w{width}": PlainConfig(width) for width in (6, 12, 32)}

    def __init__(self, config: PlainConfig, num_classes: int = 1000) -> None:
        super().__init__(config, num_classes)
        widths = [3, config.width, 2 * config.width, *[4 * config.width] * 3]
        self.layers = nn.ModuleList(
            conv_bn_relu(before, after, 3, stride=2) for before, after in itertools.pairwise(widths)
        )
        self.feature_channels = (widths[3], widths[4], widths[5])
        self.head = nn.Linear(widths[-1], num_classes)

    def stage_maps(self, images: Tensor) -> FeatureMaps:
        """Outputs of the last three layers."""
        maps = []
        for layer in self.layers:
            images = layer(images)
            maps.append(images)
        return maps[2], maps[3], maps[4]

    def rename_author_key(self, key: str) -> str:
        """There are no authors: a checkpoint's names are ours."""
        return key
