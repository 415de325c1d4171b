"""Labels from class centres, and their balancing."""

import math

import pytest
import torch
from torch.nn import functional

from vision.face_quality import LabelInputError, balancing_weights, quality_labels
from vision.face_quality.labels import ranks_within


def noise(identities, images, dims=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(identities * images, dims, generator=generator, dtype=torch.float64)
    return features, torch.arange(identities).repeat_interleave(images)


@pytest.mark.parametrize(
    ("images", "inflated"), [(2, 0.708), (5, 0.446), (10, 0.317), (20, 0.224), (50, 0.142), (100, 0.100)]
)
def test_noise_in_its_own_centre_gets_one_over_root_n(images, inflated):
    features, identities = noise(100, images)
    plain = quality_labels(features, identities, leave_one_out=False, reweightings=0)
    assert plain.raw.mean().item() == pytest.approx(inflated, abs=2e-3)
    assert plain.raw.mean().item() == pytest.approx(1 / math.sqrt(images), abs=3e-3)
    without = quality_labels(features, identities, leave_one_out=True, reweightings=0)
    assert abs(without.raw.mean().item()) < 5e-3


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("reweightings", [0, 1])
def test_identical_features_get_one(leave_one_out, reweightings):
    features = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).expand(12, 16)
    found = quality_labels(features, torch.zeros(12), leave_one_out, reweightings)
    torch.testing.assert_close(found.labels, torch.ones(12))
    assert found.usable.all()


def test_the_length_of_features_does_not_matter():
    features, identities = noise(5, 12, dims=8)
    lengths = torch.rand(60, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    torch.testing.assert_close(
        quality_labels(features * lengths, identities).raw, quality_labels(features, identities).raw
    )


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_equals_the_loop(leave_one_out):
    features, identities = noise(4, 6, dims=8)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    features, identities = features[order], identities[order] * 7 + 3
    unit = functional.normalize(features)
    weights = torch.ones(24, dtype=torch.float64)
    for _ in range(2):
        raw = torch.zeros(24, dtype=torch.float64)
        for i in range(24):
            centre = sum(
                weights[j] * unit[j]
                for j in range(24)
                if identities[j] == identities[i] and not (leave_one_out and i == j)
            )
            raw[i] = (unit[i] @ centre) / centre.norm() if isinstance(centre, torch.Tensor) and centre.norm() > 0 else 0
        weights = raw.clamp(min=0)
    assert torch.unique(identities).numel() == 4
    torch.testing.assert_close(quality_labels(features, identities, leave_one_out, 1).raw, raw)


def spread_images(images, seed=0):
    """Identities whose images mix their centre with noise; the share of the centre is the true quality."""
    generator = torch.Generator().manual_seed(seed)
    centres = functional.normalize(torch.randn(400, 32, generator=generator, dtype=torch.float64))
    identities = torch.arange(400).repeat_interleave(images)
    share = torch.rand(len(identities), 1, generator=generator, dtype=torch.float64)
    other = functional.normalize(torch.randn(len(identities), 32, generator=generator, dtype=torch.float64))
    features = functional.normalize(share * centres[identities] + (1 - share) * other)
    return features, identities, (features * centres[identities]).sum(1)


@pytest.mark.parametrize("images", [5, 10, 30])
def test_reweighting_brings_labels_closer_to_the_true_centre(images):
    features, identities, truth = spread_images(images)

    def correlation(**options):
        raw = quality_labels(features, identities, **options).raw
        return torch.corrcoef(torch.stack([raw, truth]))[0, 1].item()

    plain, left_out = correlation(reweightings=0, leave_one_out=False), correlation(reweightings=0)
    assert left_out > 0.9
    assert correlation(reweightings=1, leave_one_out=False) > plain
    assert correlation(reweightings=1) > left_out


def test_small_identities_are_not_usable_and_never_nan():
    features, _ = noise(1, 14, dims=8)
    identities = torch.tensor([0] * 11 + [1, 2, 2])
    features[:11] = features[0] + 0.1 * features[:11]
    found = quality_labels(features, identities)
    assert found.raw.isfinite().all()
    assert found.usable.tolist() == [True] * 11 + [False] * 3
    assert found.raw[11] == 0
    assert quality_labels(features, identities, min_images=1, min_raw=-1.0).usable.tolist() == [True] * 11 + [
        False,
        True,
        True,
    ]


def test_a_foreign_image_is_not_usable():
    features = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).repeat(12, 1)
    features[3] = -features[3]
    found = quality_labels(features, torch.zeros(12))
    assert found.raw[3] < 0 and found.labels[3] == 0
    assert found.usable.tolist() == [i != 3 for i in range(12)]


