"""The same operations in torchvision, where it imports: next to a torch of another build it does not."""

import pytest
import torch

from vision.detection.boxes import nms
from vision.detection.psroi_align import psroi_align


@pytest.fixture(scope="module")
def ops():
    try:
        import torchvision.ops
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not import here: {error}")
    return torchvision.ops


def scattered_boxes(count: int, side: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, 2, generator=generator) * side
    return torch.cat([corners, corners + 1 + torch.rand(count, 2, generator=generator) * side / 4], dim=1)


def test_position_sensitive_align_with_the_mean_is_torchvisions(ops) -> None:
    features = torch.randn(2, 245, 20, 20, generator=torch.Generator().manual_seed(1))
    boxes, image_ids = scattered_boxes(64, 300.0), torch.arange(64) % 2
    rows = torch.cat([image_ids[:, None].float(), boxes], dim=1)
    expected = ops.ps_roi_align(features, rows, (7, 7), spatial_scale=1 / 16, sampling_ratio=2)
    torch.testing.assert_close(psroi_align(features, boxes, image_ids, reduction="mean"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_suppression_is_torchvisions(ops, threshold) -> None:
    boxes, scores = scattered_boxes(2000, 300.0), torch.rand(2000, generator=torch.Generator().manual_seed(2))
    assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))
