"""``dovetail predict``: folders in, JSON, CSV and pictures out; what cannot be read is named and passed over."""

import csv
import json
import logging
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_detector import encoded, halves, write_tiny_detector
from typer.testing import CliRunner, Result

from server.cli import app

pytestmark = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnx") is None, reason="not installed (extra vision): onnxruntime"
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["predict", *(str(argument) for argument in arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.png").write_bytes(encoded(halves("red", "blue")))
    (tmp_path / "in" / "broken.jpg").write_text("no image")
    (tmp_path / "in" / "deep" / "b.png").write_bytes(encoded(halves("blue")))
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    write_tiny_detector(tmp_path / "halves")
    return tmp_path


def test_a_folder_becomes_lines_rows_and_pictures(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = run(folder / "halves", folder / "in", "--json", "--csv", folder / "rows.csv", "--draw", folder / "drawn")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["a.png", "b.png"]
    assert "broken.jpg is passed over" in caplog.text and caplog.records[0].levelno == logging.ERROR
    with (folder / "rows.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [(Path(row["file"]).name, row["class"]) for row in rows] == [
        ("a.png", "red"), ("a.png", "blue"), ("b.png", "blue"),
    ]  # fmt: skip
    assert sorted(file.name for file in (folder / "drawn").iterdir()) == ["a.jpg", "b.jpg"]


def test_options_are_the_kinds_and_others_are_refused(folder: Path) -> None:
    image = folder / "in" / "a.png"
    (line,) = run(folder / "halves", image, "--json", "--classes", "blue").stdout.splitlines()
    assert [entry["class_name"] for entry in json.loads(line)["detections"]] == ["blue"]
    for wrong, words in (("--classes green", "knows red, blue"), ("--aligned", "not known to a detector")):
        refused = run(folder / "halves", image, *wrong.split())
        assert refused.exit_code == 2 and words in " ".join(refused.output.replace("│", " ").split())
    nothing = run(folder / "halves", folder / "in" / "broken.jpg")
    assert nothing.exit_code == 1 and "none of the 1 files" in str(nothing.exception)


@pytest.mark.skipif(find_spec("av") is None or find_spec("trackers") is None, reason="not installed (extra video)")
def test_a_video_becomes_frames_whose_things_keep_their_numbers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    import av

    video = folder / "clip.mp4"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for colours in [("red", "black")] * 4 + [("red", "blue")] * 4:
            for packet in stream.encode(av.VideoFrame.from_image(halves(*colours))):
                container.mux(packet)
        container.mux(stream.encode())
    (folder / "broken.mp4").write_bytes(b"no video" * 99)
    out = ("--json", "--csv", folder / "rows.csv", "--draw", folder / "drawn")
    result = run(folder / "halves", video, folder / "broken.mp4", "--track", "--step", 2, *out)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["frame"], line["time_s"]) for line in lines] == [(0, 0.0), (2, 0.2), (4, 0.4), (6, 0.6)]
    numbers = [{entry["class_name"]: entry["track_id"] for entry in line["detections"]} for line in lines]
    assert numbers == [{"red": None}, {"red": 1}, {"red": 1, "blue": None}, {"red": 1, "blue": 2}]
    assert "broken.mp4 is passed over" in caplog.text
    with (folder / "rows.csv").open(newline="") as opened:
        rows = {(row["frame"], row["class"], row["track"]) for row in csv.DictReader(opened)}
    assert {("4", "blue", ""), ("6", "red", "1"), ("6", "blue", "2")} <= rows
    assert len(list((folder / "drawn").iterdir())) == 4
