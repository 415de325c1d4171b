"""The distillation losses as modules: golden values, identities, invariances and what they refuse."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from kernels.losses import (
    BatchTooSmall,
    InvalidTemperature,
    NonFiniteInput,
    ShapeMismatch,
    bilinear_correlation,
    forward_kl,
    mean_difference_correlation,
    reverse_kl,
)
from vision.distillation import (
    BalanceDivergenceLoss,
    CongruenceLoss,
    CorrelationCongruenceLoss,
    DKDLoss,
    KDLoss,
    gradient_ratio,
)

TEACHER = torch.tensor([[8.0, 4.0, 1.0, -3.0]], dtype=torch.float64)
STUDENT = torch.tensor([[3.0, 4.0, 2.0, 1.0]], dtype=torch.float64)


def random_logits(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 3, torch.randn(*shape, generator=generator) * 3


def test_hinton_recipe_golden():
    labels = torch.tensor([0])
    cross_entropy = functional.cross_entropy(STUDENT, labels)
    assert cross_entropy.item() == pytest.approx(1.440190, abs=1e-6)
    assert (0.1 * cross_entropy + 0.9 * KDLoss(4)(STUDENT, TEACHER)).item() == pytest.approx(4.293969, abs=1e-6)


def test_dkd_golden():
    loss = DKDLoss(1.0, 8.0, 4.0)(STUDENT, TEACHER, torch.tensor([0]))
    assert loss.item() == pytest.approx(11.453447, abs=1e-6)


def test_balance_divergence_without_reverse_term_is_kd_bit_for_bit():
    student, teacher = random_logits(32, 100)
    gradients = []
    for loss in (KDLoss(4.0), BalanceDivergenceLoss(1.0, 0.0, 4.0, 2.0)):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher)
        value.backward()
        gradients.append((value.detach(), leaf.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_the_mean_is_over_rows_and_not_over_classes():
    student, teacher = random_logits(32, 100)
    assert torch.equal(KDLoss(2.0)(student, teacher), forward_kl(student, teacher, 2.0).mean())


def test_pixels_are_rows_and_ignored_pixels_do_nothing():
    student, teacher = random_logits(2, 5, 3, 4)
    student.requires_grad_()
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    valid[0, 0] = False
    loss = BalanceDivergenceLoss(0.5, 0.5, 4.0, 1.0)
    rows = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (student, teacher)]
    torch.testing.assert_close(loss(student, teacher), loss(*rows))
    kept = loss(student, teacher, valid)
    torch.testing.assert_close(kept, loss(*(x[valid.flatten()] for x in rows)))
    (gradient,) = torch.autograd.grad(kept, student)
    assert gradient[0, :, 0].abs().max() == 0
    assert gradient[0, :, 1:].abs().min() > 0


def test_a_batch_of_ignored_pixels_gives_zero_and_keeps_the_graph():
    student, teacher = random_logits(1, 5, 2, 2)
    student.requires_grad_()
    loss = KDLoss(1.0)(student, teacher, torch.zeros(1, 2, 2, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert student.grad.abs().max() == 0


def test_balance_divergence_as_a_term_beside_another_method():
    student, teacher = random_logits(8, 10)
    labels = torch.arange(8)
    together = DKDLoss()(student, teacher, labels) + BalanceDivergenceLoss(0.0, 0.3, 4.0, 1.0)(student, teacher)
    expected = DKDLoss()(student, teacher, labels) + 0.3 * reverse_kl(student, teacher, 1.0).mean()
    torch.testing.assert_close(together, expected)


def test_balance_divergence_inside_dkd_sees_the_renormalised_others():
    student, teacher = random_logits(8, 10)
    labels = torch.arange(8)
    balanced = BalanceDivergenceLoss(0.5, 0.5, 4.0, 1.0)
    loss = DKDLoss(0.0, 2.0, 4.0, non_target_divergence=balanced.divergence)(student, teacher, labels)
    others = [torch.stack([row[torch.arange(10) != i] for i, row in enumerate(x)]) for x in (student, teacher)]
    torch.testing.assert_close(loss, 2 * balanced(*others))
    plain = DKDLoss(1.0, 8.0, 4.0, non_target_divergence=BalanceDivergenceLoss(1, 0, 4.0, 1.0).divergence)
    assert torch.equal(plain(student, teacher, labels), DKDLoss()(student, teacher, labels))


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: KDLoss(4.0)(s, t),
        lambda s, t: BalanceDivergenceLoss(0.5, 0.5, 4.0, 1.0)(s, t),
        lambda s, t: DKDLoss()(s, t, torch.zeros(len(s), dtype=torch.long)),
        lambda s, t: CorrelationCongruenceLoss(0.4, 2)(s, t),
    ],
)
def test_the_teacher_is_left_alone(loss):
    teacher = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10)).eval()
    student = nn.Linear(6, 10)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    x, _ = random_logits(8, 6)
    loss(student(x), teacher(x)).backward()
    torch.optim.SGD([*student.parameters(), *teacher.parameters()], lr=1.0).step()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert student.weight.grad.abs().max() > 0


CC_TEACHER = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
CC_STUDENT = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "golden"),
    [
        (CorrelationCongruenceLoss(gamma=0.4, order=2), 0.103534),
        (CorrelationCongruenceLoss(gamma=0.4, order=3), 0.116448),
        (CorrelationCongruenceLoss(gamma=0.4, order=None), 0.119305),
        (CongruenceLoss(bilinear_correlation), 0.444444),
    ],
)
def test_golden_correlation_congruence(loss, golden):
    assert loss(CC_STUDENT, CC_TEACHER).item() == pytest.approx(golden, abs=1e-6)


def test_correlation_congruence_sees_relations_only():
    student, teacher = (x.double() for x in random_logits(12, 6))
    loss = CorrelationCongruenceLoss(0.4, 2)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    assert loss(teacher, teacher) == 0
    assert loss(teacher @ rotation, teacher) < 1e-29
    torch.testing.assert_close(loss(student * 7, teacher), loss(student, teacher))
    assert loss(torch.cat([teacher, torch.zeros(12, 3, dtype=torch.float64)], dim=1), teacher) < 1e-29


@pytest.mark.parametrize("order", [2, None])
def test_correlation_congruence_gradcheck(order):
    student, teacher = (x.double() for x in random_logits(4, 3))
    loss = CorrelationCongruenceLoss(0.4, order)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student.requires_grad_())


def test_linear_kernel_gradcheck():
    student, teacher = (x.double() for x in random_logits(4, 3))
    loss = CongruenceLoss(mean_difference_correlation)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student.requires_grad_())


def test_the_published_weight_is_a_dead_term_on_unit_embeddings():
    """Weight 0.003 leaves a thousandth of KD's gradient or less; dividing by the ratio brings the term to life."""
    features, teacher_features = random_logits(64, 128)
    head, teacher_head = random_logits(128, 100, seed=1)
    features.requires_grad_()
    instance = KDLoss(4.0)(features @ head * 0.1, teacher_features @ teacher_head * 0.1)
    congruence = CorrelationCongruenceLoss(0.4, 2)(features, teacher_features)
    assert gradient_ratio(0.003 * congruence, instance, features) < 1e-3
    weight = 0.2 / gradient_ratio(congruence, instance, features)
    assert gradient_ratio(weight * congruence, instance, features) == pytest.approx(0.2)
    assert gradient_ratio(congruence, 0 * instance, features) == float("inf")


