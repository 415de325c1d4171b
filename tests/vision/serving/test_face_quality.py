"""Faces that can be scored and faces that cannot: the documented status, never a number that means nothing."""

import math
from importlib.util import find_spec

import jsonschema
import numpy as np
import pytest
from drawn_faces import LANDMARKS, drawn_face
from PIL import Image
from tiny_scorer import CONFIG, write_tiny_scorer

from vision.images import Picture
from vision.serving.batch import MAX_ROWS, answer_pictures
from vision.serving.folder import ModelError
from vision.serving.kinds.face_quality import KIND
from vision.serving.load import load_model
from vision.serving.protocol import Model, ModelInfo

NEEDS_ONNX = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnx") is None, reason="not installed (extra vision): onnxruntime"
)


class Constant:
    """A network that answers the same for every crop, and remembers them."""

    runtime = "constant"

    def __init__(self, score=0.5):
        self.score, self.crops, self.batches = score, [], []

    def run(self, crops):
        self.crops += list(crops)
        self.batches.append(len(crops))
        return [np.full(len(crops), self.score, dtype=np.float32)]


def make_model(score=0.5):
    network = Constant(score)
    info = ModelInfo("constant", "face-quality", (), "MIT", 112, "constant")
    return Model(KIND, info, KIND.read_card(CONFIG, "d1"), network), network


def assess(image, score=0.5, **options):
    model, network = make_model(score)
    (answer,) = answer_pictures(model, [Picture(image, *image.size)], options)
    jsonschema.validate(answer, model.kind.schema)
    return answer, network


def shifted(dx=0.0, dy=0.0, scale=1.0):
    return (LANDMARKS * scale + np.array([dx, dy])).tolist()


def test_a_face_with_landmarks():
    answer, runtime = assess(drawn_face(), 0.6, landmarks=[LANDMARKS.tolist()])
    (face,) = answer["faces"]
    assert (face["status"], face["quality"], face["raw"]) == ("ok", 73, 0.6)
    assert face["inter_eye_px"] == pytest.approx(70.5, abs=0.1)
    assert face["box"] == pytest.approx([69.5, 59.5, 293.5, 283.5], abs=1e-3)
    assert (face["largest"], face["index"], face["warnings"]) == (True, 0, [])
    assert (answer["status"], answer["count"], answer["model_sha256"]) == ("ok", 1, "d1")
    assert answer["scale"].startswith("0-100") and "112" in answer["alignment"]
    assert runtime.crops[0].shape == (3, 112, 112) and runtime.crops[0].dtype == np.uint8
    eye = runtime.crops[0][:, 52, 38]
    assert eye.max() < 60


def test_an_aligned_crop_is_taken_as_it_is():
    crop = drawn_face().resize((112, 112))
    answer, runtime = assess(crop, aligned=True)
    assert (runtime.crops[0] == np.asarray(crop).transpose(2, 0, 1)).all()
    face = answer["faces"][0]
    assert (face["status"], face["box"], face["landmarks"]) == ("ok", [0.0, 0.0, 112.0, 112.0], None)


def test_without_landmarks_there_is_no_number():
    answer, runtime = assess(drawn_face())
    assert (answer["status"], answer["faces"], answer["count"], runtime.crops) == ("landmarks_missing", [], 0, [])


def test_no_face_is_an_empty_list():
    answer, _ = assess(drawn_face(), landmarks=[])
    assert (answer["status"], answer["faces"]) == ("no_face", [])


def test_several_faces_come_largest_first_and_know_their_place():
    small, large = shifted(60, 40, 0.5), shifted()
    answer, _ = assess(drawn_face(), landmarks=[small, [[1, 1]] * 5, large])
    assert [(face["index"], face["largest"]) for face in answer["faces"]] == [(2, True), (0, False), (1, False)]
    assert [face["status"] for face in answer["faces"]] == ["ok", "ok", "failure_to_assess"]


@pytest.mark.parametrize(
    ("landmarks", "status", "words"),
    [
        (shifted(100, 100, 0.1), "too_small", "7.0 pixels apart"),
        ([shifted()[place] for place in (1, 0, 2, 4, 3)], "failure_to_assess", "mirrored"),
        (shifted(dx=150), "failure_to_assess", "outside the image"),
        ([[50.0, 50.0]] * 5, "failure_to_assess", "coincide"),
        (shifted()[:4], "failure_to_assess", "five points"),
        ([[math.nan, 1.0], *shifted()[1:]], "failure_to_assess", "finite"),
        ([["a", "b"]] * 5, "failure_to_assess", "could not convert"),
    ],
)
def test_landmarks_that_describe_no_face(landmarks, status, words):
    answer, runtime = assess(drawn_face(), landmarks=[landmarks])
    (face,) = answer["faces"]
    assert (face["status"], face["quality"], face["raw"], runtime.crops) == (status, -1, None, [])
    assert words in face["warnings"][-1]


