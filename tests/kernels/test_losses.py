"""Divergences and correlations against closed forms and hand-computed values."""

import math

import pytest
import torch
from torch.nn import functional

from kernels.losses import (
    InvalidTemperature,
    ShapeMismatch,
    balance_divergence,
    bilinear_correlation,
    correlation_congruence,
    forward_kl,
    mean_difference_correlation,
    rbf_correlation,
    reverse_kl,
    target_class_divergence,
    taylor_rbf_correlation,
    without_label,
)

TEACHER = torch.tensor([[8.0, 4.0, 1.0, -3.0]], dtype=torch.float64)
STUDENT = torch.tensor([[3.0, 4.0, 2.0, 1.0]], dtype=torch.float64)
LABEL = torch.tensor([0])


def random_pair(rows=16, classes=20, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64) * 3
    return pair[0].to(dtype), pair[1].to(dtype)


@pytest.mark.parametrize(
    ("temperature", "forward", "reverse"),
    [(1, 1.325764, 2.609836), (2, 2.992841, 3.864416), (4, 4.611056, 4.818681), (8, 5.258385, 5.181725)],
)
def test_golden_divergences(temperature, forward, reverse):
    assert forward_kl(STUDENT, TEACHER, temperature).item() == pytest.approx(forward, abs=1e-6)
    assert reverse_kl(STUDENT, TEACHER, temperature).item() == pytest.approx(reverse, abs=1e-6)


