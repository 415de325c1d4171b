"""Position-sensitive RoI align against a loop over every output, bin and sample."""

import math

import pytest
import torch

from vision.detection.psroi_align import psroi_align


def slow_bilinear(plane, y, x):
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = plane[top, left] * (1 - (x - left)) + plane[top, right] * (x - left)
    lower = plane[bottom, left] * (1 - (x - left)) + plane[bottom, right] * (x - left)
    return float(upper * (1 - (y - top)) + lower * (y - top))


def slow_psroi_align(features, boxes, image_ids, stride, bins, samples, reduction):
    depth = features.shape[1] // bins**2
    pooled = torch.zeros(len(boxes), depth, bins, bins, dtype=features.dtype)
    for k, (x1, y1, x2, y2) in enumerate((boxes / stride).tolist()):
        for c in range(depth):
            for i in range(bins):
                for j in range(bins):
                    plane = features[image_ids[k], (c * bins + i) * bins + j]
                    values = [
                        slow_bilinear(
                            plane,
                            y1 - 0.5 + (i + (sy + 0.5) / samples) * (y2 - y1) / bins,
                            x1 - 0.5 + (j + (sx + 0.5) / samples) * (x2 - x1) / bins,
                        )
                        for sy in range(samples)
                        for sx in range(samples)
                    ]
                    pooled[k, c, i, j] = max(values) if reduction == "max" else sum(values) / len(values)
    return pooled


BOXES = torch.tensor(
    [
        [10.0, 20.0, 70.0, 50.0],
        [0.0, 0.0, 96.0, 64.0],
        [-40.0, -30.0, 30.0, 25.0],
        [80.0, 50.0, 150.0, 110.0],
        [33.3, 17.1, 34.0, 18.0],
        [400.0, 400.0, 500.0, 500.0],
    ],
    dtype=torch.float64,
)
IMAGE_IDS = torch.tensor([0, 1, 0, 1, 1, 0])


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize(("bins", "samples"), [(3, 2), (2, 1), (7, 3)])
def test_equals_the_loop(bins, samples, reduction):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 2 * bins**2, 4, 6, generator=generator, dtype=torch.float64)
    arguments = (features, BOXES, IMAGE_IDS, 16, bins, samples, reduction)
    fast, slow = psroi_align(*arguments), slow_psroi_align(*arguments)
    torch.testing.assert_close(fast, slow)
    assert slow[:5].abs().amax(dim=(1, 2, 3)).min() > 0
    assert slow[5].abs().max() == 0


def test_memory_layout_does_not_matter():
    features = torch.randn(2, 18, 4, 6, generator=torch.Generator().manual_seed(0))
    boxes = BOXES.float()
    expected = psroi_align(features, boxes, IMAGE_IDS, bins=3)
    channels_last = features.contiguous(memory_format=torch.channels_last)
    assert torch.equal(psroi_align(channels_last, boxes, IMAGE_IDS, bins=3), expected)


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_each_bin_reads_its_own_channel(reduction):
    features = torch.arange(245.0).view(1, 245, 1, 1).expand(1, 245, 20, 20)
    pooled = psroi_align(features, torch.tensor([[64.0, 80, 200, 240]]), torch.tensor([0]), reduction=reduction)
    torch.testing.assert_close(pooled, torch.arange(245.0).view(1, 5, 7, 7), rtol=1e-5, atol=0)


def test_a_box_and_its_mirror_image_agree():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 1, 6, 6, generator=generator).repeat(1, 9, 1, 1)
    box = torch.tensor([[10.0, 20, 66, 80]])
    mirrored = torch.tensor([[96.0 - 66, 20, 96 - 10, 80]])
    there = psroi_align(features, box, torch.tensor([0]), bins=3)
    back = psroi_align(features.flip(3), mirrored, torch.tensor([0]), bins=3)
    torch.testing.assert_close(there, back.flip(3))


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_gradcheck(reduction):
    features = torch.randn(1, 8, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    boxes, ids = BOXES[:3] / 2, torch.zeros(3, dtype=torch.long)
    assert torch.autograd.gradcheck(
        lambda x: psroi_align(x, boxes, ids, bins=2, reduction=reduction), features.requires_grad_()
    )


def test_no_boxes_give_an_empty_answer():
    pooled = psroi_align(torch.zeros(1, 245, 20, 20), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert pooled.shape == (0, 5, 7, 7)


def test_channels_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of 49"):
        psroi_align(torch.zeros(1, 244, 20, 20), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
