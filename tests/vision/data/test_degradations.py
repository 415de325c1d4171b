import numpy as np
import pytest
from PIL import Image

from vision.backbones.preprocessing import Preprocessing
from vision.data.augmentation import AugmentationOptions, augment
from vision.data.degradations import DEGRADATIONS, degrade, degrade_at_random, turn


def picture(side=112):
    """Structure at every scale, as a photograph has."""
    generator = np.random.default_rng(0)
    total = np.zeros((side, side, 3))
    for cells in (4, 14, 56):
        noise = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), dtype=float) / cells**0.5
    return Image.fromarray((255 * total / total.max()).astype(np.uint8))


def difference(first, second):
    return np.abs(np.asarray(first).astype(float) - np.asarray(second)).mean()


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_the_image_stays_at_severity_0_and_moves_away_with_it(kind):
    image = picture()

    def mean_change(severity):
        draws = [degrade(image, kind, severity, np.random.default_rng(seed)) for seed in range(8)]
        assert all(draw.size == image.size and draw.mode == "RGB" for draw in draws)
        return np.mean([difference(image, draw) for draw in draws])

    assert mean_change(0.0) == 0
    changes = [mean_change(severity) for severity in (0.1, 0.4, 0.7, 1.0)]
    assert changes == sorted(changes) and changes[-1] > 10


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_the_generator_is_the_only_chance(kind):
    image = picture(40)
    first, second = (degrade(image, kind, 0.6, np.random.default_rng(5)) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_a_turned_head_is_narrower_and_keeps_its_middle():
    image = Image.new("RGB", (100, 100))
    image.paste("white", (20, 20, 80, 80))
    image.paste("red", (49, 49, 51, 51))
    turned = np.asarray(turn(image, 1.0, np.random.default_rng(0))).astype(int)
    white = np.flatnonzero(turned[50, :, 1] > 128)
    assert 20 < white.max() - white.min() < 45
    assert (turned[49:51, 49:51, 1] < 160).all() and (turned[49:51, 49:51, 0] > 200).all()
    heights = [(turned[:, column, 0] > 128).sum() for column in (white.min() + 2, white.max() - 2)]
    assert abs(heights[0] - heights[1]) > 10


@pytest.mark.parametrize(("kind", "severity"), [("rain", 0.5), ("blur", 1.1), ("blur", -0.1)])
def test_what_cannot_be_done_is_refused(kind, severity):
    with pytest.raises(ValueError, match=r"allowed are|from 0 to 1"):
        degrade(picture(20), kind, severity, np.random.default_rng(0))


def test_random_defects_differ():
    generator, image = np.random.default_rng(0), picture(40)
    assert len({degrade_at_random(image, generator).tobytes() for _ in range(20)}) >= 18


def test_augmentation_degrades_its_share():
    image, preprocessing = picture(40), Preprocessing(40, 40)
    options = AugmentationOptions(crop="centre", flip=False, degrade=0.5)
    assert not options.is_deterministic
    results = [augment(image, preprocessing, options, np.random.default_rng(seed)) for seed in range(60)]
    changed = sum(difference(image, result) > 0 for result in results)
    assert 15 <= changed <= 45
    with pytest.raises(ValueError, match="share"):
        AugmentationOptions(degrade=1.5)
