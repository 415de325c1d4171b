"""The 0 to 100 scale and quality-weighted templates."""

import math

import pytest
import torch
from torch.nn import functional

from vision.face_quality import FAILURE_TO_ASSESS, QualityScale, pool_template

UNIFIED = QualityScale(midpoint=23.0, width=2.6)
INTER_EYE = QualityScale(midpoint=70.0, width=20.0)


@pytest.mark.parametrize(
    ("scale", "raw", "quality"),
    [
        *((UNIFIED, raw, q) for raw, q in ((24.329985, 63), (24.698753, 66), (18.811047, 17), (16.142765, 7))),
        *((UNIFIED, raw, q) for raw, q in ((20, 24), (23, 50), (26, 76), (30, 94))),
        *((INTER_EYE, raw, q) for raw, q in ((40, 18), (50, 27), (70, 50), (90, 73), (110, 88))),
    ],
)
def test_goldens_of_the_reference_implementation(scale, raw, quality):
    assert scale.quality(raw) == quality


def test_the_scale_is_bounded_and_monotone():
    values = [UNIFIED.quality(raw) for raw in range(-1000, 1000)]
    assert values == sorted(values)
    assert values[0] == 0 and values[-1] == 100
    assert UNIFIED.quality(-1e308) == 0 and UNIFIED.quality(1e308) == 100


@pytest.mark.parametrize("raw", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_a_failure_to_assess(raw):
    assert UNIFIED.quality(raw) == FAILURE_TO_ASSESS == -1


def test_impossible_scales_are_refused():
    with pytest.raises(ValueError, match="above 0"):
        QualityScale(0.5, 0.0)


def test_weighting_beats_selection_beats_uniform_pooling():
    """Templates of 8 frames that mix their identity with noise: acceptance of mated templates at an FMR of 1e-3."""
    generator = torch.Generator().manual_seed(0)
    centres = functional.normalize(torch.randn(400, 32, generator=generator), dim=1)

    def templates(seed):
        generator = torch.Generator().manual_seed(seed)
        # Beta(1, 3) by inverting its distribution function 1 - (1 - x)^3.
        share = 1 - torch.rand(400, 8, 1, generator=generator).pow(1 / 3)
        noise = functional.normalize(torch.randn(400, 8, 32, generator=generator), dim=2)
        return functional.normalize(share * centres[:, None] + (1 - share) * noise, dim=2)

    def acceptance(pool):
        first, second = (torch.stack([pool(f, c) for f, c in zip(templates(s), centres, strict=True)]) for s in (1, 2))
        similarity = first @ second.T
        impostors = similarity[~torch.eye(400, dtype=torch.bool)]
        return (similarity.diagonal() > impostors.quantile(0.999)).float().mean().item()

    uniform = acceptance(lambda f, c: pool_template(f, torch.ones(8)))
    weighted = acceptance(lambda f, c: pool_template(f, (f @ c).clamp(min=0)))
    best = acceptance(lambda f, c: pool_template(f, ((f @ c) == (f @ c).max()).float()))
    assert weighted > best > uniform


def test_images_of_one_medium_are_joined_first():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    media = torch.tensor([7, 7, 7, 9])
    torch.testing.assert_close(pool_template(features, torch.ones(4), media), torch.full((2,), 0.5**0.5))
    torch.testing.assert_close(
        pool_template(features, torch.ones(4)), functional.normalize(torch.tensor([3.0, 1.0]), dim=0)
    )


def test_weights_that_sum_to_zero_count_alike():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert torch.equal(pool_template(features, torch.zeros(2)), pool_template(features, torch.ones(2)))


@pytest.mark.parametrize(
    ("features", "quality"),
    [
        (torch.ones(2, 3), torch.tensor([1.0, -1.0])),
        (torch.ones(2, 3), torch.tensor([1.0, torch.nan])),
        (torch.ones(2, 3), torch.ones(3)),
        (torch.ones(0, 3), torch.ones(0)),
    ],
)
def test_impossible_templates_are_refused(features, quality):
    with pytest.raises(ValueError, match=r"quality"):
        pool_template(features, quality)
