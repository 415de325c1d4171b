"""Single measures of a face: each falls with its own defect, and pose is the rotation that made the landmarks."""

import math

import numpy as np
import pytest
from drawn_faces import LANDMARKS, drawn_face
from PIL import Image, ImageFilter

from vision.face_quality.alignment import TEMPLATE, align_face, inter_eye_distance
from vision.face_quality.components import COMPONENTS, DEPTHS, REST_PITCH, head_pose, measure_face


def crop(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def scalars(image: Image.Image) -> dict[str, int]:
    return {name: found["scalar"] for name, found in measure_face(crop(image), LANDMARKS).items()}


def test_every_measure_has_a_range_and_falls_with_its_defect() -> None:
    face = align_face(drawn_face(), LANDMARKS)
    found = measure_face(crop(face), LANDMARKS)
    assert list(found) == list(COMPONENTS)
    for entry in found.values():
        low, high = entry["range"]
        assert low <= entry["raw"] <= high and 0 <= entry["scalar"] <= 100
    good = scalars(face)
    assert scalars(face.filter(ImageFilter.GaussianBlur(3)))["sharpness"] < good["sharpness"] - 20
    assert scalars(face.point(lambda v: v // 8))["luminance_mean"] < good["luminance_mean"] - 20
    shadow = np.asarray(face).copy()
    shadow[:, :56] //= 6
    assert scalars(Image.fromarray(shadow))["illumination_uniformity"] < good["illumination_uniformity"] - 20


def test_an_aligned_crop_alone_has_neither_size_nor_pose() -> None:
    found = measure_face(crop(align_face(drawn_face(), LANDMARKS)), None)
    assert list(found) == ["sharpness", "illumination_uniformity", "luminance_mean"]


@pytest.mark.parametrize(("distance", "scalar"), [(40, 18), (50, 27), (70, 50), (90, 73), (110, 88)])
def test_the_distance_of_the_eyes_is_scaled_as_the_reference_implementation_does(distance: int, scalar: int) -> None:
    marks = TEMPLATE * distance / inter_eye_distance(TEMPLATE)
    assert measure_face(np.zeros((3, 112, 112), np.uint8), marks)["inter_eye_distance"]["scalar"] == scalar


@pytest.mark.parametrize("angles", [(0, 0, 0), (30, 0, 0), (-45, 0, 0), (0, 20, 0), (0, 0, 25), (20, -15, 170)])
def test_pose_is_the_rotation_that_made_the_landmarks(angles: tuple[float, float, float]) -> None:
    yaw, pitch, roll = (math.radians(angle) for angle in angles)
    model = np.column_stack([TEMPLATE / inter_eye_distance(TEMPLATE), DEPTHS])
    nod = np.array([[1, 0, 0], [0, math.cos(pitch), math.sin(pitch)], [0, -math.sin(pitch), math.cos(pitch)]])
    turn = np.array([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
    lean = np.array([[math.cos(roll), -math.sin(roll), 0], [math.sin(roll), math.cos(roll), 0], [0, 0, 1]])
    seen = 80 * model @ (lean @ turn @ nod).T[:, :2] + [300, 200]
    found = head_pose(seen)
    assert found == pytest.approx((angles[0], angles[1] - REST_PITCH, angles[2]), abs=0.01)
