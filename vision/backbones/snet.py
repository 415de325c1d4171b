"""SNet, the backbone of ThunderNet (Qin et al., arXiv 1903.11752, section 3.1).

ShuffleNetV2 with 5x5 depthwise filters, for a larger receptive field at hardly any cost, and with channels moved from
the late layers to the early ones: only the smallest keeps a last 1x1 convolution. The numbers in the names are the
paper's MFLOPs; the networks of its table count 51, 163 and 540 million multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vision.backbones.shufflenet_v2 import ShuffleNetV2, ShuffleNetV2Config


def snet_config(
    stage_channels: tuple[int, int, int], final_channels: int | None, stem_channels: int = 24, dropout: float = 0.0
) -> ShuffleNetV2Config:
    """5x5 depthwise filters, and a classifier without bias as in the authors' code. The stem stays 3x3."""
    return ShuffleNetV2Config(
        stage_channels, final_channels, stem_channels, kernel_size=5, head_bias=False, dropout=dropout
    )


class SNet(ShuffleNetV2):
    """ShuffleNetV2's skeleton with the widths of the paper's table 1."""

    variants: ClassVar[Mapping[str, ShuffleNetV2Config]] = {
        "snet49": snet_config((60, 120, 240), final_channels=512),
        "snet146": snet_config((132, 264, 528), final_channels=None),
        "snet535": snet_config((248, 496, 992), final_channels=None, stem_channels=48, dropout=0.2),
    }
