"""Faces of known people; the folders are drawn, and the real sets are read where they are at hand."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from drawn_faces import LANDMARKS, drawn_face, write_london
from PIL import Image

from vision.data.faces import (
    DegradedFaces,
    carry_landmarks,
    fold_split,
    london_faces,
    orl_faces,
    people_range,
    read_landmarks,
)
from vision.data.image_sources import open_source
from vision.data.sources import ArraySource, DataError, UnreadableImageError
from vision.face_quality.alignment import TEMPLATE


@pytest.fixture
def london(tmp_path):
    return write_london(tmp_path, ("001", "042", "115", "129", "130", "172"))


def test_splits_are_by_person_and_the_withheld_never_train(london):
    people = {
        split: set(london_faces(london, split).class_names) for split in ("train", "val", "trainable", "withheld")
    }
    assert people["train"] == {"001", "042"} and people["val"] == {"115", "129"}
    assert people["trainable"] == people["train"] | people["val"]
    assert people["withheld"] == {"130", "172"}
    assert london_faces(london, "40-129").class_names == ("042", "115", "129")
    with pytest.raises(DataError, match="begin at 130"):
        people_range("100-140")
    with pytest.raises(DataError, match="neither"):
        people_range("everybody")
    with pytest.raises(DataError, match="no photographs"):
        london_faces(london, "50-60")


def test_folds_deal_out_the_people_that_may_train(london):
    folds = [london_faces(london, fold_split([place], 3)).class_names for place in range(3)]
    assert folds == [("001", "129"), ("042",), ("115",)]
    assert london_faces(london, fold_split([0, 2], 3)).class_names == ("001", "115", "129")
    with pytest.raises(DataError, match="count from 0"):
        london_faces(london, "fold_3_of_3")


def test_photographs_come_aligned_with_their_groups(london):
    source = london_faces(london, "train")
    assert source.labels.tolist() == [0, 1, 0, 1]
    assert source.photos[0].groups == {"sex": "female", "ethnicity": "white", "age": "under 25"}
    assert source.photos[1].groups["age"] == "unknown"
    neutral, smiling = (np.asarray(source.read(index)).astype(float) for index in (0, 2))
    assert neutral.shape == (112, 112, 3)
    for x, y in np.rint(TEMPLATE).astype(int):
        assert neutral[y, x].max() < 80  # the dark middles of the discs
    # The smiling twin's landmarks were found again, so that both crops agree but for JPEG and a pixel.
    assert np.abs(neutral - smiling)[8:-8, 8:-8].mean() < 12


def test_carried_landmarks_follow_the_face():
    moved = carry_landmarks(drawn_face(), LANDMARKS, drawn_face(shift=(21, -16)))
    np.testing.assert_allclose(moved, LANDMARKS + np.array([21, -16]), atol=2.0)


def test_broken_sets_are_named(london):
    points = london / "neutral_front" / "001_03.pts.txt"
    points.write_text("1 2\n3 4\n")
    with pytest.raises(UnreadableImageError, match=r"\(189, 2\)"):
        london_faces(london, "1-1").read(0)
    points.unlink()
    with pytest.raises(UnreadableImageError, match="does not exist"):
        london_faces(london, "1-1").read(0)
    (london / "london_info.csv").unlink()
    with pytest.raises(DataError, match="london_info"):
        london_faces(london, "train")


def test_orl_can_only_be_measured_with(tmp_path):
    for person in (1, 2, 10):
        (tmp_path / f"s{person}").mkdir()
        Image.new("L", (92, 112), 100 + person).save(tmp_path / f"s{person}" / "1.pgm")
    source = orl_faces(tmp_path, "measure")
    assert (source.class_names, len(source.photos)) == (("s1", "s10", "s2"), 3)
    assert source.read(2).size == (112, 112) and source.labels.tolist() == [0, 2, 1]
    with pytest.raises(DataError, match="licence"):
        open_source("orl_faces", tmp_path, "train")
    with pytest.raises(DataError, match="no pictures"):
        orl_faces(tmp_path / "nowhere", "measure")


def test_degraded_copies_are_a_function_of_seed_and_index():
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    source = ArraySource(images, np.array([0, 1, 1]), ("a", "b"))
    faces = DegradedFaces(source, copies=9, seed=4)
    assert faces.labels.tolist() == [0] * 10 + [1] * 20
    assert [faces.kinds[index] for index in (0, 10, 20)] == ["none"] * 3 and set(faces.severities[[0, 10, 20]]) == {0.0}
    assert faces.kinds[1:4] == ("blur", "downsampling", "jpeg") and faces.kinds[11] != faces.kinds[1]
    assert faces.read(10).tobytes() == images[1].tobytes() != faces.read(12).tobytes()
    again = DegradedFaces(source, copies=9, seed=4)
    assert all(faces.read(index).tobytes() == again.read(index).tobytes() for index in range(30))
    other = DegradedFaces(source, copies=9, seed=5)
    assert any(faces.read(index).tobytes() != other.read(index).tobytes() for index in range(30))


@pytest.mark.skipif("DOVETAIL_TEST_DATA" not in os.environ, reason="DOVETAIL_TEST_DATA names no folder of data")
def test_the_real_london_set(tmp_path):
    archive = Path(os.environ["DOVETAIL_TEST_DATA"]) / "faces" / "london_faces.tar.gz"
    wanted = ("london_info.csv", "/001_03", "/001_08")
    with tarfile.open(archive) as opened:
        members = [member for member in opened.getmembers() if any(part in member.name for part in wanted)]
        opened.extractall(tmp_path, members, filter="data")
    source = london_faces(tmp_path / "london_faces", "train")
    landmarks = read_landmarks(tmp_path / "london_faces" / "neutral_front" / "001_03.pts.txt")
    assert landmarks[0] == pytest.approx((282.5, 316.0), abs=1.0) and landmarks[1, 0] > 380
    neutral, smiling = (np.asarray(source.read(index).convert("L")).astype(float) for index in (0, 1))
    eyes = (slice(40, 62), slice(25, 88))
    correlation = np.corrcoef(neutral[eyes].ravel(), smiling[eyes].ravel())[0, 1]
    assert correlation > 0.75
