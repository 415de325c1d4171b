"""Depthwise convolution in its obvious form, and the weights of its refactorisation, in plain torch.

Letters of the shapes: B images, C channels, k kernel side, m channels per group of the grouped convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Every channel with its own filter, as the sum over the filter's taps of shifted images.

    ``x`` [B, C, H, W], ``weight`` [C, 1, k, k] -> [B, C, H', W'] with H' = (H + 2 padding - k) // stride + 1.
    """
    k = weight.shape[-1]
    height, width = ((side + 2 * padding - k) // stride + 1 for side in x.shape[2:])
    padded = F.pad(x, (padding,) * 4)
    total = x.new_zeros(*x.shape[:2], height, width)
    for i in range(k):
        for j in range(k):
            rows = slice(i, i + (height - 1) * stride + 1, stride)
            columns = slice(j, j + (width - 1) * stride + 1, stride)
            total = total + weight[:, 0, i, j, None, None] * padded[:, :, rows, columns]
    return total


def diagonal_mask(channels: int, channels_per_group: int) -> Tensor:
    """Where the grouped weight may be other than zero: [C, m, 1, 1], one at [c, c mod m]."""
    places = torch.arange(channels) % channels_per_group
    return F.one_hot(places, channels_per_group)[:, :, None, None]


def expand_weight(weight: Tensor, channels_per_group: int) -> Tensor:
    """Weight of the grouped convolution that equals a depthwise one: the filters on the diagonal of each group.

    ``weight`` [C, 1, k, k] -> [C, m, k, k], zero but for [c, c mod m] = weight[c]; m must divide C (arXiv
    1803.09926). The backward pass reads the diagonal back, so the gradient keeps the compact shape.
    """
    channels, _, *kernel = weight.shape
    groups = weight.reshape(channels // channels_per_group, channels_per_group, *kernel)
    diagonal = torch.diag_embed(groups.permute(0, 2, 3, 1))
    return diagonal.permute(0, 3, 4, 1, 2).reshape(channels, channels_per_group, *kernel)


def compact_weight(expanded: Tensor) -> Tensor:
    """The inverse of ``expand_weight``: the diagonals of [C, m, k, k] as [C, 1, k, k]."""
    channels, channels_per_group = expanded.shape[:2]
    rows = torch.arange(channels, device=expanded.device)
    return expanded[rows, rows % channels_per_group].unsqueeze(1)
