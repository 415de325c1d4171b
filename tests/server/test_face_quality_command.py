import json
from importlib.util import find_spec

import pytest
from drawn_faces import LANDMARKS, drawn_face
from tiny_detector import write_tiny_detector
from tiny_scorer import write_tiny_scorer
from typer.testing import CliRunner

from server.cli import app

pytestmark = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnx") is None, reason="not installed (extra vision): onnxruntime"
)
POINTS = LANDMARKS.tolist()


@pytest.fixture
def files(tmp_path):
    drawn_face().save(tmp_path / "face.png")
    drawn_face().resize((112, 112)).save(tmp_path / "crop.png")
    write_tiny_scorer(tmp_path / "redness")
    (tmp_path / "points.json").write_text(json.dumps([POINTS]))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["face-quality", *(str(argument) for argument in arguments)])


def test_an_exit_code_tells_whether_any_face_was_scored(files):
    model = ("--aligned", "--model", files / "redness")
    assert run(files / "face.png", *model, "--json").exit_code == 1
    assert run(files / "face.png", files / "crop.png", *model, "--json").exit_code == 0


def answer(*arguments):
    result = run(*arguments, "--json")
    if result.exception is not None:
        raise result.exception
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_landmarks_as_text_and_as_a_file(files):
    model = ("--model", files / "redness")
    (given,) = answer(files / "face.png", *model, "--landmarks", json.dumps([POINTS]))
    assert given["faces"][0]["status"] == "ok" and given["image"] == {"width": 360, "height": 360}
    (one,) = answer(files / "face.png", *model, "--landmarks", json.dumps(POINTS))
    (read,) = answer(files / "face.png", *model, "--landmarks", files / "points.json")
    assert given == one == read


def test_crops_in_one_call_and_a_drawing(files):
    first, second = answer(files / "crop.png", files / "face.png", "--aligned", "--model", files / "redness")
    assert first["faces"][0]["quality"] >= 0 and second["faces"][0]["status"] == "failure_to_assess"
    drawn = run(
        files / "face.png",
        "--model",
        files / "redness",
        "--landmarks",
        files / "points.json",
        "--draw",
        files / "d.png",
    )
    assert drawn.exit_code == 0 and (files / "d.png").is_file()


def test_people_are_told_what_is_missing(files):
    shown = run(files / "face.png", "--model", files / "redness")
    assert shown.exit_code == 1, "no face was scored"
    assert "landmarks_missing" in shown.stdout and "--landmarks" in shown.stdout
    table = run(files / "face.png", "--model", files / "redness", "--landmarks", files / "points.json")
    assert table.exit_code == 0 and "ok" in table.stdout


def test_wrong_calls(files):
    assert run(files / "face.png", files / "crop.png", "--model", files / "redness", "--landmarks", "[]").exit_code == 2
    assert run(files / "face.png", "--model", files / "redness", "--landmarks", "[oops").exit_code == 2
    assert run(files / "face.png", "--model", files / "redness", "--landmarks", files / "crop.png").exit_code != 0
    wrong = run(files / "face.png", "--model", write_tiny_detector(files / "halves"))
    assert "no face-quality model" in str(wrong.exception)
