"""The bundled detector: served by default, licensed, and really finding cells, here drawn ones."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from tiny_detector import encoded
from typer.testing import CliRunner

from server.cli import app
from server.launch import ASSETS, vision_worker
from vision.detection.boxes import box_iou
from vision.images import decode_image
from vision.serving.batch import answer_pictures
from vision.serving.folder import file_digest
from vision.serving.kinds.detector import KIND
from vision.serving.load import digest_in, load_model
from vision.serving.networks import TorchNetwork

DETECTOR = ASSETS / "detector"
CLASSES = ("Platelets", "RBC", "WBC")
RED = [(70, 80), (230, 90), (560, 100), (90, 380), (300, 390), (480, 400)]
RADIUS = 52
WHITE = (320, 150, 480, 310)


def smear() -> bytes:
    """Six red cells with pale middles around a white one, blurred and noisy."""
    image = Image.new("RGB", (640, 480), (205, 200, 195))
    pen = ImageDraw.Draw(image)
    for x, y in RED:
        pen.ellipse((x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS), fill=(190, 140, 140))
        pen.ellipse((x - 18, y - 18, x + 18, y + 18), fill=(205, 170, 165))
    pen.ellipse(WHITE, fill=(200, 170, 200))
    for x, y in ((370, 200), (430, 215), (390, 260)):
        pen.ellipse((x - 32, y - 32, x + 32, y + 32), fill=(90, 50, 160))
    noise = np.random.default_rng(0).normal(0, 4, (480, 640, 3))
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(3))) + noise
    return encoded(Image.fromarray(blurred.clip(0, 255).astype(np.uint8)))


def check_cells(detections: list[dict[str, object]]) -> None:
    """Every cell once, with boxes on the cells."""
    assert Counter(entry["class_name"] for entry in detections) == {"RBC": len(RED), "WBC": 1}
    drawn = torch.tensor([WHITE, *((x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in RED)]).float()
    overlaps = box_iou(drawn, torch.tensor([entry["box"] for entry in detections]))
    assert (overlaps.amax(dim=1) > 0.5).all()


@pytest.mark.anyio
async def test_it_is_served_where_nothing_is_named(connect, make_settings) -> None:
    worker = vision_worker(make_settings(no_llm=True))
    assert worker is not None
    async with connect(None, vision=worker) as client:
        listed = next(e for e in (await client.get("/v1/models")).json()["data"] if e["id"] == "detector")
        assert listed["licence"] == "Apache-2.0; trained on BCCD (MIT)"
        assert tuple(listed["class_names"]) == CLASSES
        answer = await client.post(
            "/v1/vision/detections", files={"image": ("a.png", smear())}, data={"score_threshold": 0.7}
        )
    assert answer.status_code == 200, answer.text
    assert answer.json()["image"] == {"width": 640, "height": 480}
    check_cells(answer.json()["detections"])


def test_detect_needs_no_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(smear())
    result = CliRunner().invoke(app, ["detect", str(tmp_path / "a.png"), "--threshold", "0.7", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["model"] == "detector"
    check_cells(answer["detections"])


def test_its_export_is_of_its_weights_and_answers_like_torch() -> None:
    pytest.importorskip("onnxruntime")
    assert digest_in(DETECTOR / "model.onnx") == file_digest(DETECTOR / "model.safetensors")
    served = load_model(DETECTOR)
    assert served.info.runtime == "onnxruntime"
    in_torch = dataclasses.replace(served, network=TorchNetwork(KIND.module(DETECTOR), 1))
    exported, ours = (
        answer_pictures(model, [decode_image(smear())], {"score_threshold": 0.3})[0]["detections"]
        for model in (served, in_torch)
    )
    assert [entry["class_id"] for entry in exported] == [entry["class_id"] for entry in ours]
    for key, tolerance in (("box", 0.05), ("score", 1e-4)):
        np.testing.assert_allclose([entry[key] for entry in exported], [entry[key] for entry in ours], atol=tolerance)
