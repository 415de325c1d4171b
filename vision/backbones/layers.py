"""Pieces that several families are made of."""

from __future__ import annotations

from torch import Tensor, nn


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Convolution without bias, padded by half its kernel on every side, and its batch normalisation."""
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(out_channels)


def depthwise_bn(channels: int, kernel_size: int, stride: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """One filter for each channel, and its batch normalisation."""
    return conv_bn(channels, channels, kernel_size, stride, groups=channels)


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """The three that open and close most nets. ReLU is out of place throughout, so autograd may keep its input."""
    return nn.Sequential(*conv_bn(in_channels, out_channels, kernel_size, stride), nn.ReLU())


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of ``groups`` groups (ShuffleNet, arXiv 1707.01083, figure 1). [B, C, H, W] both ways."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, groups, channels // groups, height, width).transpose(1, 2).flatten(1, 2)
