import numpy as np
import pytest
from PIL import Image

from vision.backbones.preprocessing import Preprocessing
from vision.data.augmentation import AugmentationOptions, augment
from vision.data.view import centre_crop, resize_short_side

PREPROCESSING = Preprocessing(image_size=16, resize=20)


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards, blue is full: black borders and mirrored images show."""
    x, y = np.meshgrid(np.linspace(10, 250, width), np.linspace(10, 250, height))
    return Image.fromarray(np.stack((x, y, np.full_like(x, 255)), axis=-1).astype(np.uint8))


def draw(options: AugmentationOptions, seed: int = 0, size: tuple[int, int] = (50, 30)) -> np.ndarray:
    return np.asarray(augment(gradient(*size), PREPROCESSING, options, np.random.default_rng(seed))).astype(int)


@pytest.mark.parametrize("size", [(50, 30), (30, 50), (20, 20), (7, 90)])
def test_centre_crop(size: tuple[int, int]) -> None:
    image = np.asarray(centre_crop(gradient(*size), PREPROCESSING.resize, PREPROCESSING.image_size)).astype(int)
    assert image.shape == (16, 16, 3)
    assert (image[..., 2] == 255).all()
    assert abs(image[7:9, 7:9, :2].mean() - 130) < 8, "the middle stays in the middle"


def test_resizing_keeps_the_ratio() -> None:
    assert resize_short_side(gradient(100, 50), 20).size == (40, 20)
    assert resize_short_side(gradient(50, 100), 20).size == (20, 40)


@pytest.mark.parametrize("crop", ["resized", "padded", "centre"])
@pytest.mark.parametrize("size", [(50, 30), (16, 16), (5, 70)])
def test_every_crop_has_the_size(crop: str, size: tuple[int, int]) -> None:
    for seed in range(5):
        assert draw(AugmentationOptions(crop=crop, color_jitter=0.3), seed, size).shape == (16, 16, 3)


def test_chance_comes_from_the_generator_alone() -> None:
    options = AugmentationOptions(color_jitter=0.4)
    assert (draw(options, 3) == draw(options, 3)).all()
    assert (draw(options, 3) != draw(options, 4)).any()


def test_resized_crops_stay_inside_and_respect_the_scale() -> None:
    shares = []
    for seed in range(40):
        image = draw(AugmentationOptions(scale=(0.25, 0.5), ratio=(1.0, 1.0), flip=False), seed, (40, 40))
        assert (image[..., 2] == 255).all()
        shares.append((image[0, -1, 0] - image[0, 0, 0]) / 240)
    assert min(shares) > 0.4 and max(shares) < 0.75


def test_flip_mirrors_about_half() -> None:
    mirrored = sum(
        bool(image[0, 0, 0] > image[0, -1, 0])
        for image in (draw(AugmentationOptions(crop="centre"), seed) for seed in range(60))
    )
    assert 15 < mirrored < 45
    assert not any(
        (image := draw(AugmentationOptions(crop="centre", flip=False), seed))[0, 0, 0] > image[0, -1, 0]
        for seed in range(20)
    )


def test_padded_crops_shift_and_fill_with_black() -> None:
    images = [draw(AugmentationOptions(crop="padded", padding=4, flip=False), seed, (16, 16)) for seed in range(40)]
    borders = [int((image[8, :, 2] == 0).sum()) for image in images]
    assert min(borders) == 0
    assert max(borders) == 4


def test_jitter_changes_colours_within_bounds() -> None:
    plain = draw(AugmentationOptions(crop="centre", flip=False))
    changed = draw(AugmentationOptions(crop="centre", flip=False, color_jitter=0.4))
    assert changed.shape == plain.shape
    assert 0 < abs(changed - plain).mean() < 100


def test_uneven_light_changes_coarse_colours_and_keeps_details() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(60, 130, (112, 112, 3), dtype=np.uint8))
    options = AugmentationOptions(crop="centre", flip=False, uneven_light=0.5)
    preprocessing = Preprocessing(image_size=112, resize=112)
    plain = np.asarray(image).astype(float)
    lit = [np.asarray(augment(image, preprocessing, options, np.random.default_rng(n))).astype(float) for n in (1, 2)]
    cells = [x.reshape(14, 8, 14, 8, 3).mean(axis=(1, 3)) for x in (plain, *lit)]
    assert all(np.abs(cell - cells[0]).mean() > 15 for cell in cells[1:])
    for x in lit:
        steps, changed = np.diff(np.log(plain), axis=1), np.diff(np.log(np.maximum(x, 1)), axis=1)
        assert np.corrcoef(steps.ravel(), changed.ravel())[0, 1] > 0.9
    assert not options.is_deterministic


@pytest.mark.parametrize(("values", "message"), [
    ({"crop": "random"}, "crop is 'random'; allowed are resized, padded, centre"),
    ({"scale": (0.5, 0.2)}, "scale is"), ({"scale": (0.0, 1.0)}, "scale is"), ({"ratio": (2.0, 1.0)}, "ratio is"),
    ({"color_jitter": 1.0}, "color_jitter 1.0"), ({"padding": -1}, "padding -1"),
    ({"uneven_light": 3.0}, "uneven_light 3.0"), ({"light_cells": 0}, "light_cells 0"),
])  # fmt: skip
def test_impossible_options_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentationOptions(**values)  # type: ignore[arg-type]
