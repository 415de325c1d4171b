"""Losses of feature-level drafters: hand-computed values, and positions outside the mask do not count."""

import math
from collections.abc import Callable

import pytest
import torch

from kernels.losses.drafting import (
    acceptance_loss,
    argmax_agreement,
    blended_acceptance_loss,
    feature_regression,
    soft_cross_entropy,
    total_variation,
    with_feature_noise,
)

MASK = torch.tensor([[1.0, 1.0, 0.0]])


def test_feature_regression_by_hand() -> None:
    # SmoothL1: 0.5 d^2 below 1, d - 0.5 above. Row 0: (0.5 * 0.04 + 2.5) / 2; row 1: 0; row 2 is masked.
    predicted = torch.tensor([[[0.2, 3.0], [1.0, 1.0], [9.0, 9.0]]])
    features = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]])
    assert feature_regression(predicted, features, MASK).item() == pytest.approx(1.26 / 2.00001, rel=1e-6)


def test_soft_cross_entropy_by_hand() -> None:
    # Target (3/4, 1/4) against a drafter at (1/2, 1/2), then (1/5, 4/5).
    target = torch.tensor([[[math.log(3.0), 0.0], [math.log(3.0), 0.0], [0.0, 50.0]]])
    draft = torch.tensor([[[0.0, 0.0], [0.0, math.log(4.0)], [50.0, 0.0]]])
    first, second = math.log(2.0), -(0.75 * math.log(0.2) + 0.25 * math.log(0.8))
    assert soft_cross_entropy(draft, target, MASK).item() == pytest.approx((first + second) / 2.00001, rel=1e-6)


def test_acceptance_loss_by_hand() -> None:
    # Target (3/4, 1/4) against (1/2, 1/2): 1/2 + 1/4 is accepted; against (1/5, 4/5): 1/5 + 1/4.
    target = torch.tensor([[[math.log(3.0), 0.0], [math.log(3.0), 0.0], [0.0, 50.0]]])
    draft = torch.tensor([[[0.0, 0.0], [0.0, math.log(4.0)], [50.0, 0.0]]])
    want = -(math.log(0.75) + math.log(0.45)) / 2.00001
    assert acceptance_loss(draft, target, MASK).item() == pytest.approx(want, rel=1e-6)
    far = torch.tensor([[[-200.0, 0.0]]])
    assert math.isfinite(acceptance_loss(far, -far, torch.ones(1, 1)).item())


def test_total_variation_by_hand() -> None:
    # Half the sum of |3/4 - 1/2| and |1/4 - 1/2|, then of |3/4 - 1/5| and |1/4 - 4/5|; 1 where nothing is shared.
    target = torch.tensor([[[math.log(3.0), 0.0], [math.log(3.0), 0.0], [0.0, 50.0]]])
    draft = torch.tensor([[[0.0, 0.0], [0.0, math.log(4.0)], [50.0, 0.0]]])
    assert total_variation(draft, target, MASK).item() == pytest.approx((0.25 + 0.55) / 2.00001, rel=1e-6)
    assert total_variation(draft, target, 1 - MASK).item() == pytest.approx(1 / 1.00001, rel=1e-6)


def test_blended_acceptance_loss_by_hand() -> None:
    # As above: acceptance 3/4 and 9/20; KL(target || draft) in nats; w = exp(-3 acceptance).
    target = torch.tensor([[[math.log(3.0), 0.0], [math.log(3.0), 0.0], [0.0, 50.0]]])
    draft = torch.tensor([[[0.0, 0.0], [0.0, math.log(4.0)], [50.0, 0.0]]])
    want = 0.0
    for accepted, first, second in ((0.75, 0.5, 0.5), (0.45, 0.2, 0.8)):
        weight = math.exp(-3 * accepted)
        divergence = 0.75 * math.log(0.75 / first) + 0.25 * math.log(0.25 / second)
        want += weight * divergence + (1 - weight) * (1 - accepted)
    assert blended_acceptance_loss(draft, target, MASK).item() == pytest.approx(want / 2.00001, rel=1e-5)
    pure = blended_acceptance_loss(draft, target, MASK, scale=0.0).item()
    assert pure == pytest.approx((0.25 + 0.55) / 2.00001, rel=1e-5)


def test_the_papers_sum_by_hand() -> None:
    ones = torch.ones(1, 1)
    regression = feature_regression(torch.tensor([[[2.0]]]), torch.tensor([[[0.0]]]), ones)
    entropy = soft_cross_entropy(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), ones)
    assert (regression + 0.1 * entropy).item() == pytest.approx((1.5 + 0.1 * math.log(4.0)) / 1.00001, rel=1e-6)


def test_agreement_counts_the_mask_only() -> None:
    draft = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    target = torch.tensor([[[2.0, 1.0], [0.0, 1.0], [5.0, 1.0]]])
    assert argmax_agreement(draft, target, MASK).item() == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(
    "loss", [feature_regression, soft_cross_entropy, acceptance_loss, blended_acceptance_loss, total_variation]
)
@pytest.mark.parametrize("poison", [0.0, 1e4])
def test_masked_positions_have_no_gradient(loss: Callable[..., torch.Tensor], poison: float) -> None:
    torch.manual_seed(0)
    predicted, labels = torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    predicted[:, 2] = 0.0
    labels[:, 2] = poison
    predicted.requires_grad_()
    loss(predicted, labels, MASK).backward()
    assert predicted.grad is not None
    assert bool((predicted.grad[:, 2] == 0).all())
    assert bool((predicted.grad[:, :2] != 0).all())


@pytest.mark.parametrize(
    "loss",
    [
        feature_regression,
        soft_cross_entropy,
        acceptance_loss,
        blended_acceptance_loss,
        total_variation,
        argmax_agreement,
    ],
)
def test_an_empty_mask_gives_zero(loss: Callable[..., torch.Tensor]) -> None:
    assert loss(torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.zeros(2, 3)).item() == 0.0


def test_no_gradient_reaches_the_target() -> None:
    target = torch.randn(1, 3, 5, requires_grad=True)
    draft = torch.randn(1, 3, 5, requires_grad=True)
    soft_cross_entropy(draft, target, MASK).backward()
    assert target.grad is None


@pytest.mark.parametrize(("length", "bound"), [(512, 0.1), (2048, 0.025)])
def test_noise_is_bounded_by_the_length(length: int, bound: float) -> None:
    torch.manual_seed(0)
    features = torch.randn(2, length, 8)
    noise = with_feature_noise(features) - features
    assert 0.98 * bound < noise.abs().max() <= bound + 1e-6
    assert abs(noise.mean()) < 0.02 * bound