def test_the_only_image_with_weight_has_no_centre_but_itself():
    """The second and third disagree, so that only the first keeps a weight; it then is the others' centre."""
    features = torch.tensor([[1.0, 0.0], [0.2, 1.0], [0.2, -1.0]])
    first = quality_labels(features, torch.zeros(3), reweightings=0).raw
    assert first[0] == pytest.approx(1.0) and (first[1:] < 0).all()
    reweighted = quality_labels(features, torch.zeros(3), reweightings=1).raw
    assert reweighted.tolist() == pytest.approx([0.0, 0.2 / 1.04**0.5, 0.2 / 1.04**0.5])


@pytest.mark.parametrize(
    ("features", "identities", "said"),
    [
        (torch.ones(3, 4), torch.zeros(2), r"\(3, 4\) and identities \(2,\)"),
        (torch.ones(3), torch.zeros(3), r"features are \(3,\)"),
        (torch.zeros(3, 4), torch.zeros(3), "3 of 3 features are zero"),
        (torch.full((3, 4), torch.nan), torch.zeros(3), "3 of 3 features are zero, NaN"),
    ],
)
def test_bad_inputs_are_refused(features, identities, said):
    with pytest.raises(LabelInputError, match=said):
        quality_labels(features, identities)


def test_balancing_flattens_the_bins():
    labels = torch.cat([torch.full((900,), 0.72), torch.full((100,), 0.22), torch.ones(25)])
    flat = balancing_weights(labels, power=1.0, max_oversampling=100.0)
    assert flat.mean().item() == pytest.approx(1.0)
    shares = [flat[:900].sum(), flat[900:1000].sum(), flat[1000:].sum()]
    torch.testing.assert_close(torch.stack(shares), torch.full((3,), 1025 / 3))
    torch.testing.assert_close(balancing_weights(labels, power=0.0), torch.ones(1025))
    root = balancing_weights(labels, power=0.5)
    assert (root[900] / root[0]).item() == pytest.approx(3.0)


def test_balancing_is_capped():
    labels = torch.cat([torch.full((100_000,), 0.7), torch.full((10,), 0.1), torch.full((500,), 0.3)])
    weights = balancing_weights(labels, power=1.0)
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-4)
    assert weights.max().item() == pytest.approx(10.0, rel=1e-3)
    assert weights[100_000] == weights.max()
    with pytest.raises(LabelInputError, match="at least 1"):
        balancing_weights(labels, max_oversampling=0.5)


def test_ranks_within_an_identity_are_shares_of_its_other_images():
    raw = torch.tensor([0.9, 0.97, 0.1, 0.95, 0.2, 0.2, 0.7])
    identities = torch.tensor([5, 5, 3, 5, 3, 3, 8])
    found = ranks_within(raw, identities)
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 0.0, 0.5, 0.75, 0.75, 0.5]))
    torch.testing.assert_close(ranks_within(raw**3, identities), found)
    # Somebody whose cosines are lower on the whole gets no lower labels.
    lower = torch.where(identities == 5, raw - 0.6, raw)
    torch.testing.assert_close(ranks_within(lower, identities), found)
