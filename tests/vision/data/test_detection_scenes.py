from pathlib import Path

import numpy as np
import pytest

from vision.data.detection import DetectionDataOptions
from vision.data.detection_scenes import (
    CONTRAST,
    NOISE,
    SHAPES,
    SPLITS,
    Draw,
    draw_all,
    draw_needles,
    draw_shapes,
    hidden,
)
from vision.data.detection_sources import open_detection
from vision.data.sources import DataError


@pytest.mark.parametrize(("draw", "scene", "sides"), [(draw_needles, 256, (12, 20)), (draw_shapes, 128, (20, 56))])
def test_scenes_are_functions_of_their_seed(draw: Draw, scene: int, sides: tuple[int, int]) -> None:
    for seed in range(10):
        image, objects = draw(np.random.default_rng(seed))
        again, objects_again = draw(np.random.default_rng(seed))
        assert image.size == (scene, scene) and image.tobytes() == again.tobytes() and objects == objects_again
        for _, (x1, y1, x2, y2) in objects:
            assert sides[0] <= x2 - x1 == y2 - y1 <= sides[1]


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_fills_its_box_and_nothing_else(name: str) -> None:
    image, objects = draw_all(np.random.default_rng(1), 64, [name], (20, 21))
    x1, y1, x2, y2 = objects[0][1]
    pixels = np.asarray(image, dtype=float).mean(axis=2)
    ground = np.ones_like(pixels, dtype=bool)
    ground[y1:y2, x1:x2] = False
    level, spread = pixels[ground].mean(), pixels[ground].std()
    assert spread < 2 * NOISE
    shape = np.abs(pixels[y1:y2, x1:x2] - level) > CONTRAST / 2
    assert shape[:2].any() and shape[-2:].any() and shape[:, :2].any() and shape[:, -2:].any()


def test_needles_hold_fewer_than_one_true_box_in_a_hundred_predictions() -> None:
    found = [len(draw_needles(np.random.default_rng(seed))[1]) for seed in range(40)]
    assert min(found) >= 1 and max(found) <= 3
    assert np.mean(found) / 320 < 0.01


def test_boxes_hide_each_other_by_their_share_of_the_smaller() -> None:
    assert hidden((0, 0, 10, 10), (5, 0, 25, 20)) == 0.5
    assert hidden((0, 0, 10, 10), (10, 0, 20, 10)) == 0


def test_splits_differ_and_others_are_refused() -> None:
    options = DetectionDataOptions(kind="shapes", root=".", image_size=128)
    train = options.open_train()
    held_out = options.open_eval(train.class_names)
    assert (len(train.images), len(held_out.images)) == (SPLITS["train"], SPLITS["val"])
    assert train.images[0].read().tobytes() != held_out.images[0].read().tobytes()
    assert open_detection("shapes", Path("."), "val").images is held_out.images, "drawn once"
    with pytest.raises(DataError, match="shapes have no split 'test'; they have train, val, kept"):
        open_detection("shapes", Path("."), "test")
    with pytest.raises(DataError, match="needles show the class cross"):
        open_detection("needles", Path("."), "val", ("ring",))
