"""FD-MobileNet (Qin et al., arXiv 1802.03750): MobileNet's blocks, but stride 32 is reached with half of the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vision.backbones.mobilenet import WIDTHS, MobileNet, MobileNetConfig


class FDMobileNet(MobileNet):
    """Fast downsampling: four of the first six blocks have stride 2, and most of the work is done on the last map."""

    blocks_table: ClassVar[tuple[tuple[int, int], ...]] = (
        (64, 2),
        *((128, 2), (128, 1)),
        *((256, 2), (256, 1)),
        *((512, 2), (512, 1), (512, 1), (512, 1), (512, 1)),
        (1024, 1),
    )
    variants: ClassVar[Mapping[str, MobileNetConfig]] = {
        f"fd_mobilenet_{suffix}": MobileNetConfig(width) for suffix, width in WIDTHS
    }
