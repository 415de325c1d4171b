"""Children by confidence, by hand."""

import math

import pytest
import torch

from drafters.growing_tree import best_children, by_confidence


def test_a_confidence_moves_what_the_other_children_share() -> None:
    log_probs = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]).log()
    # Accepted at 0.8: the others share 0.2 as 3 to 2. At 0.3 they would get 0.42 and 0.28; no more than the first.
    confidence = torch.logit(torch.tensor([0.8, 0.3, 0.5]))
    got = by_confidence(log_probs, confidence).exp()
    assert got[0].tolist() == pytest.approx([0.8, 0.12, 0.08], rel=1e-5)
    assert got[1].tolist() == pytest.approx([0.3, 0.3, 0.28], rel=1e-5)
    assert got[2].tolist() == pytest.approx([0.5, 0.3, 0.2], rel=1e-5)


def test_a_drafter_that_is_certain_stays_finite() -> None:
    (children,) = best_children(torch.tensor([[100.0, 0.0, -5.0]]), 2, confidence=torch.tensor([0.0]))
    assert children[0] == [0, 1]
    assert children[1][0] == pytest.approx(math.log(0.5), rel=1e-5)
    assert math.isfinite(children[1][1])
    assert children[1][1] < -50
