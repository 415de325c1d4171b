import numpy as np
import pytest
import torch
from drawn_faces import drawn_face
from PIL import Image

from vision.data.classification import to_tensor
from vision.data.degradations import degrade
from vision.face_quality.baselines import (
    Naturalness,
    brightness,
    contrast_normalized,
    generalized_gaussian,
    grey,
    laplacian_sharpness,
    natural_scene_features,
    smooth,
)


def faces(kind=None, severity=0.6, count=6):
    images = [drawn_face(person).resize((112, 112)) for person in range(count)]
    if kind is not None:
        images = [degrade(image, kind, severity, np.random.default_rng(0)) for image in images]
    return torch.stack([to_tensor(image) for image in images])


def test_the_laplacian_is_the_convolution_with_its_kernel():
    one = faces(count=1)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64)[None, None]
    expected = torch.nn.functional.conv2d(torch.from_numpy(grey(one))[None], kernel).var(unbiased=False)
    assert laplacian_sharpness(one)[0] == pytest.approx(expected.item())


def test_each_baseline_notices_what_it_should():
    assert (laplacian_sharpness(faces()) > laplacian_sharpness(faces("blur"))).all()
    assert (laplacian_sharpness(faces()) < laplacian_sharpness(faces("noise"))).all()  # its known blindness
    assert (brightness(faces()) > brightness(faces("darkness"))).all()
    assert brightness(torch.full((1, 3, 8, 8), 77, dtype=torch.uint8))[0] == pytest.approx(77)


def test_smoothing_keeps_a_constant_and_its_window_sums_to_one():
    np.testing.assert_allclose(smooth(np.full((1, 20, 20), 3.0)), 3.0)
    impulse = np.zeros((1, 21, 21))
    impulse[0, 10, 10] = 1
    assert smooth(impulse).sum() == pytest.approx(1.0)
    assert np.abs(contrast_normalized(np.full((1, 20, 20), 9.0))).max() < 1e-9


@pytest.mark.parametrize(("draw", "shape"), [("normal", 2.0), ("laplace", 1.0)])
def test_the_fitted_shape_is_that_of_the_distribution(draw, shape):
    generator = np.random.default_rng(0)
    values = getattr(generator, draw)(0, 2.0, 200_000)
    found, mean, left, right = generalized_gaussian(values)
    assert found == pytest.approx(shape, rel=0.03)
    assert mean == pytest.approx(0, abs=0.05)
    assert left == pytest.approx(right, rel=0.03) and left == pytest.approx(values.var(), rel=0.03)


def test_a_skewed_distribution_has_different_sides():
    values = np.random.default_rng(0).normal(0, 1, 100_000)
    values[values > 0] *= 3
    _, mean, left, right = generalized_gaussian(values)
    assert right == pytest.approx(9 * left, rel=0.05) and mean > 0.5


def test_natural_faces_are_near_those_it_was_fitted_to():
    photographs = []
    for seed in range(50):
        generator = np.random.default_rng(seed)
        total = np.zeros((64, 64, 3))
        for cells in (4, 8, 16, 32, 64):
            noise = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            total += np.asarray(noise.resize((64, 64), Image.Resampling.BICUBIC), dtype=float) / cells
        photographs.append(Image.fromarray((255 * total / total.max()).astype(np.uint8)))
    crops = torch.stack([to_tensor(image) for image in photographs])
    assert natural_scene_features(crops[:2]).shape == (2, 36)
    model = Naturalness(crops[:40])
    unseen = model(crops[40:])
    for kind in ("blur", "noise", "jpeg"):
        spoiled = [degrade(image, kind, 0.8, np.random.default_rng(0)) for image in photographs[40:]]
        assert np.median(unseen) > np.median(model(torch.stack([to_tensor(image) for image in spoiled]))), kind
    assert np.isfinite(model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))).all()
