"""Box arithmetic against slow, obvious twins."""

import math

import pytest
import torch

from vision.detection.boxes import (
    MAX_SIZE_DELTA,
    box_area,
    box_iou,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    nms,
    soft_nms,
)


def random_boxes(count, seed=0, extent=100.0, size=40.0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * extent
    return torch.cat([corners, corners + 1 + torch.rand(count, 2, generator=generator) * size], dim=1)


def slow_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


def slow_nms(boxes, scores, threshold, groups=None):
    kept = []
    for candidate in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        rivals = [k for k in kept if groups is None or groups[k] == groups[candidate]]
        if all(slow_iou(boxes[k], boxes[candidate]) <= threshold for k in rivals):
            kept.append(candidate)
    return kept


def slow_soft_nms(boxes, scores, threshold, sigma=None, min_score=1e-3):
    scores, left, kept = list(scores), set(range(len(boxes))), []
    while left:
        best = min(left, key=lambda i: (-scores[i], i))
        left.remove(best)
        if scores[best] < min_score:
            break
        kept.append((best, scores[best]))
        for i in left:
            overlap = slow_iou(boxes[best], boxes[i])
            if sigma is not None:
                scores[i] *= 2.718281828459045 ** (-(overlap**2) / sigma)
            elif overlap >= threshold:
                scores[i] *= 1 - overlap
    return kept


def test_iou_equals_the_definition():
    first, second = random_boxes(7, seed=1).double(), random_boxes(5, seed=2).double()
    slow = torch.tensor([[slow_iou(a, b) for b in second.tolist()] for a in first.tolist()], dtype=torch.float64)
    assert (slow > 0).any() and (slow == 0).any()
    torch.testing.assert_close(box_iou(first, second), slow)


def test_boxes_without_area_overlap_nothing():
    boxes = torch.tensor([[5.0, 5, 5, 5], [9.0, 9, 1, 1], [0.0, 0, 10, 10]])
    assert box_area(boxes).tolist() == [0, 0, 100]
    assert box_iou(boxes[:2], boxes).abs().max() == 0


@pytest.mark.parametrize("stds", [(1, 1, 1, 1), (0.1, 0.1, 0.2, 0.2)])
def test_coding_round_trip(stds):
    boxes, anchors = random_boxes(200, seed=1), random_boxes(200, seed=2)
    torch.testing.assert_close(
        decode_boxes(encode_boxes(boxes, anchors, stds), anchors, stds), boxes, atol=1e-4, rtol=0
    )


def test_coding_by_hand():
    anchors = torch.tensor([[0.0, 0, 10, 20]])
    boxes = torch.tensor([[5.0, 10, 25, 20]])
    expected = torch.tensor([[1.0, 0.25, math.log(2), math.log(0.5)]])
    torch.testing.assert_close(encode_boxes(boxes, anchors), expected)
    torch.testing.assert_close(encode_boxes(boxes, anchors, (2, 2, 2, 2)), expected / 2)


def test_size_deltas_are_bounded():
    decoded = decode_boxes(torch.tensor([[0.0, 0, 100, -100]]), torch.tensor([[0.0, 0, 16, 16]]))
    assert (decoded[0, 2] - decoded[0, 0]).item() == pytest.approx(1000)
    assert (decoded[0, 3] - decoded[0, 1]).item() == pytest.approx(16 / 62.5)
    assert pytest.approx(4.1351666) == MAX_SIZE_DELTA


def test_clipping():
    boxes = torch.tensor([[-5.0, -1, 400, 90], [10, 20, 30, 40]])
    assert clip_boxes(boxes, height=80, width=320).tolist() == [[0, 0, 320, 80], [10, 20, 30, 40]]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("count", [0, 1, 63, 300])
def test_nms_equals_the_loop(count, threshold):
    boxes = random_boxes(count)
    # Rounded scores hold many ties, which must fall to the lower index.
    scores = (torch.rand(count, generator=torch.Generator().manual_seed(4)) * 20).round()
    groups = torch.arange(count) % 3
    assert nms(boxes, scores, threshold).tolist() == slow_nms(boxes.tolist(), scores.tolist(), threshold)
    grouped = slow_nms(boxes.tolist(), scores.tolist(), threshold, groups.tolist())
    assert nms(boxes, scores, threshold, groups).tolist() == grouped
    assert nms(boxes, scores, threshold, groups, max_kept=5).tolist() == grouped[:5]


def test_nms_over_several_blocks_equals_the_loop(monkeypatch):
    monkeypatch.setattr("vision.detection.boxes.BLOCK", 64)
    boxes, scores = random_boxes(500), torch.rand(500, generator=torch.Generator().manual_seed(4))
    slow = slow_nms(boxes.tolist(), scores.tolist(), 0.4)
    assert len(slow) > 64
    assert nms(boxes, scores, 0.4).tolist() == slow
    assert nms(boxes, scores, 0.4, max_kept=70).tolist() == slow[:70]


def test_nms_follows_a_long_chain():
    """Each box overlaps its neighbours only, so that every second one is kept: the slowest case for the fixed point."""
    starts = torch.arange(50.0)
    boxes = torch.stack([starts * 6, torch.zeros(50), starts * 6 + 10, torch.ones(50)], dim=1)
    assert nms(boxes, -starts, 0.2).tolist() == list(range(0, 50, 2))


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_soft_nms_equals_the_loop(sigma):
    boxes, scores = random_boxes(60).double(), torch.rand(60, generator=torch.Generator().manual_seed(4)).double()
    slow = slow_soft_nms(boxes.tolist(), scores.tolist(), 0.5, sigma)
    kept, kept_scores = soft_nms(boxes, scores.requires_grad_(), 0.5, sigma=sigma)
    assert not kept_scores.requires_grad
    assert kept.tolist() == [i for i, _ in slow]
    assert kept_scores.tolist() == pytest.approx([s for _, s in slow])
    assert (kept_scores <= scores[kept]).all() and (kept_scores < scores[kept]).any()
    assert (kept_scores.diff() <= 0).all()


def test_soft_nms_per_class_is_one_call():
    boxes, scores = random_boxes(90, extent=25.0), torch.rand(90, generator=torch.Generator().manual_seed(4))
    groups = torch.arange(90) % 3
    merged = []
    for group in range(3):
        members = (groups == group).nonzero().flatten()
        kept, kept_scores = soft_nms(boxes[members], scores[members], 0.5)
        merged += list(zip(kept_scores.tolist(), members[kept].tolist(), strict=True))
    merged.sort(reverse=True)
    kept, kept_scores = soft_nms(boxes, scores, 0.5, groups, max_kept=25)
    assert kept.tolist() == [index for _, index in merged[:25]]
    assert kept_scores.tolist() == pytest.approx([score for score, _ in merged[:25]])


def test_soft_nms_with_threshold_one_decays_only_twins():
    boxes, scores = random_boxes(40), torch.rand(40, generator=torch.Generator().manual_seed(4))
    kept, kept_scores = soft_nms(boxes, scores, threshold=1.0)
    assert torch.equal(kept_scores, scores.sort(descending=True).values[: len(kept)])
    twins, _ = soft_nms(torch.cat([boxes[:1], boxes[:1]]), torch.tensor([0.9, 0.8]), threshold=1.0)
    assert twins.tolist() == [0]


def test_soft_nms_of_nothing():
    kept, kept_scores = soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert kept.shape == kept_scores.shape == (0,)
