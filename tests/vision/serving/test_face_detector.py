"""CenterFace's maps to faces, and a scorer that asks it where the faces are."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from drawn_faces import LANDMARKS, drawn_face
from tiny_detector import encoded
from tiny_scorer import CONFIG

from server.own_models import OwnModelError, face_detector
from vision.images import Picture, decode_image
from vision.serving.batch import answer_pictures
from vision.serving.kinds.face_detector import KIND, decode_centerface
from vision.serving.kinds.face_quality import KIND as SCORER
from vision.serving.load import load_model
from vision.serving.protocol import Model, ModelInfo


def planted(boxes: list[list[float]], marks: list[np.ndarray], side: int) -> list[np.ndarray]:
    """The maps of stride 4 that a network would give for these faces, by the paper's encoding."""
    cells = side // 4
    heat, sizes = np.zeros((1, 1, cells, cells), np.float32), np.zeros((1, 2, cells, cells), np.float32)
    offsets, shares = np.zeros((1, 2, cells, cells), np.float32), np.zeros((1, 10, cells, cells), np.float32)
    for (x1, y1, x2, y2), points in zip(boxes, marks, strict=True):
        x, y = (x1 + x2) / 8, (y1 + y2) / 8
        row, column = int(y), int(x)
        heat[0, 0, row, column] = 0.9
        sizes[0, :, row, column] = np.log([(y2 - y1) / 4, (x2 - x1) / 4])
        offsets[0, :, row, column] = [y - row - 0.5, x - column - 0.5]
        scaled = (points - [x1, y1]) / [x2 - x1, y2 - y1]
        shares[0, :, row, column] = scaled[:, ::-1].ravel()
    return [heat, sizes, offsets, shares]


class Planted:
    """A network that sees the same face wherever it looks."""

    runtime = "planted"

    def __init__(self, box: list[float], marks: np.ndarray) -> None:
        self.box, self.marks = box, marks

    def run(self, rows):
        return planted([self.box], [self.marks], rows.shape[2])


class Constant:
    runtime = "constant"

    def run(self, rows):
        return [np.full(len(rows), 0.6, np.float32)]


def test_maps_become_boxes_and_landmarks() -> None:
    boxes, marks = [[10.0, 20.0, 50.0, 76.0], [100.0, 90.0, 124.0, 122.0]], []
    for x1, y1, x2, y2 in boxes:
        marks.append(
            np.array([[x1 + 8, y1 + 9], [x2 - 8, y1 + 9], [x1 + 20, y1 + 15], [x1 + 9, y2 - 9], [x2 - 9, y2 - 9]])
        )
    faces = decode_centerface(planted(boxes, marks, 160), 0.5)
    np.testing.assert_allclose(faces.boxes, boxes, atol=1e-3)
    np.testing.assert_allclose(faces.landmarks, marks, atol=1e-3)
    assert len(decode_centerface(planted(boxes, marks, 160), 0.95).scores) == 0


def test_a_scorer_asks_the_detector_where_the_faces_are() -> None:
    image = drawn_face()  # 360 pixels, which the detector sees at 352
    seen = LANDMARKS * 352 / 360
    network = Planted([60.0, 50.0, 290.0, 290.0], seen)
    faces = Model(KIND, ModelInfo("faces", "face-detector", ("face",), "MIT", 960, "planted"), None, network)
    info = ModelInfo("scorer", "face-quality", (), "MIT", 112, "constant", full_size=True)
    card = SCORER.read_card(CONFIG, "")
    picture = Picture(image, *image.size)
    alone = answer_pictures(Model(SCORER, info, card, Constant()), [picture], {})
    assert alone[0]["status"] == "landmarks_missing"
    scorer = Model(SCORER, info, card, Constant(), {"face-detector": faces})
    (answer,) = answer_pictures(scorer, [picture], {})
    (face,) = answer["faces"]
    assert (answer["status"], face["status"]) == ("ok", "ok")
    np.testing.assert_allclose(face["landmarks"], LANDMARKS, atol=0.02)


@pytest.mark.skipif(find_spec("onnx") is None or find_spec("onnxruntime") is None, reason="not installed: extra vision")
def test_the_published_file_is_known_and_takes_any_size() -> None:
    try:
        file: Path = face_detector()
    except OwnModelError as error:
        pytest.skip(str(error))
    model = load_model(file)
    assert (model.info.name, model.info.kind) == ("centerface", "face-detector")
    for size in ((360, 360), (200, 90)):
        picture = decode_image(encoded(drawn_face().resize(size)))
        (answer,) = answer_pictures(model, [picture], {})
        assert all(0 <= value <= max(size) for face in answer["faces"] for value in face["box"])
