"""Miners of regions: what they pick, in which numbers, and what they refuse."""

import itertools

import pytest
import torch

from vision.detection.boxes import box_iou
from vision.mining import (
    OHEM,
    MiningInputError,
    RandomSample,
    Strata,
    StratifiedOHEM,
    focal_loss,
    moving_strata,
    staged_strata,
)
from vision.mining.stratified_ohem import DEFAULT_SCHEDULE, END, START, assign_strata, quotas


def regions(count=300, seed=0, foreground=0.3):
    """Random losses, boxes and labels; background has no localisation loss."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 200
    boxes = torch.cat([corners, corners + 20 + torch.rand(count, 2, generator=generator) * 40], dim=1)
    labels = torch.randint(1, 4, (count,), generator=generator)
    labels[torch.rand(count, generator=generator) > foreground] = 0
    classification = torch.rand(count, generator=generator) * 3
    localization = torch.rand(count, generator=generator) * 3 * (labels > 0)
    return classification, localization, boxes, labels


MINERS = [OHEM(64), StratifiedOHEM(64), RandomSample(64)]


@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("progress", [0.0, 0.6, 1.0])
def test_a_miner_keeps_exactly_its_batch(miner, progress):
    chosen = miner(*regions(), progress)
    assert len(chosen) == len(chosen.unique()) == 64


@pytest.mark.parametrize("miner", [OHEM(500), OHEM(500, None), StratifiedOHEM(500), RandomSample(500, 1.0)])
def test_a_miner_that_may_keep_more_than_there_is(miner):
    classification, localization, boxes, labels = regions(40)
    far_apart = boxes + torch.arange(40.0)[:, None] * 1000
    chosen = miner(classification, localization, far_apart, labels, 0.5)
    assert sorted(chosen.tolist()) == list(range(40))


@pytest.mark.parametrize("miner", [*MINERS, OHEM(8, None)])
def test_a_miner_of_nothing(miner):
    chosen = miner(*regions(0), 0.0)
    assert chosen.tolist() == [] and chosen.dtype == torch.long


def test_ohem_without_suppression_is_top_k_of_the_summed_loss():
    classification, localization, boxes, labels = regions()
    chosen = OHEM(64, nms_threshold=None)(classification, localization, boxes, labels, 0.0)
    expected = (classification + localization).argsort(descending=True)[:64]
    assert torch.equal(chosen, expected)


def test_ohem_equals_the_loop():
    classification, localization, boxes, labels = regions()
    loss, kept = classification + localization, []
    overlaps = box_iou(boxes, boxes)
    for i in loss.argsort(descending=True).tolist():
        if all(labels[i] != labels[k] or overlaps[i, k] <= 0.3 for k in kept):
            kept.append(i)
    assert len(kept) < 200
    for batch_size in (64, 500):
        assert OHEM(batch_size, 0.3)(classification, localization, boxes, labels, 0.0).tolist() == kept[:batch_size]


def test_ohem_keeps_overlapping_regions_of_different_labels():
    box = torch.tensor([[0.0, 0, 10, 10]]).repeat(4, 1)
    chosen = OHEM(4)(torch.tensor([1.0, 2, 3, 4]), torch.zeros(4), box, torch.tensor([0, 0, 1, 1]), 0.0)
    assert chosen.tolist() == [3, 1]


def test_only_chosen_regions_get_a_gradient():
    classification, localization, boxes, labels = regions()
    classification.requires_grad_()
    chosen = OHEM(64)(classification, localization, boxes, labels, 0.0)
    assert not chosen.requires_grad
    classification[chosen].mean().backward()
    outside = torch.ones(300, dtype=torch.bool)
    outside[chosen] = False
    assert (classification.grad[outside] == 0).all()
    assert (classification.grad[chosen] > 0).all()


@pytest.mark.parametrize("miner", [OHEM(64), StratifiedOHEM(64)])
def test_the_order_of_the_candidates_does_not_matter(miner):
    inputs = regions()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    shuffled = miner(*(x[order] for x in inputs), 0.3)
    assert torch.equal(order[shuffled], miner(*inputs, 0.3))


def test_equal_losses_go_to_the_lower_index():
    boxes = torch.arange(6.0)[:, None] * 100 + torch.tensor([0.0, 0, 10, 10])
    for miner in (OHEM(3), OHEM(3, None), StratifiedOHEM(3)):
        assert miner(torch.ones(6), torch.zeros(6), boxes, torch.zeros(6, dtype=torch.long), 0.0).tolist() == [0, 1, 2]


def test_mining_finds_the_regions_that_are_hard():
    """30 objects of known hardness, each seen by 5 overlapping candidates: the 10 hardest objects, once each."""
    generator = torch.Generator().manual_seed(0)
    hardness = torch.randperm(30, generator=generator).float()
    object_boxes = torch.arange(30.0)[:, None] * 100 + torch.tensor([0.0, 0, 60, 60])
    boxes = object_boxes.repeat_interleave(5, 0) + torch.rand(150, 4, generator=generator) * 4
    loss = hardness.repeat_interleave(5) + torch.rand(150, generator=generator) * 0.5
    chosen = OHEM(10)(loss, torch.zeros(150), boxes, torch.ones(150, dtype=torch.long), 0.0)
    hardest = set(hardness.topk(10).indices.tolist())
    assert set((chosen // 5).tolist()) == hardest
    without_suppression = OHEM(10, None)(loss, torch.zeros(150), boxes, torch.ones(150, dtype=torch.long), 0.0)
    assert len(set((without_suppression // 5).tolist())) == 2


@pytest.mark.parametrize("miner", MINERS)
def test_any_two_stage_head_is_mined_from_its_unreduced_losses(miner):
    """A Fast R-CNN head as torchvision has it: class-specific deltas [R, 4 C], one row of targets a region."""
    _, _, boxes, labels = regions()
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(300, 32, generator=generator)
    class_logits, box_regression = torch.nn.Linear(32, 4), torch.nn.Linear(32, 16)
    targets = torch.randn(300, 4, generator=generator)

    classification = torch.nn.functional.cross_entropy(class_logits(features), labels, reduction="none")
    own_class = box_regression(features).view(300, 4, 4)[torch.arange(300), labels]
    distance = torch.nn.functional.smooth_l1_loss(own_class, targets, reduction="none", beta=1 / 9).sum(dim=1)
    localization = distance * (labels > 0)
    chosen = miner(classification, localization, boxes, labels, 0.4)
    (classification[chosen].mean() + localization[chosen].mean()).backward()
    assert len(chosen) == 64
    assert class_logits.weight.grad.abs().max() > 0 and box_regression.weight.grad.abs().max() > 0


def test_quotas_example():
    assert quotas(128, START.shares, [1000] * 4) == [90, 19, 13, 6]


@pytest.mark.parametrize("batch_size", [1, 7, 64, 128, 255])
def test_quotas_of_plentiful_strata_are_within_one_of_their_share(batch_size):
    for step in range(11):
        shares = moving_strata(START, END)(step / 10).shares
        given = quotas(batch_size, shares, [1000] * 4)
        assert sum(given) == batch_size
        assert all(abs(n - batch_size * share) < 1 for n, share in zip(given, shares, strict=True))


@pytest.mark.parametrize("populations", list(itertools.product((0, 3, 40), repeat=4)))
def test_quotas_never_exceed_what_there_is_and_use_all_they_may(populations):
    given = quotas(64, START.shares, populations)
    assert all(n <= population for n, population in zip(given, populations, strict=True))
    assert sum(given) == min(64, sum(populations))


def test_an_empty_stratum_gives_its_quota_away():
    assert quotas(10, (0.5, 0.5, 0.0, 0.0), [100, 0, 0, 5]) == [8, 0, 0, 2]
    assert quotas(10, (0.25, 0.25, 0.25, 0.25), [100, 0, 100, 100]) == [4, 0, 3, 3]


def test_strata_by_hand():
    classification = torch.tensor([1.0, 0.0, 3.0, 1.0, 1.0, 0.0])
    localization = torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0, 1.0])
    assert assign_strata(classification, localization, (0.75, 0.5, 0.25)).tolist() == [0, 0, 0, 1, 2, 3]


def test_each_stratum_gives_its_costliest_regions():
    classification, localization, boxes, labels = regions(2000, foreground=0.9)
    chosen = StratifiedOHEM(64, nms_threshold=None)(classification, localization, boxes, labels, 0.0)
    loss, stratum = classification + localization, assign_strata(classification, localization, START.cut_points)
    for index, quota in enumerate(quotas(64, START.shares, torch.bincount(stratum).tolist())):
        members = (stratum == index).nonzero().flatten()
        expected = members[loss[members].argsort(descending=True)[:quota]]
        assert set(expected.tolist()) == set(chosen[stratum[chosen] == index].tolist())
    assert torch.equal(chosen, chosen[loss[chosen].argsort(descending=True)])


def test_late_in_training_more_localisation_is_mined():
    inputs = regions(2000, foreground=0.9)

    def share(progress):
        chosen = StratifiedOHEM(200)(*inputs, progress)
        return (assign_strata(inputs[0], inputs[1], START.cut_points)[chosen] >= 2).float().mean().item()

    assert share(0.0) == pytest.approx(0.15, abs=0.01)
    assert share(0.6) == pytest.approx(0.275, abs=0.01)
    assert share(1.0) == pytest.approx(0.40, abs=0.01)


def test_with_all_cuts_at_zero_it_is_ohem():
    strata = Strata((0, 0, 0), (0.4, 0.2, 0.2, 0.2))
    inputs = regions()
    assert torch.equal(StratifiedOHEM(64, lambda progress: strata)(*inputs, 0.5), OHEM(64)(*inputs, 0.5))


def test_with_the_shares_ohem_happens_to_take_it_takes_the_same_regions():
    inputs = regions(foreground=0.9)
    by_ohem = OHEM(64)(*inputs, 0.0)
    counts = torch.bincount(assign_strata(inputs[0], inputs[1], START.cut_points)[by_ohem], minlength=4)
    strata = Strata(START.cut_points, tuple((counts / 64).tolist()))
    assert torch.equal(StratifiedOHEM(64, lambda progress: strata)(*inputs, 0.0), by_ohem)


def test_an_image_of_background_falls_back_to_the_first_stratum():
    classification, _, boxes, labels = regions(foreground=0.0)
    inputs = (classification, torch.zeros(300), boxes, labels)
    assert torch.equal(StratifiedOHEM(64)(*inputs, 1.0), OHEM(64)(*inputs, 1.0))


def test_schedules():
    moving = moving_strata(START, END)
    assert moving(0.0) == START and moving(1.0) == END
    assert moving(0.5).shares == pytest.approx((0.55, 0.175, 0.15, 0.125))
    assert all(sum(moving(step / 100).shares) == pytest.approx(1) for step in range(101))
    assert [DEFAULT_SCHEDULE(p).shares[0] for p in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)] == pytest.approx(
        [0.7, 0.7, 0.55, 0.55, 0.4, 0.4]
    )


def test_random_sample_bounds_the_foreground():
    inputs = regions(foreground=0.9)
    sampler = RandomSample(64, 0.25, torch.Generator().manual_seed(3))
    first, second = sampler(*inputs, 0.0), sampler(*inputs, 0.0)
    assert (inputs[3][first] > 0).sum() == 16
    assert not torch.equal(first, second)
    again = RandomSample(64, 0.25, torch.Generator().manual_seed(3))
    assert torch.equal(again(*inputs, 0.0), first)
    torch.manual_seed(3)
    assert torch.equal(RandomSample(64, 0.25)(*inputs, 0.0), first), "without a generator it is torch's own"


def test_focal_loss_equals_the_definition():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=generator, dtype=torch.float64, requires_grad=True)
    positive = torch.rand(50, generator=generator) < 0.3
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, positive.double(), reduction="none")
    p = torch.where(positive, logits.sigmoid(), 1 - logits.sigmoid())
    expected = -torch.where(positive, 0.25, 0.75) * (1 - p) ** 2 * p.log()
    torch.testing.assert_close(focal_loss(cross_entropy, positive), expected)
    torch.testing.assert_close(
        focal_loss(cross_entropy, positive, gamma=0), torch.where(positive, 0.25, 0.75) * cross_entropy
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: OHEM(0),
        lambda: StratifiedOHEM(-1),
        lambda: RandomSample(8, 1.5),
        lambda: Strata((0.2, 0.5, 0.7), START.shares),
        lambda: Strata(START.cut_points, (0.5, 0.5, 0.5, 0.0)),
        lambda: Strata(START.cut_points, (1.5, -0.5, 0.0, 0.0)),
        lambda: staged_strata([]),
        lambda: staged_strata([(0.2, START)]),
        lambda: staged_strata([(0.0, START), (0.0, END)]),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(MiningInputError, match="must"):
        make()


def test_focal_gamma_between_zero_and_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        focal_loss(torch.ones(1), torch.ones(1, dtype=torch.bool), gamma=0.5)


@pytest.mark.parametrize("miner", MINERS)
def test_bad_inputs_are_refused(miner):
    classification, localization, boxes, labels = regions()
    with pytest.raises(MiningInputError, match="must be"):
        miner(classification, localization, boxes[:-1], labels, 0.0)
    with pytest.raises(MiningInputError, match="progress"):
        miner(classification, localization, boxes, labels, 1.5)
    classification[3] = torch.nan
    with pytest.raises(MiningInputError, match="NaN"):
        miner(classification, localization, boxes, labels, 0.0)