def test_high_temperature_limit_is_logit_regression_for_both():
    difference = (STUDENT - STUDENT.mean()) - (TEACHER - TEACHER.mean())
    limit = difference.square().sum().item() / (2 * 4)
    assert limit == pytest.approx(5.25)
    assert forward_kl(STUDENT, TEACHER, 100).item() == pytest.approx(5.2823, abs=1e-4)
    assert reverse_kl(STUDENT, TEACHER, 100).item() == pytest.approx(5.2588, abs=1e-4)
    assert forward_kl(STUDENT, TEACHER, 1e5).item() == pytest.approx(limit, abs=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradients_equal_the_closed_forms(temperature):
    student, teacher = random_pair()
    student.requires_grad_()
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    log_ratio = q.log() - p.log()
    forward_form = temperature * (q - p)
    reverse_form = temperature * q * (log_ratio - (q * log_ratio).sum(-1, keepdim=True))

    (forward,) = torch.autograd.grad(forward_kl(student, teacher, temperature).sum(), student)
    (reverse,) = torch.autograd.grad(reverse_kl(student, teacher, temperature).sum(), student)
    torch.testing.assert_close(forward, forward_form, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(reverse, reverse_form, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(
    ("divergence", "temperature", "golden"),
    [
        (forward_kl, 4.0, (-1.401200, 0.483226, 0.416053, 0.501921)),
        (reverse_kl, 4.0, (-1.229314, 0.171189, 0.316076, 0.742049)),
        (reverse_kl, 1.0, (-0.954866, 0.623976, 0.171590, 0.159300)),
    ],
)
def test_golden_gradients(divergence, temperature, golden):
    student = STUDENT.clone().requires_grad_()
    divergence(student, TEACHER, temperature).sum().backward()
    torch.testing.assert_close(student.grad, torch.tensor([golden], dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_gradcheck(divergence):
    student, teacher = random_pair(rows=3, classes=5)
    assert torch.autograd.gradcheck(lambda x: divergence(x, teacher, 2.0), student.requires_grad_())


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_equal_networks_and_shifted_logits_give_zero_without_gradient(divergence):
    _, teacher = random_pair()
    student = (teacher + 3.7).requires_grad_()
    value = divergence(student, teacher, 2.0)
    value.sum().backward()
    assert value.abs().max() < 1e-13
    assert student.grad.abs().max() < 1e-13
    assert torch.equal(divergence(teacher, teacher, 2.0), torch.zeros(16, dtype=torch.float64))


def test_forward_and_reverse_agree_to_second_order():
    _, teacher = random_pair()
    student = teacher + 1e-3 * torch.randn(16, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    forward, reverse = forward_kl(student, teacher, 1.0).mean(), reverse_kl(student, teacher, 1.0).mean()
    assert abs(forward / reverse - 1) < 4e-4


@pytest.mark.parametrize(
    ("p", "q", "forward", "reverse", "ratio"),
    [
        (1e-3, 1e-2, 6.738e-3, 1.407e-2, 2.54),
        (1e-4, 1e-2, 9.489e-3, 3.620e-2, 4.62),
        (1e-8, 1e-2, 1.005e-2, 1.282e-1, 13.69),
    ],
)
def test_reverse_term_pushes_an_over_estimated_tail_harder(p, q, forward, reverse, ratio):
    teacher = torch.tensor([[math.log(p), math.log1p(-p)]], dtype=torch.float64)
    student = torch.tensor([[math.log(q), math.log1p(-q)]], dtype=torch.float64, requires_grad=True)
    forward_value, reverse_value = forward_kl(student, teacher, 1.0).sum(), reverse_kl(student, teacher, 1.0).sum()
    assert forward_value.item() == pytest.approx(forward, rel=1e-3)
    assert reverse_value.item() == pytest.approx(reverse, rel=1e-3)
    (forward_grad,) = torch.autograd.grad(forward_value, student)
    (reverse_grad,) = torch.autograd.grad(reverse_value, student)
    assert (reverse_grad / forward_grad)[0, 0].item() == pytest.approx(ratio, rel=2e-3)


def test_without_a_reverse_term_balance_divergence_is_the_forward_kl_bit_for_bit():
    student, teacher = random_pair(dtype=torch.float32)
    balance = balance_divergence(student, teacher, 1.0, 0.0, 4.0, 2.0)
    assert torch.equal(balance, forward_kl(student, teacher, 4.0))


def test_balance_divergence_is_the_weighted_sum():
    student, teacher = random_pair()
    balance = balance_divergence(student, teacher, 0.9, 0.45, 4.0, 1.0)
    torch.testing.assert_close(
        balance, 0.9 * forward_kl(student, teacher, 4.0) + 0.45 * reverse_kl(student, teacher, 1.0)
    )
    reverse_only = balance_divergence(student, teacher, 0.0, 0.45, 4.0, 1.0)
    torch.testing.assert_close(reverse_only, 0.45 * reverse_kl(student, teacher, 1.0))


@pytest.mark.parametrize(
    ("temperature", "tckd", "nckd", "rest", "whole"),
    [(1.0, 1.324451, 0.069534, 0.018881, 1.325764), (4.0, 0.267031, 0.056101, 0.377173, 0.288191)],
)
def test_decoupled_terms_recombine_to_the_forward_kl(temperature, tckd, nckd, rest, whole):
    square = temperature**2
    target = target_class_divergence(STUDENT, TEACHER, LABEL, temperature) / square
    others = forward_kl(without_label(STUDENT, LABEL), without_label(TEACHER, LABEL), temperature) / square
    not_label = 1 - (TEACHER / temperature).softmax(-1)[0, 0]
    assert target.item() == pytest.approx(tckd, abs=1e-6)
    assert others.item() == pytest.approx(nckd, abs=1e-6)
    assert not_label.item() == pytest.approx(rest, abs=1e-6)
    assert (target + not_label * others).item() == pytest.approx(whole, abs=1e-6)


def test_decoupling_identity_on_random_logits():
    student, teacher = random_pair()
    labels = torch.arange(16) % 20
    target = target_class_divergence(student, teacher, labels, 2.0)
    others = forward_kl(without_label(student, labels), without_label(teacher, labels), 2.0)
    not_label = 1 - (teacher / 2).softmax(-1)[torch.arange(16), labels]
    torch.testing.assert_close(target + not_label * others, forward_kl(student, teacher, 2.0))


def test_without_label_keeps_the_order_of_the_others():
    logits = torch.arange(8.0).view(2, 4)
    assert without_label(logits, torch.tensor([0, 2])).tolist() == [[1, 2, 3], [4, 5, 7]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    """A softmax in half precision would give log-probabilities (0, -inf, -inf) here."""
    teacher = torch.tensor([[60.0, 0.0, -60.0]], dtype=dtype)
    student = torch.tensor([[-60.0, 0.0, 60.0]], dtype=dtype, requires_grad=True)
    value = balance_divergence(student, teacher, 0.5, 0.5, 4.0, 1.0)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert value.isfinite().all() and student.grad.isfinite().all()
    assert forward_kl(student, teacher, 1.0).item() == pytest.approx(120.0)


def test_float64_stays_float64():
    assert forward_kl(STUDENT, TEACHER, 2.0).dtype == torch.float64
    assert rbf_correlation(STUDENT, 0.4).dtype == torch.float64


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_impossible_temperatures_are_refused(temperature):
    for divergence in (forward_kl, reverse_kl):
        with pytest.raises(InvalidTemperature, match="above 0"):
            divergence(STUDENT, TEACHER, temperature)
    with pytest.raises(InvalidTemperature, match="reverse_temperature"):
        balance_divergence(STUDENT, TEACHER, 1.0, 0.0, 1.0, temperature)


def test_other_class_counts_and_shapes_are_refused():
    with pytest.raises(ShapeMismatch, match="class count"):
        forward_kl(torch.zeros(2, 10), torch.zeros(2, 100), 1.0)
    with pytest.raises(ShapeMismatch, match="same batch"):
        forward_kl(torch.zeros(2, 10), torch.zeros(3, 10), 1.0)
    with pytest.raises(ShapeMismatch, match="one class index per row"):
        without_label(torch.zeros(2, 10), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ShapeMismatch, match="at least 2"):
        without_label(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))


TAYLOR_TABLE = {
    1: (0.089866, 0.449329, 0.629061, 0.808792),
    2: (0.233651, 0.449329, 0.665007, 0.952577),
    3: (0.195308, 0.449329, 0.669800, 0.990920),
    4: (0.202977, 0.449329, 0.670279, 0.998589),
    6: (0.201913, 0.449329, 0.670320, 0.999979),
    8: (0.201897, 0.449329, 0.670320, 1.000000),
}


def unit_pair(cosine):
    return torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)


@pytest.mark.parametrize("order", TAYLOR_TABLE)
def test_taylor_kernel_follows_the_table(order):
    for cosine, golden in zip((-1.0, 0.0, 0.5, 1.0), TAYLOR_TABLE[order], strict=True):
        assert taylor_rbf_correlation(unit_pair(cosine), 0.4, order)[0, 1].item() == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize(
    ("gamma", "errors"),
    [
        (0.4, {1: 1.912e-1, 2: 4.742e-2, 3: 9.080e-3, 4: 1.411e-3, 6: 2.075e-5, 8: 1.805e-7, 10: 1.036e-9}),
        (1.0, {1: 5.940e-1, 2: 3.233e-1, 3: 1.429e-1, 4: 5.265e-2, 6: 4.534e-3, 8: 2.374e-4, 10: 8.308e-6}),
        (2.0, {1: 9.084e-1, 2: 7.619e-1, 3: 5.665e-1, 4: 3.712e-1, 6: 1.107e-1, 8: 2.136e-2, 10: 2.840e-3}),
    ],
)
def test_taylor_kernel_converges_to_the_exact_rbf(gamma, errors):
    angles = torch.linspace(0, math.pi, 201, dtype=torch.float64)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    exact = rbf_correlation(circle, gamma)
    largest = [(taylor_rbf_correlation(circle, gamma, order) - exact).abs().max().item() for order in errors]
    assert largest == pytest.approx(list(errors.values()), rel=1e-3)
    assert largest == sorted(largest, reverse=True)


GOLDEN_TEACHER = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
GOLDEN_STUDENT = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)


def unit(x):
    return functional.normalize(x)


@pytest.mark.parametrize(
    ("correlation", "golden"),
    [
        (lambda x: taylor_rbf_correlation(x, 0.4, 0), 0.0),
        (lambda x: taylor_rbf_correlation(x, 0.4, 1), 0.057428),
        (lambda x: taylor_rbf_correlation(x, 0.4, 2), 0.103534),
        (lambda x: taylor_rbf_correlation(x, 0.4, 3), 0.116448),
        (lambda x: rbf_correlation(x, 0.4), 0.119305),
        (bilinear_correlation, 0.444444),
    ],
)
def test_golden_congruence(correlation, golden):
    value = correlation_congruence(correlation(unit(GOLDEN_STUDENT)), correlation(unit(GOLDEN_TEACHER)))
    assert value.item() == pytest.approx(golden, abs=1e-6)


def test_golden_correlation_matrix():
    matrix = taylor_rbf_correlation(unit(GOLDEN_TEACHER), 0.4, 2)
    expected = torch.tensor([[0.9526, 0.4493, 0.7754], [0.4493, 0.9526, 0.7754], [0.7754, 0.7754, 0.9526]])
    torch.testing.assert_close(matrix.float(), expected, atol=1e-4, rtol=0)


def test_mean_difference_correlation_by_hand():
    matrix = mean_difference_correlation(torch.tensor([[1.0, 3.0], [0.0, 0.0], [5.0, 7.0]]))
    assert matrix.tolist() == [[0, 2, 4], [2, 0, 6], [4, 6, 0]]


def test_rbf_equals_the_pairwise_definition():
    x, _ = random_pair(rows=7, classes=5)
    slow = torch.tensor([[math.exp(-0.05 * (a - b).square().sum()) for b in x] for a in x], dtype=torch.float64)
    torch.testing.assert_close(rbf_correlation(x, 0.05), slow)


def test_correlations_of_other_batches_are_refused():
    with pytest.raises(ShapeMismatch, match="same batch"):
        correlation_congruence(torch.zeros(2, 2), torch.zeros(3, 3))
