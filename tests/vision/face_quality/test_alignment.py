"""The similarity transform, the warp and what they refuse."""

import math

import numpy as np
import pytest
from drawn_faces import LANDMARKS, drawn_face
from PIL import Image

from vision.face_quality import LandmarkError, align_face, fit_similarity, inter_eye_distance
from vision.face_quality.alignment import FACE_SIZE, TEMPLATE


def moved_template(angle=20.0, scale=2.5, shift=(40.0, 25.0)):
    """The template rotated clockwise on the screen, scaled and shifted."""
    turn = math.radians(angle)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return scale * TEMPLATE @ rotation.T + np.array(shift)


def test_golden_similarity():
    points = moved_template()
    similarity = fit_similarity(points)
    assert similarity.scale == pytest.approx(0.4, abs=1e-12)
    assert similarity.angle == pytest.approx(-20.0, abs=1e-10)
    assert np.abs(similarity.apply(points) - TEMPLATE).max() < 1e-12


def test_noisy_landmarks_get_the_least_squares_fit():
    points = moved_template() + np.random.default_rng(0).normal(size=(5, 2)) * 3
    similarity = fit_similarity(points)
    # The same problem as four linear unknowns: a, b, shift x, shift y.
    rows = [[x, -y, 1, 0] for x, y in points] + [[y, x, 0, 1] for x, y in points]
    solution, *_ = np.linalg.lstsq(np.array(rows), np.concatenate([TEMPLATE[:, 0], TEMPLATE[:, 1]]), rcond=None)
    assert similarity.factor == pytest.approx(complex(solution[0], solution[1]))
    assert similarity.shift == pytest.approx(complex(solution[2], solution[3]))


def dotted(points, size=(420, 400), radius=0):
    image = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    for x, y in np.round(points).astype(int):
        image[y - radius : y + radius + 1, x - radius : x + radius + 1] = 255
    return Image.fromarray(image)


def test_a_face_at_the_template_is_copied_pixel_for_pixel():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (150, 140, 3), dtype=np.uint8)
    shift = np.array([9.0, 17.0])
    aligned = align_face(Image.fromarray(pixels), TEMPLATE + shift)
    assert aligned.size == (FACE_SIZE, FACE_SIZE)
    # Pillow interpolates in fixed point, which may cost one grey level.
    difference = np.asarray(aligned).astype(int) - pixels[17 : 17 + 112, 9 : 9 + 112]
    assert np.abs(difference).max() <= 1
    # The 96-wide template is 8 to the left: it would put every landmark 8 pixels off.
    wrong = align_face(Image.fromarray(pixels), TEMPLATE + shift - np.array([8.0, 0.0]))
    assert np.abs(np.asarray(wrong).astype(int) - np.asarray(aligned)).max() > 100


def test_landmarks_land_on_the_template():
    points = moved_template(angle=20.0, scale=2.5, shift=(120.0, 20.0))
    aligned = np.asarray(align_face(dotted(points, radius=4), points).convert("L")).astype(float)
    rows, columns = np.mgrid[:FACE_SIZE, :FACE_SIZE]
    for x, y in TEMPLATE:
        near = aligned * (np.hypot(columns - x, rows - y) < 6)
        assert near.sum() > 0
        centre = (near * columns).sum() / near.sum(), (near * rows).sum() / near.sum()
        assert centre == pytest.approx((x, y), abs=0.4)


def test_the_border_is_black():
    image = Image.new("RGB", (60, 60), (200, 200, 200))
    aligned = np.asarray(align_face(image, TEMPLATE / 2))
    assert (aligned[5:100, 5:100] == 200).all()
    beyond = np.asarray(align_face(image, np.clip(TEMPLATE / 2 - np.array([14.0, 20.0]), 0, 59)))
    assert (beyond[0] == 0).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("RGB", (200, 200), (255, 255, 255)).convert(mode)
    aligned = align_face(image, TEMPLATE + 20)
    assert aligned.mode == "RGB" and min(aligned.getpixel((56, 56))) >= 254


def test_mirrored_landmarks_are_refused():
    with pytest.raises(LandmarkError, match="mirrored"):
        fit_similarity(TEMPLATE * np.array([-1.0, 1.0]))
    with pytest.raises(LandmarkError, match="mirrored"):
        fit_similarity(TEMPLATE[[1, 0, 2, 4, 3]])


@pytest.mark.parametrize(
    ("landmarks", "message"),
    [
        (np.ones((5, 2)), "coincide"),
        (np.full((5, 2), np.nan), "finite"),
        (TEMPLATE[:4], "5 finite points"),
        (TEMPLATE.ravel(), r"\[N, 2\]"),
    ],
)
def test_landmarks_that_are_no_face_are_refused(landmarks, message):
    with pytest.raises(LandmarkError, match=message):
        fit_similarity(landmarks)


def test_landmarks_outside_the_image_are_refused():
    with pytest.raises(LandmarkError, match="outside the image of 60x60"):
        align_face(Image.new("RGB", (60, 60)), TEMPLATE)


def test_inter_eye_distance():
    assert inter_eye_distance(TEMPLATE) == pytest.approx(35.2, abs=0.05)


def test_a_photograph_is_not_copied_for_each_of_its_faces(monkeypatch):
    image = drawn_face()
    expected = align_face(image, LANDMARKS).tobytes()
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("the whole image was copied"))
    assert align_face(image, LANDMARKS).tobytes() == expected
