from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision.data.labelled_boxes import DetectionSource, LabelledImage
from vision.detection.anchors import cluster_shapes, shapes_in_cells


def test_planted_shapes_are_found_again() -> None:
    generator = np.random.default_rng(0)
    planted = np.array([[1, 1], [2, 6], [6, 2], [8, 8], [0.4, 0.4]], dtype=np.float32)
    shapes = (planted[generator.integers(5, size=500)] * generator.uniform(0.95, 1.05, (500, 2))).astype(np.float32)
    found = np.array(cluster_shapes(shapes, 5))
    expected = planted[[4, 0, 1, 2, 3]]
    assert (np.diff(found.prod(axis=1)) >= 0).all()
    for shape in expected:
        assert np.abs(found - shape).max(axis=1).min() < 0.15


def test_too_few_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 different shapes; 5 anchors"):
        cluster_shapes(np.array([[1, 1], [2, 2], [1, 1]], dtype=np.float32))


def test_shapes_are_those_of_the_network_input(tmp_path: Path) -> None:
    """Once with the annotated size, once read from the image, once unreadable."""
    Image.new("RGB", (640, 320)).save(tmp_path / "a.png")
    boxes = np.array([[0, 0, 128, 32]], dtype=np.float32)
    rest = (np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.bool_), np.ones(1, dtype=np.float32))
    images = [
        LabelledImage(tmp_path / "none.png", boxes, *rest, size=(640, 320)),
        LabelledImage(tmp_path / "a.png", boxes, *rest),
        LabelledImage(tmp_path / "none.png", boxes, *rest),
    ]
    source = DetectionSource(("thing",), tuple(images), 0)
    assert shapes_in_cells(source, 320, "stretch").tolist() == [[2, 1]] * 2
    assert shapes_in_cells(source, 320, "letterbox").tolist() == [[2, 0.5]] * 2