def test_half_precision_embeddings_are_widened():
    student, teacher = random_logits(8, 4)
    assert CorrelationCongruenceLoss(0.4, 2)(student.half(), teacher.half()).dtype == torch.float32


@pytest.mark.parametrize("loss", [KDLoss(1.0), BalanceDivergenceLoss(0.5, 0.5, 1.0, 1.0)])
def test_bad_logits_are_refused(loss):
    student, teacher = random_logits(4, 10)
    with pytest.raises(ShapeMismatch, match="class count"):
        loss(student, teacher[:, :9])
    with pytest.raises(ShapeMismatch, match=r"\[N, C\]"):
        loss(student[0], teacher[0])
    with pytest.raises(ShapeMismatch, match="bool"):
        loss(student, teacher, torch.ones(4))
    teacher[1, 1] = torch.nan
    with pytest.raises(NonFiniteInput, match="1 of 40 values of the teacher"):
        loss(student, teacher)
    with pytest.raises(NonFiniteInput, match="student"):
        loss(teacher, student)


def test_dkd_refuses_dense_logits_and_other_labels():
    student, teacher = random_logits(4, 10)
    with pytest.raises(ShapeMismatch, match="one class index per row"):
        DKDLoss()(student, teacher, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ShapeMismatch, match=r"\[N, C\]"):
        DKDLoss()(student.view(1, 10, 2, 2), teacher.view(1, 10, 2, 2), torch.zeros(1, dtype=torch.long))


def test_bad_embeddings_are_refused():
    student, teacher = random_logits(4, 10)
    loss = CorrelationCongruenceLoss(0.4, 2)
    with pytest.raises(BatchTooSmall, match="holds 1 sample"):
        loss(student[:1], teacher[:1])
    with pytest.raises(ShapeMismatch, match="one batch"):
        loss(student, teacher[:3])
    student[0, 0] = torch.inf
    with pytest.raises(NonFiniteInput, match="student's embeddings"):
        loss(student, teacher)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KDLoss(0.0),
        lambda: KDLoss(-1.0),
        lambda: BalanceDivergenceLoss(1.0, 1.0, 4.0, 0.0),
        lambda: DKDLoss(temperature=-4.0),
    ],
)
def test_impossible_temperatures_are_refused(make):
    with pytest.raises(InvalidTemperature, match="above 0"):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: BalanceDivergenceLoss(-0.1, 1.0, 4.0, 1.0),
        lambda: BalanceDivergenceLoss(0.0, 0.0, 4.0, 1.0),
        lambda: DKDLoss(non_target_weight=float("nan")),
        lambda: CorrelationCongruenceLoss(gamma=0.0),
        lambda: CorrelationCongruenceLoss(order=0),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()
