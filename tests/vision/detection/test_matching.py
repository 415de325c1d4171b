"""Matching candidates with true boxes, and the balanced draw."""

import pytest
import torch

from vision.detection.matching import match_boxes, sample_balanced
from vision.detection.rpn import AnchorGrid


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32).view(-1, 4)


def test_thresholds():
    truth = boxes([0, 0, 10, 10])
    candidates = boxes([0, 0, 10, 10], [0, 0, 10, 7], [0, 0, 10, 5], [0, 0, 10, 3], [0, 0, 10, 2])
    matches = match_boxes(candidates, truth, positive_iou=0.7, negative_iou=0.3)
    assert matches.positive.tolist() == [True, True, False, False, False]
    assert matches.negative.tolist() == [False, False, False, False, True]


def test_every_box_keeps_its_best_candidates_if_they_are_good_enough():
    truth = boxes([0, 0, 10, 10], [50, 50, 60, 60])
    candidates = boxes([0, 0, 10, 5], [0, 5, 10, 10], [0, 0, 10, 4], [50, 50, 60, 52])
    matches = match_boxes(candidates, truth, 0.7, 0.3, rescue_iou=0.3)
    assert matches.positive.tolist() == [True, True, False, False]
    assert matches.negative.tolist() == [False, False, False, True]
    assert matches.box_ids[:2].tolist() == [0, 0]


def test_a_rescued_candidate_answers_for_the_box_it_rescues():
    """The candidate overlaps a large box more, but is the best the small box has."""
    truth = boxes([0, 0, 20, 20], [0, 0, 11, 10])
    candidates = boxes([0, 0, 20, 19], [0, 0, 18, 12])
    matches = match_boxes(candidates, truth, 0.7, 0.3, rescue_iou=0.3)
    assert matches.box_ids.tolist() == [0, 1]
    assert matches.positive.tolist() == [True, True]


def test_a_box_smaller_than_any_anchor_still_has_one():
    anchors = AnchorGrid().boxes(20, 20, like=torch.zeros(1))
    truth = boxes([100, 100, 124, 124])
    assert not match_boxes(anchors, truth, 0.7, 0.3).positive.any()
    matches = match_boxes(anchors, truth, 0.7, 0.3, rescue_iou=0.3)
    assert matches.positive.any()
    assert (matches.box_ids[matches.positive] == 0).all()


def test_without_true_boxes_everything_is_background():
    matches = match_boxes(boxes([0, 0, 1, 1], [2, 2, 3, 3]), torch.zeros(0, 4), 0.7, 0.3, 0.3)
    assert matches.negative.all() and not matches.positive.any()
    assert matches.box_ids.shape == (2,)


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [(500, 500, (128, 128)), (10, 500, (10, 246)), (500, 20, (128, 20)), (0, 0, (0, 0))],
)
def test_balanced_draw(positives, negatives, expected):
    positive = torch.arange(1200) < positives
    negative = torch.arange(1200) >= 1200 - negatives
    first, second = sample_balanced(positive, negative, 256, 0.5, torch.Generator().manual_seed(0))
    assert (len(first), len(second)) == expected
    assert positive[first].all() and negative[second].all()
    assert len(first.unique()) == len(first) and len(second.unique()) == len(second)
