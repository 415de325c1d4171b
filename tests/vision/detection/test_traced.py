from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detector import encoded
from torch.nn import functional

from vision.detection import traced
from vision.detection.checkpoint import load_detector, save_detector
from vision.detection.detector import DetectorConfig, build_detector, detect_images
from vision.detection.psroi_align import psroi_align
from vision.detection.rpn import ProposalBudget
from vision.detection.thundernet import ThunderNetConfig
from vision.detection.traced import pool_by_rows
from vision.detection.yolo_v2 import YOLOv2Config
from vision.images import decode_image
from vision.serving import export
from vision.serving.batch import answer_pictures
from vision.serving.export import NEEDED, ExportError, export_model
from vision.serving.load import load_model

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
    images = config.normalization(functional.interpolate(torch.rand(8, 3, 8, 8), size=(96, 96), mode="bilinear"))
    with torch.no_grad():
        model.train().dense(images)
        model.eval()
        # To the spread of a trained network: wilder ones lend rounding a weight that no detector gives it.
        maps = model.dense(images)
        model.rpn.objectness.weight.mul_(2 / maps.objectness.std())
        model.rpn.deltas.weight.mul_(0.3 / maps.deltas.std())
        maps = model.dense(images)
        logits, deltas = model.classify(maps, model.propose(maps, head.test_budget))
        model.class_logits.weight.mul_(2 / logits.std(dim=0).mean())
        logits, deltas = model.classify(maps, model.propose(maps, head.test_budget))
        model.class_logits.bias.sub_(logits.mean(dim=0))
        model.box_deltas.weight.mul_(1 / deltas.std())
    save_detector(model, config, folder)
    return config


@pytest.mark.slow
@needs_onnx
@quiet
def test_the_served_export_answers_like_torch(tmp_path: Path) -> None:
    lively_detector(tmp_path / "mine", proposals=150)
    report = export_model(tmp_path / "mine")
    assert report["unmatched_share"] == 0
    assert report["box_difference_px"] < 0.1
    assert report["score_difference"] < 1e-3
    model = load_model(tmp_path / "mine")
    assert (model.info.runtime, model.info.licence, model.info.class_names) == ("onnxruntime", "MIT", ("a", "b"))
    loaded = load_detector(tmp_path / "mine")
    noise = torch.randint(0, 256, (3, 6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = [Image.fromarray(part.numpy()).resize((120, 90), Image.Resampling.BICUBIC) for part in noise]
    pictures = [decode_image(encoded(image)) for image in images]
    answers = answer_pictures(model, pictures, {"score_threshold": 0.3})
    for answer, expected in zip(answers, detect_images(loaded, images), strict=True):
        wanted = expected.scores >= 0.3  # Soft-NMS leaves some below the threshold
        assert len(answer["detections"]) == wanted.sum() > 0
        boxes = torch.tensor([entry["box"] for entry in answer["detections"]])
        torch.testing.assert_close(boxes, expected.boxes[wanted], atol=0.1, rtol=0)
        scores = torch.tensor([entry["score"] for entry in answer["detections"]])
        torch.testing.assert_close(scores, expected.scores[wanted], atol=1e-3, rtol=0)


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_pooling_by_rows_is_psroi_align(reduction) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5 * 9, 7, 6, generator=generator)
    corners = torch.rand(11, 2, generator=generator) * 90 - 10
    boxes = torch.cat([corners, corners + torch.rand(11, 2, generator=generator) * 60], dim=1)
    image_ids = torch.randint(0, 2, (11,), generator=generator)
    expected = psroi_align(features, boxes, image_ids, 16, 3, reduction=reduction)
    torch.testing.assert_close(pool_by_rows(features, boxes, image_ids, 16, 3, reduction), expected)


BOXES = np.array([[0, 0, 96, 96], [0, 0, 96, 96], [5, 5, 20, 20]], dtype=np.float32)
SCORES = np.array([[0.1], [0.9], [0.5]], dtype=np.float32)


def test_rows_whose_boxes_coincide_are_told_apart_by_their_scores() -> None:
    order = [2, 1, 0]
    same = traced.match_rows(BOXES, SCORES, BOXES[order], SCORES[order])
    assert (same.box_differences.max(), same.score_differences.max(), same.unmatched_score) == (0, 0, 0)
    assert same.total_score == pytest.approx(3.0)


@pytest.mark.parametrize(("boxes", "scores", "unmatched", "difference"), [
    (BOXES + 5, SCORES, 1.0, 0.0),  # every box elsewhere
    (BOXES, SCORES * 0.5, 0.0, 0.45),  # scores of another network
    (BOXES[[1, 1, 1]], SCORES[[1, 1, 1]], (0.5 + 0.9) / (1.5 + 2.7), 0.8),  # one row for all
    (BOXES[:2], SCORES[:2], 0.5 / 2.5, 0.0),  # an object lost
], ids=["moved", "scores", "doubled", "lost"])  # fmt: skip
def test_a_bad_export_has_rows_without_partners_or_other_scores(
    boxes: np.ndarray, scores: np.ndarray, unmatched: float, difference: float
) -> None:
    found = traced.match_rows(BOXES, SCORES, boxes, scores)
    assert found.unmatched_score / found.total_score == pytest.approx(unmatched, abs=1e-6)
    assert found.score_differences.max(initial=0.0) == pytest.approx(difference, abs=1e-6)


def test_only_thundernet_has_an_export(tmp_path: Path) -> None:
    config = DetectorConfig("yolo_v2", "snet49", ("a",), image_size=64, head=YOLOv2Config())
    with pytest.raises(ExportError, match="yolo_v2 cannot be exported"):
        traced.FixedRegions(type("Loaded", (), {"model": build_detector(config), "config": config})())


@pytest.mark.slow
@needs_onnx
@quiet
def test_a_wrong_export_is_refused_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's boxes are those of a network whose second stage moves them twice as far."""
    lively_detector(tmp_path / "mine")
    write = export.write

    def write_badly(given: Any, *rest: Any) -> None:
        with torch.no_grad():
            given.module.model.box_deltas.weight.mul_(2)
        write(given, *rest)
        with torch.no_grad():
            given.module.model.box_deltas.weight.mul_(0.5)

    monkeypatch.setattr(export, "write", write_badly)
    (tmp_path / "model.onnx").write_bytes(b"the one before")
    with pytest.raises(ExportError, match="apart from torch"):
        export_model(tmp_path / "mine", tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"the one before"
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["model.onnx"]
