"""CenterFace's maps to faces, and a scorer that asks it where the faces are."""

from importlib.util import find_spec
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from drawn_faces import LANDMARKS, drawn_face
from tiny_detector import encoded
from tiny_scorer import CONFIG

from server.own_models import OwnModelError, face_detector
from vision.images import Picture, decode_image
from vision.serving.batch import answer_pictures
from vision.serving.faces import FAMILIES, STRIDES, decode_centerface
from vision.serving.kinds.face_detector import KIND, FaceCard, laid_out
from vision.serving.kinds.face_quality import KIND as SCORER
from vision.serving.load import load_model
from vision.serving.networks import SingleNetwork
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
    outputs = [output[0] for output in planted(boxes, marks, 160)]
    faces = decode_centerface(outputs, (160, 160), 0.5)
    np.testing.assert_allclose(faces.boxes, boxes, atol=1e-3)
    np.testing.assert_allclose(faces.landmarks, marks, atol=1e-3)
    assert len(decode_centerface(outputs, (160, 160), 0.95).scores) == 0


def test_a_scorer_asks_the_detector_where_the_faces_are() -> None:
    image = drawn_face()  # 360 pixels, which the detector sees at 352
    seen = LANDMARKS * 352 / 360
    network = Planted([60.0, 50.0, 290.0, 290.0], seen)
    known = FaceCard(("face",), "MIT", 960, "", "", FAMILIES["centerface"], None)
    faces = Model(KIND, ModelInfo("faces", "face-detector", ("face",), "MIT", 960, "planted"), known, network)
    info = ModelInfo("scorer", "face-quality", (), "MIT", 112, "constant")
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


BOX, MARKS = [64.0, 40.0, 128.0, 120.0], [[80.0, 64], [112, 64], [96, 80], [84, 100], [110, 100]]


def yunet_row(stride: int) -> tuple[int, dict[str, list[float]]]:
    """Cell and values by which YuNet tells of the face, by its own decoding."""
    x, y = (BOX[0] + BOX[2]) / 2 / stride, (BOX[1] + BOX[3]) / 2 / stride
    column, row = int(x), int(y)
    sides = np.log([(BOX[2] - BOX[0]) / stride, (BOX[3] - BOX[1]) / stride])
    marks = (np.array(MARKS) / stride - [column, row]).ravel()
    values = {"cls": [0.81], "obj": [1.0], "bbox": [x - column, y - row, *sides], "kps": marks.tolist()}
    return row * (SIDE // stride) + column, values


def scrfd_row(stride: int) -> tuple[int, dict[str, list[float]]]:
    """The same for SCRFD: the second of a cell's two anchors."""
    column, row = int((BOX[0] + BOX[2]) / 2 / stride), int((BOX[1] + BOX[3]) / 2 / stride)
    corner = np.array([column, row]) * stride
    sides = np.concatenate([corner - BOX[:2], BOX[2:] - corner]) / stride
    marks = ((np.array(MARKS) - corner) / stride).ravel()
    return 2 * (row * (SIDE // stride) + column) + 1, {"score": [0.9], "bbox": sides.tolist(), "kps": marks.tolist()}


SIDE = 192


def write_graph(file: Path, row_of, anchors: int, batched: bool, stride_of_face: int = 16) -> None:
    """A file with the outputs of a real one, whatever it is shown: the face where it sees any light at all."""
    import onnx
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("ReduceMax", ["image"], ["light"], keepdims=0),
        helper.make_node("Sign", ["light"], ["seen"]),
    ]
    outputs, tensors = [], []
    for part in row_of(8)[1]:
        for stride in STRIDES:
            place, values = row_of(stride)
            table = np.zeros((anchors * (SIDE // stride) ** 2, len(values[part])), np.float32)
            if stride == stride_of_face:
                table[place] = values[part]
            table = table[None] if batched else table
            name = f"{part}_{stride}"
            tensors.append(helper.make_tensor(f"{name}_table", TensorProto.FLOAT, table.shape, table.ravel()))
            nodes.append(helper.make_node("Mul", [f"{name}_table", "seen"], [name]))
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(table.shape)))
    given = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, SIDE, SIDE])
    graph = helper.make_graph(nodes, "faces", [given], outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)


@pytest.mark.skipif(find_spec("onnx") is None or find_spec("onnxruntime") is None, reason="not installed: extra vision")
@pytest.mark.parametrize(
    ("family", "row_of", "anchors", "batched"),
    [("yunet", yunet_row, 1, True), ("scrfd", scrfd_row, 2, False), ("scrfd", scrfd_row, 2, True)],
)
def test_a_file_is_known_by_its_outputs_and_read_by_its_familys_rules(
    tmp_path: Path, family: str, row_of, anchors: int, batched: bool
) -> None:
    write_graph(tmp_path / "faces.onnx", row_of, anchors, batched)
    model = load_model(tmp_path / "faces.onnx")
    assert (model.info.kind, model.info.description) == ("face-detector", family)
    picture = decode_image(encoded(drawn_face().resize((384, 288))))  # laid into 192 x 144 of the fixed input
    (answer,) = answer_pictures(model, [picture], {})
    jsonschema.validate(answer, model.kind.schema)
    (face,) = answer["faces"]
    assert face["score"] == pytest.approx(0.9, abs=1e-4)
    np.testing.assert_allclose(face["box"], np.array(BOX) * 2, atol=0.02)
    np.testing.assert_allclose(face["landmarks"], np.array(MARKS) * 2, atol=0.02)


def test_a_picture_is_laid_into_an_input_of_one_size_without_changing_its_shape() -> None:
    laid, shown = laid_out(drawn_face().resize((100, 300)), (192, 192))
    assert (laid.size, shown) == ((192, 192), (64, 192))
    assert np.asarray(laid)[:, 64:].max() == 0 and np.asarray(laid)[:, :64].max() > 0


def test_pixels_go_in_as_each_family_wants_them() -> None:
    class Session:
        def get_inputs(self):
            return [type("Input", (), {"name": "image"})]

        def run(self, names, given):
            self.given = given["image"]
            return [self.given.reshape(1, 3, -1)]

    for name, wanted in (("yunet", [30, 20, 10]), ("scrfd", (np.array([10, 20, 30]) - 127.5) / 128)):
        family, session = FAMILIES[name], Session()
        rows = np.array([10, 20, 30], np.uint8).reshape(1, 3, 1, 1)
        SingleNetwork(session, ["out"], family.bgr, family.mean, family.std).run(rows)
        np.testing.assert_allclose(session.given.ravel(), wanted, atol=1e-6)
