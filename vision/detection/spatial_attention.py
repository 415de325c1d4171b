"""Spatial attention: what the proposal network saw re-weighs the map regions are read from.

ThunderNet, arXiv 1903.11752, section 3.3, figure 5.
"""

from __future__ import annotations

from torch import Tensor, nn


class SpatialAttention(nn.Module):
    """F_sam = F_cem * sigmoid(BN(W F_rpn)), W a 1x1 convolution without bias.

    F_rpn [N, rpn_channels, H, W] is the intermediate map of the proposal network, not its scores; F_cem and F_sam are
    [N, channels, H, W]. Gradients flow through both factors, so that the detection loss trains the proposal network
    too.
    """

    def __init__(self, rpn_channels: int = 256, channels: int = 245) -> None:
        super().__init__()
        self.project = nn.Conv2d(rpn_channels, channels, 1, bias=False)
        self.normalize = nn.BatchNorm2d(channels)
        nn.init.normal_(self.project.weight, std=0.01)

    def forward(self, f_cem: Tensor, f_rpn: Tensor) -> Tensor:
        """F_sam."""
        attended: Tensor = f_cem * self.normalize(self.project(f_rpn)).sigmoid()
        return attended
