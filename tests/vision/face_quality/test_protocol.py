import math

import numpy as np
import pytest
import torch
from drawn_faces import drawn_face

from vision.face_quality.evaluate import EvaluationError
from vision.face_quality.protocol import (
    ORDERED_DEFECTS,
    SEVERITIES,
    compare_all,
    defect_series,
    group_table,
    ordered_share,
    score_drift,
    template_figures,
)


def population(people=30, photos=2, copies=5, dims=24, seed=0):
    """Features that mix their person with noise; the share of the person is the quality."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(people, dims, generator=generator), dim=1)
    identities = np.repeat(np.arange(people), photos * copies)
    originals = np.repeat(np.arange(people * photos), copies)
    quality = torch.rand(len(identities), generator=generator).double().sqrt().numpy()
    noise = torch.nn.functional.normalize(torch.randn(len(identities), dims, generator=generator), dim=1)
    share = torch.from_numpy(quality)[:, None].float()
    return share * centres[identities] + (1 - share) * noise, identities, originals, quality


def test_only_different_photographs_are_compared():
    features, identities, originals, _ = population(people=3, photos=2, copies=2)
    found = compare_all(features, identities, originals, fmr=0.1)
    assert len(found.mated) == 3 * 2 * 2
    assert len(found.non_mated) == 12 * 11 // 2 - 3 * 6
    assert (originals[found.mated[:, 0]] != originals[found.mated[:, 1]]).all()
    assert (identities[found.mated[:, 0]] == identities[found.mated[:, 1]]).all()
    assert (found.non_mated_similarity >= found.threshold).mean() <= 0.1


def test_true_quality_beats_chance_and_its_interval_holds_it():
    features, identities, originals, quality = population()
    comparisons = compare_all(features, identities, originals, fmr=1e-2)
    chance = np.random.default_rng(0).random(len(quality))
    assert comparisons.area(quality) < 0.8 < 0.93 < comparisons.area(chance) < 1.07
    low, high = comparisons.interval(quality)
    assert low < comparisons.area(quality) < high < 0.9
    assert comparisons.area(3 * quality - 5) == comparisons.area(quality)
    rederived = comparisons.curve(quality, "re-derived threshold")
    assert rederived.convention == "re-derived threshold" and rederived.fnmr[0] == pytest.approx(comparisons.fnmr0)


@pytest.mark.parametrize("identities", [np.arange(6), np.zeros(6, dtype=int)])
def test_pairs_of_both_kinds_are_needed(identities):
    with pytest.raises(EvaluationError, match="two photographs"):
        compare_all(torch.randn(6, 4), identities, np.arange(6), 0.1)


def test_too_many_images_are_refused_before_their_pairs_are_made():
    count = 8_001
    with pytest.raises(EvaluationError, match="fewer copies"):
        compare_all(torch.zeros(count, 1), np.zeros(count, dtype=int), np.arange(count), 0.1)


def test_groups_say_what_discarding_does_to_each():
    features, identities, originals, quality = population()
    quality = np.where(identities < 10, 0.3 * quality, quality)
    groups = ["low" if person < 10 else "high" for person in identities]
    table = group_table(compare_all(features, identities, originals, 1e-2), quality, groups, 0.2)
    assert (table["low"]["images"], table["high"]["images"]) == (100, 200)
    assert table["low"]["discarded"] > 0.3 > table["high"]["discarded"]
    assert 100 * table["low"]["discarded"] + 200 * table["high"]["discarded"] == pytest.approx(60, abs=1)
    assert table["high"]["fnmr_after"] < table["high"]["fnmr_before"]
    everything = group_table(compare_all(features, identities, originals, 1e-2), quality, groups, 0.999)
    assert math.isnan(everything["low"]["fnmr_after"])


def test_templates_gain_by_true_quality():
    features, identities, originals, quality = population(people=120, copies=2, dims=8, seed=1)
    figures = template_figures(features, identities, originals, {"true": quality, "wrong": -quality}, 1e-2)
    assert figures["true"] < figures["uniform"] < figures["wrong"]
    same = template_figures(features, identities, originals, {"constant": np.full(len(quality), 7.0)}, 1e-2)
    assert same["constant"] == same["uniform"]


def test_the_ordered_share_counts_pairs_of_severities():
    falling = np.array([[5.0, 5.0], [4.0, 4.0], [3.0, 3.0]])
    assert ordered_share(falling) == 1.0
    assert ordered_share(-falling) == 0.0
    assert ordered_share(np.zeros((3, 2))) == 0.5
    assert ordered_share(np.array([[3.0], [4.0], [1.0]])) == pytest.approx(2 / 3)


def test_defects_come_at_every_severity():
    images = [drawn_face(1).resize((40, 40)), drawn_face(2).resize((40, 40))]
    series = defect_series(images)
    assert list(series) == list(ORDERED_DEFECTS)
    for steps in series.values():
        assert [len(step) for step in steps] == [2] * len(SEVERITIES)
        assert steps[0][1].tobytes() == images[1].tobytes() != steps[-1][1].tobytes()


def test_drift_is_the_change_of_the_score():
    crops = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    crops[..., :2] = 64

    def left_half(batch):
        return (batch[..., :2].double().mean(dim=(1, 2, 3)) / 255).numpy()

    drift = score_drift(left_half, crops)
    assert drift["flip"] == pytest.approx(64 / 255)
    assert drift["gamma 0.5"] == pytest.approx((64 / 255) ** 0.5 - 64 / 255, abs=2e-3) and drift["gamma 2"] < 0
