"""Losses of feature-level drafters: hand-computed values, and positions outside the mask do not count."""

import math

import pytest
import torch

from kernels.losses.drafting import (
    acceptance,
    acceptance_loss,
    blended_acceptance_loss,
    feature_regression,
    masked_mean,
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


# Target (3/4, 1/4), twice, against a drafter at (1/2, 1/2) and at (1/5, 4/5).
TARGET = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
DRAFT = torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()
FAR = torch.tensor([[-200.0, 0.0]])


def test_soft_cross_entropy_by_hand() -> None:
    want = [math.log(2.0), -(0.75 * math.log(0.2) + 0.25 * math.log(0.8))]
    assert soft_cross_entropy(DRAFT, TARGET).tolist() == pytest.approx(want, rel=1e-6)


def test_acceptance_losses_by_hand() -> None:
    # 1/2 + 1/4 is accepted of the first, 1/5 + 1/4 of the second; nothing where nothing is shared.
    assert acceptance(DRAFT, TARGET).tolist() == pytest.approx([0.75, 0.45], rel=1e-6)
    assert acceptance_loss(DRAFT, TARGET).tolist() == pytest.approx([-math.log(0.75), -math.log(0.45)], rel=1e-6)
    assert total_variation(DRAFT, TARGET).tolist() == pytest.approx([0.25, 0.55], rel=1e-6)
    other = torch.tensor([[1.0, 0.0]])
    assert math.isfinite(acceptance_loss(FAR, other).item())
    assert total_variation(FAR, other).item() == pytest.approx(1.0)


def test_blended_acceptance_loss_by_hand() -> None:
    # KL(target || draft) in nats; w = exp(-3 acceptance).
    want = []
    for accepted, first, second in ((0.75, 0.5, 0.5), (0.45, 0.2, 0.8)):
        weight = math.exp(-3 * accepted)
        divergence = 0.75 * math.log(0.75 / first) + 0.25 * math.log(0.25 / second)
        want.append(weight * divergence + (1 - weight) * (1 - accepted))
    assert blended_acceptance_loss(DRAFT, TARGET).tolist() == pytest.approx(want, rel=1e-5)
    assert blended_acceptance_loss(DRAFT, TARGET, scale=0.0).tolist() == pytest.approx([0.25, 0.55], rel=1e-5)


def test_the_papers_sum_by_hand() -> None:
    ones = torch.ones(1, 1)
    regression = feature_regression(torch.tensor([[[2.0]]]), torch.tensor([[[0.0]]]), ones)
    uniform = torch.full((1, 1, 4), 0.25)
    entropy = masked_mean(soft_cross_entropy(uniform.log(), uniform), ones)
    assert (regression + 0.1 * entropy).item() == pytest.approx((1.5 + 0.1 * math.log(4.0)) / 1.00001, rel=1e-6)


@pytest.mark.parametrize("poison", [0.0, 1e4])
def test_masked_positions_have_no_gradient(poison: float) -> None:
    torch.manual_seed(0)
    predicted, labels = torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    predicted[:, 2] = 0.0
    labels[:, 2] = poison
    predicted.requires_grad_()
    feature_regression(predicted, labels, MASK).backward()
    assert predicted.grad is not None
    assert bool((predicted.grad[:, 2] == 0).all())
    assert bool((predicted.grad[:, :2] != 0).all())


def test_an_empty_mask_gives_zero() -> None:
    assert feature_regression(torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.zeros(2, 3)).item() == 0.0


@pytest.mark.parametrize(("length", "bound"), [(512, 0.1), (2048, 0.025)])
def test_noise_is_bounded_by_the_length(length: int, bound: float) -> None:
    torch.manual_seed(0)
    features = torch.randn(2, length, 8)
    noise = with_feature_noise(features) - features
    assert 0.98 * bound < noise.abs().max() <= bound + 1e-6
    assert abs(noise.mean()) < 0.02 * bound
