"""The bundled face-quality scorer: served by default, licensed, and its scores fall as a face gets worse."""

import base64
import json
import os
import re
import tarfile
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from drawn_faces import LANDMARKS, drawn_face
from PIL import Image
from tiny_detector import encoded
from typer.testing import CliRunner

from server.cli import app
from server.launch import ASSETS, vision_worker
from vision.data.degradations import degrade
from vision.data.faces import london_faces
from vision.serving.folder import file_digest
from vision.serving.kinds.face_quality import KIND
from vision.serving.load import digest_in, load_model
from vision.serving.networks import TorchNetwork

SCORER = ASSETS / "face_quality"
LICENCE = "Apache-2.0; trained on the Face Research Lab London Set (CC BY 4.0, DeBruine and Jones 2017)"
pytestmark = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="not installed (extra vision): onnxruntime")


@pytest.mark.anyio
async def test_it_is_served_where_nothing_is_named(connect, make_settings) -> None:
    worker = vision_worker(make_settings(no_llm=True))
    assert worker is not None
    async with connect(None, vision=worker) as client:
        listed = {entry["id"]: entry for entry in (await client.get("/v1/models")).json()["data"]}
        assert (listed["face_quality"]["kind"], listed["face_quality"]["licence"]) == ("face-quality", LICENCE)
        image = base64.b64encode(encoded(drawn_face())).decode()
        body = {"image": image, "landmarks": [LANDMARKS.tolist()]}
        answer = await client.post("/v1/vision/face-quality", json=body)
    assert answer.status_code == 200, answer.text
    (face,) = answer.json()["faces"]
    assert answer.json()["model"] == "face_quality" and face["status"] == "ok" and 0 <= face["quality"] <= 100


def test_the_command_needs_no_path(tmp_path: Path) -> None:
    drawn_face().save(tmp_path / "face.png")
    points = json.dumps(LANDMARKS.tolist())
    result = CliRunner().invoke(app, ["face-quality", str(tmp_path / "face.png"), "--landmarks", points, "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["model"] == "face_quality" and answer["faces"][0]["status"] == "ok"


def test_its_export_is_of_its_weights_and_answers_like_torch() -> None:
    assert digest_in(SCORER / "model.onnx") == file_digest(SCORER / "model.safetensors")
    exported, ours = load_model(SCORER).network, TorchNetwork(KIND.module(SCORER), 1)
    assert exported.runtime == "onnxruntime"
    crops = np.random.default_rng(0).integers(0, 256, (4, 3, 112, 112), dtype=np.uint8)
    np.testing.assert_allclose(exported.run(crops)[0], ours.run(crops)[0], atol=1e-4)


def test_its_card_names_the_data_their_licence_and_the_limits() -> None:
    card = (SCORER / "README.md").read_text(encoding="utf-8")
    for words in ("Face Research Lab London Set", "CC BY 4.0", "DeBruine", "130", "must not be used"):
        assert words in card, words
    assert not re.search(rb"/[\w.-]+/[\w./-]+\.py", (SCORER / "model.onnx").read_bytes())  # where it was traced


@pytest.mark.skipif("DOVETAIL_TEST_DATA" not in os.environ, reason="DOVETAIL_TEST_DATA names no folder of data")
def test_scores_of_withheld_people_fall_with_every_defect(tmp_path: Path) -> None:
    archive = Path(os.environ["DOVETAIL_TEST_DATA"]) / "faces" / "london_faces.tar.gz"
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    source = london_faces(tmp_path / "london_faces", "withheld")
    faces = [source.read(index) for index in range(len(source.labels))]
    network = load_model(SCORER).network

    def score(images) -> np.ndarray:
        return network.run(np.stack([np.asarray(image).transpose(2, 0, 1) for image in images]))[0]

    generator = np.random.default_rng(0)
    for kind in ("blur", "downsampling", "jpeg", "occlusion", "darkness", "yaw"):
        means = [
            float(score([degrade(face, kind, severity, generator) for face in faces]).mean())
            for severity in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        # Mild JPEG, a few lost pixels and mild darkness cost the recogniser of the labels nothing: there it may rise.
        assert all(worse < milder + 0.04 for milder, worse in pairwise(means)), (kind, means)
        assert means[0] - means[-1] > 0.05, (kind, means)
    mirrored = [face.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for face in faces]
    assert np.abs(score(faces) - score(mirrored)).mean() < 0.03
