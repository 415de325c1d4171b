"""Position-sensitive RoI align: each of the p x p bins of a region reads its own channel.

Li et al., "Light-Head R-CNN", arXiv 1711.07264, section 3.2, as ThunderNet uses it (arXiv 1903.11752, section 3.2).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["max", "mean"]


def psroi_align(
    features: Tensor,
    boxes: Tensor,
    image_ids: Tensor,
    stride: int = 16,
    bins: int = 7,
    samples: int = 2,
    reduction: Reduction = "max",
) -> Tensor:
    """Pool ``features`` [N, c * bins * bins, H, W] over ``boxes`` [K, 4]: [K, c, bins, bins].

    Output (k, c, i, j) reads channel (c * bins + i) * bins + j of image ``image_ids[k]`` alone, inside bin row i and
    column j of the box. A bin is read at samples x samples points by bilinear interpolation; nothing is rounded. A
    point more than one cell outside the map counts as 0, nearer ones are moved to the border.

    Boxes are pixels of the network's input; feature coordinates are pixels / ``stride`` - 0.5, the centre of cell 0
    being 0. That half cell is ours (ThunderNet's own operator leaves it out): it makes a box and its mirror image
    agree. ``reduction`` joins a bin's samples: "max" as ThunderNet's and Light-Head's operators do, "mean" as
    torchvision's. Weights trained with one do not fit the other.
    """
    num_images, channels, height, width = features.shape
    if channels % (bins * bins):
        raise ValueError(f"features have {channels} channels; {bins} x {bins} bins need a multiple of {bins * bins}")
    depth = channels // (bins * bins)
    # [c, (image, bin, cell)]: the c channels of a bin are read at the same places, the long dimension is contiguous.
    columns = features.reshape(num_images, depth, bins * bins * height * width).transpose(0, 1).reshape(depth, -1)
    y_cells, y_weights = axis_samples(boxes[:, 1], boxes[:, 3], height, stride, bins, samples)
    x_cells, x_weights = axis_samples(boxes[:, 0], boxes[:, 2], width, stride, bins, samples)

    # Places are [K, i, sample y, j, sample x].
    bin_ids = torch.arange(bins * bins, device=boxes.device).view(1, bins, 1, bins, 1)
    first_column = (image_ids.view(-1, 1, 1, 1, 1) * bins * bins + bin_ids) * (height * width)
    sampled = features.new_zeros(())
    for y in range(2):
        for x in range(2):
            places = first_column + y_cells[y][:, :, :, None, None] * width + x_cells[x][:, None, None, :, :]
            weights = y_weights[y][:, :, :, None, None] * x_weights[x][:, None, None, :, :]
            values = columns.index_select(1, places.flatten()).view(depth, *places.shape)
            sampled = sampled + values * weights.to(values.dtype)
    pooled = sampled.amax(dim=(3, 5)) if reduction == "max" else sampled.mean(dim=(3, 5))
    return pooled.transpose(0, 1)


def axis_samples(
    low: Tensor, high: Tensor, size: int, stride: int, bins: int, samples: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Along one axis: the two cells each sample point lies between and their weights, each [K, bins, samples]."""
    start = low / stride - 0.5
    bin_size = (high - low) / (stride * bins)
    offsets = (torch.arange(samples, device=low.device, dtype=low.dtype) + 0.5) / samples
    steps = torch.arange(bins, device=low.device, dtype=low.dtype)[:, None] + offsets
    points = start[:, None, None] + steps * bin_size[:, None, None]
    inside = (points >= -1) & (points <= size)
    points = points.clamp(0, size - 1)
    before = points.floor().long()
    after = (before + 1).clamp(max=size - 1)
    fraction = points - before
    return (before, after), ((1 - fraction) * inside, fraction * inside)