@pytest.mark.parametrize("size", [(111, 112), (112, 113), (1, 1), (224, 224)])
def test_a_crop_of_the_wrong_size_is_not_scored(size):
    face = assess(drawn_face().resize(size), aligned=True)[0]["faces"][0]
    assert (face["status"], face["quality"]) == ("failure_to_assess", -1)
    assert f"{size[0]}x{size[1]}" in face["warnings"][0]


@pytest.mark.parametrize("colour", ["black", "white", (90, 90, 91)])
def test_where_nothing_is_to_be_seen_there_is_no_number(colour):
    face = assess(Image.new("RGB", (112, 112), colour), aligned=True)[0]["faces"][0]
    assert (face["status"], face["quality"]) == ("failure_to_assess", -1)
    assert assess(Image.new("RGB", (360, 360), colour), landmarks=[shifted()])[0]["faces"][0]["quality"] == -1


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_network_that_answers_no_number_is_a_failure(score):
    face = assess(drawn_face(), score, landmarks=[shifted()])[0]["faces"][0]
    assert (face["status"], face["quality"], face["raw"]) == ("failure_to_assess", -1, None)


def test_small_and_cut_off_faces_are_warned_of():
    face = assess(drawn_face(), landmarks=[shifted(100, 100, 0.4)])[0]["faces"][0]
    assert (face["status"], face["warnings"][0][:8]) == ("ok", "enlarged")
    cut = assess(drawn_face(), landmarks=[shifted(dx=-120)])[0]["faces"][0]
    assert cut["warnings"][0].startswith("cut off") and cut["box"][0] == 0


def test_a_failure_beside_good_faces_costs_only_itself():
    answer, _ = assess(drawn_face(), 0.7, landmarks=[shifted(dx=150), shifted()])
    assert [face["quality"] for face in answer["faces"]] == [88, -1]


def test_the_faces_of_several_images_run_together_and_in_bounded_batches():
    model, network = make_model(0.7)
    pictures = [Picture(drawn_face(), 360, 360)] * 3
    answers = answer_pictures(model, pictures, {"landmarks": [shifted()] * 20})
    assert network.batches == [MAX_ROWS, 60 - MAX_ROWS]
    assert [[face["quality"] for face in answer["faces"]] for answer in answers] == [[88] * 20] * 3


def test_options_that_are_not_its_own_are_refused():
    with pytest.raises(ModelError, match="score_threshold"):
        assess(drawn_face(), score_threshold=1)
    with pytest.raises(ModelError, match="both"):
        assess(drawn_face(), landmarks=[], aligned=True)


def test_boxes_are_drawn():
    image = drawn_face()
    answer, _ = assess(image, landmarks=[shifted(), [[1, 1]] * 5])
    drawn = KIND.draw(image, answer)
    assert drawn.size == image.size and drawn.tobytes() != image.tobytes()


@NEEDS_ONNX
def test_a_folder_is_recognised_as_a_scorer(tmp_path):
    model = load_model(write_tiny_scorer(tmp_path / "redness"))
    assert (model.info.kind, model.info.licence, model.kind.full_size({})) == ("face-quality", "MIT", True)
    crop = drawn_face().resize((112, 112))
    (answer,) = answer_pictures(model, [Picture(crop, 112, 112)], {"aligned": True})
    assert answer["faces"][0]["raw"] == pytest.approx(np.asarray(crop)[..., 0].mean() / 255, abs=1e-4)
    assert load_model(tmp_path / "redness" / "model.onnx").info.name == "redness"
    (tmp_path / "redness" / "config.json").write_text("[1")
    with pytest.raises(ModelError, match="not JSON"):
        load_model(tmp_path / "redness")
    (tmp_path / "redness" / "config.json").write_text('{"format": "dovetail-face-quality", "scale": {}}')
    (tmp_path / "redness" / "model.onnx").unlink()
    with pytest.raises(ModelError, match="describes no scorer"):
        load_model(tmp_path / "redness")
