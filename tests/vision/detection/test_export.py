import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_detector import encoded

from vision.detection import export
from vision.detection.checkpoint import load_detector, save_detector
from vision.detection.detector import DetectorConfig, build_detector, detect_images
from vision.detection.export import export_detector, pool_by_rows
from vision.detection.psroi_align import psroi_align
from vision.detection.rpn import ProposalBudget
from vision.detection.thundernet import ThunderNetConfig
from vision.detection.yolo_v2 import YOLOv2Config
from vision.export import NEEDED, ExportError
from vision.images import decode_image
from vision.predict import load_vision_model

MISSING = [name for name in NEEDED if find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed (extra vision): {', '.join(MISSING)}")
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def lively_detector(folder: Path, proposals: int = 40) -> DetectorConfig:
    """Random weights whose scores and boxes vary; more proposals are asked for than a small image has boxes to give."""
    torch.manual_seed(0)
    head = ThunderNetConfig(test_budget=ProposalBudget(200, proposals), score_threshold=0.3)
    config = DetectorConfig("thundernet", "snet49", ("a", "b"), image_size=96, licence="MIT", head=head)
    model = build_detector(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train().dense(torch.rand(4, 3, 96, 96))
        for layer, factor in (
            (model.rpn.objectness, 30),
            (model.rpn.deltas, 5),
            (model.class_logits, 20),
            (model.box_deltas, 100),
        ):
            layer.weight.mul_(factor)
    save_detector(model.eval(), config, folder)
    return config


@pytest.mark.slow
@needs_onnx
@quiet
def test_the_served_export_answers_like_torch(tmp_path: Path) -> None:
    lively_detector(tmp_path / "mine", proposals=150)
    report = export_detector(tmp_path / "mine")
    assert report.unmatched_share == 0
    assert report.box_difference_px < 0.1
    assert report.score_difference < 1e-3
    model = load_vision_model(tmp_path / "mine")
    assert (model.info.runtime, model.info.licence, model.info.class_names) == ("onnxruntime", "MIT", ("a", "b"))
    loaded = load_detector(tmp_path / "mine")
    noise = torch.randint(0, 256, (3, 6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = [Image.fromarray(part.numpy()).resize((120, 90), Image.Resampling.BICUBIC) for part in noise]
    pictures = [decode_image(encoded(image)) for image in images]
    answers = model.predict([model.prepare(picture, {"score_threshold": 0.3}) for picture in pictures])
    for answer, expected in zip(answers, detect_images(loaded, images), strict=True):
        assert len(answer["detections"]) == len(expected.scores) > 0
        boxes = torch.tensor([entry["box"] for entry in answer["detections"]])
        torch.testing.assert_close(boxes, expected.boxes, atol=0.1, rtol=0)


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_pooling_by_rows_is_psroi_align(reduction) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5 * 9, 7, 6, generator=generator)
    corners = torch.rand(11, 2, generator=generator) * 90 - 10
    boxes = torch.cat([corners, corners + torch.rand(11, 2, generator=generator) * 60], dim=1)
    image_ids = torch.randint(0, 2, (11,), generator=generator)
    expected = psroi_align(features, boxes, image_ids, 16, 3, reduction=reduction)
    torch.testing.assert_close(pool_by_rows(features, boxes, image_ids, 16, 3, reduction), expected)


def test_only_thundernet_has_an_export(tmp_path: Path) -> None:
    config = DetectorConfig("yolo_v2", "snet49", ("a",), image_size=64, head=YOLOv2Config())
    with pytest.raises(ExportError, match="yolo_v2 cannot be exported"):
        export.FixedRegions(type("Loaded", (), {"model": build_detector(config), "config": config})())


@pytest.mark.slow
@needs_onnx
@quiet
def test_a_wrong_export_is_refused_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lively_detector(tmp_path / "mine")
    monkeypatch.setattr(export, "compare", lambda *_: (float("nan"), 0.0, 0.0))
    with pytest.raises(ExportError, match="apart from torch"):
        export_detector(tmp_path / "mine", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["class_names"] == ["a", "b"]
