"""MobileNetV1 (Howard et al., arXiv 1704.04861)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vision.backbones.backbone import Backbone, ConfigurationError, FeatureMaps
from vision.backbones.layers import conv_bn, conv_bn_relu, depthwise_bn

STEM_CHANNELS = 32
WIDTHS = (("x1_0", 1.0), ("x0_75", 0.75), ("x0_5", 0.5), ("x0_25", 0.25))


@dataclass(frozen=True)
class MobileNetConfig:
    """``width`` scales every channel count (the paper's alpha), rounded down."""

    width: float = 1.0

    def __post_init__(self) -> None:
        if int(STEM_CHANNELS * self.width) < 1:
            raise ConfigurationError(f"width is {self.width}; it must leave the stem at least one channel")


def separable_block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Depthwise 3x3 and pointwise convolution, each with batch normalisation and ReLU (figure 3, right)."""
    return nn.Sequential(
        *depthwise_bn(in_channels, 3, stride), nn.ReLU(), *conv_bn(in_channels, out_channels, 1), nn.ReLU()
    )


class MobileNet(Backbone):
    """A stem and a straight chain of separable blocks: no pooling before the head, no residuals.

    ``blocks_table`` lists (output channels, stride) of the blocks at width 1. The paper's table 1 prints stride 2 for
    the last depthwise layer, a misprint: its input and output are both 7x7.
    """

    config_type = MobileNetConfig
    blocks_table: ClassVar[tuple[tuple[int, int], ...]] = (
        (64, 1),
        *((128, 2), (128, 1)),
        *((256, 2), (256, 1)),
        *((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
        *((1024, 2), (1024, 1)),
    )
    variants: ClassVar[Mapping[str, MobileNetConfig]] = {
        # The narrowest has the cost of FD-MobileNet at 0.25.
        f"mobilenet_v1_{suffix}": MobileNetConfig(width)
        for suffix, width in (*WIDTHS, ("x0_125", 0.125))
    }

    def __init__(self, config: MobileNetConfig, num_classes: int = 1000) -> None:
        super().__init__(config, num_classes)
        channels, stride = int(STEM_CHANNELS * config.width), 2
        self.stem = conv_bn_relu(3, channels, 3, stride=2)
        self.blocks = nn.ModuleList()
        self.last_block_of_stride: dict[int, int] = {}
        channels_of_stride: dict[int, int] = {}
        for index, (out_channels, block_stride) in enumerate(self.blocks_table):
            scaled = int(out_channels * config.width)
            self.blocks.append(separable_block(channels, scaled, block_stride))
            channels, stride = scaled, stride * block_stride
            self.last_block_of_stride[stride] = index
            channels_of_stride[stride] = channels
        self.feature_channels = (channels_of_stride[8], channels_of_stride[16], channels_of_stride[32])
        self.head = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """FD-MobileNet's code as it ran: Kaiming over the inputs for depthwise, over the outputs for pointwise layers
        and the head; the stem keeps torch's own initialisation. The head always has the deviation of the authors' 1000
        classes: over ten outputs the formula gives ten times that, and logits too large to train.
        """
        for block in self.blocks:
            depthwise, pointwise = (layer for layer in block.children() if isinstance(layer, nn.Conv2d))
            nn.init.kaiming_normal_(depthwise.weight, mode="fan_in")
            nn.init.kaiming_normal_(pointwise.weight, mode="fan_out")
        nn.init.normal_(self.head.weight, 0.0, (2 / 1000) ** 0.5)
        nn.init.zeros_(self.head.bias)

    def stage_maps(self, images: Tensor) -> FeatureMaps:
        """Outputs of the last block at each stride."""
        x = self.stem(images)
        outputs: list[Tensor] = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        stride8, stride16, stride32 = (outputs[self.last_block_of_stride[stride]] for stride in self.feature_strides)
        return stride8, stride16, stride32

    def rename_author_key(self, key: str) -> str:
        """FD-MobileNet's layout: one flat sequence of ``features.dw_conv_N``, ``dw_norm_N``, ``pw_conv_N``, ..."""
        places = {"dw_conv": 0, "dw_norm": 1, "pw_conv": 3, "pw_norm": 4}
        key = re.sub(r"^features\.([dp]w_(?:conv|norm))_(\d+)\.", lambda m: f"blocks.{m[2]}.{places[m[1]]}.", key)
        for theirs, ours in (
            ("features.conv_0.", "stem.0."),
            ("features.norm_0.", "stem.1."),
            ("classifier.", "head."),
        ):
            key = key.replace(theirs, ours)
        return key
