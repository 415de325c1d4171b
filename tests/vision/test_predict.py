"""Detectors as the server calls them: numpy beside the torch reference, answers in pixels of the original."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_detector import encoded, halves, write_tiny_detector

from vision.backbones.checkpoint import CheckpointError
from vision.detect import Candidates, DetectionOptions, Detector, DetectorDescription
from vision.detection.boxes import soft_nms as reference_soft_nms
from vision.detection.checkpoint import save_detector
from vision.detection.detector import DetectorConfig, build_detector, detect_images
from vision.detection.rpn import ProposalBudget
from vision.detection.thundernet import ThunderNetConfig
from vision.images import ImageError, ImageLimits, decode_image
from vision.onnx_runtime import soft_nms
from vision.predict import ModelError, load_vision_model, name_of

needs_onnx = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnx") is None, reason="not installed (extra vision): onnxruntime"
)


@pytest.mark.parametrize("count", [0, 1, 7, 150])
@pytest.mark.parametrize("seed", [0, 1])
def test_soft_nms_is_the_reference(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 30
    boxes = torch.cat([corners, corners + torch.rand(count, 2, generator=generator) * 20], dim=1)
    boxes = torch.cat([boxes, boxes[: count // 3]])  # twins, which overlap wholly
    scores = torch.rand(len(boxes), generator=generator)
    class_ids = torch.randint(0, 3, (len(boxes),), generator=generator)
    expected, expected_scores = reference_soft_nms(boxes, scores, 0.5, class_ids, max_kept=40)
    kept, kept_scores = soft_nms(boxes.numpy(), scores.numpy(), class_ids.numpy(), 0.5, 40)
    assert kept.tolist() == expected.tolist()
    np.testing.assert_allclose(kept_scores, expected_scores.numpy(), rtol=1e-5)


def tiny_thundernet(folder: Path) -> DetectorConfig:
    torch.manual_seed(0)
    head = ThunderNetConfig(test_budget=ProposalBudget(100, 20), score_threshold=0.01)
    config = DetectorConfig("thundernet", "snet49", ("a", "b"), image_size=64, licence="MIT", head=head)
    save_detector(build_detector(config), config, folder)
    return config


def test_a_checkpoint_runs_in_torch_and_answers_like_it(tmp_path: Path) -> None:
    tiny_thundernet(tmp_path / "mine")
    model = load_vision_model(tmp_path / "mine")
    assert (model.info.name, model.info.kind, model.info.runtime, model.info.licence) == (
        "mine",
        "detector",
        "torch",
        "MIT",
    )
    image = halves("red", "blue", (100, 70))
    picture = decode_image(encoded(image))
    (answer,) = model.predict([model.prepare(picture, {"score_threshold": 0.02})])
    from vision.detection.checkpoint import load_detector

    (expected,) = detect_images(load_detector(tmp_path / "mine"), [image])
    wanted = expected.scores >= 0.02
    assert len(answer["detections"]) == int(wanted.sum()) > 0
    boxes = torch.tensor([entry["box"] for entry in answer["detections"]])
    torch.testing.assert_close(boxes, expected.boxes[wanted], atol=2e-3, rtol=0)
    assert [entry["class_id"] for entry in answer["detections"]] == expected.class_ids[wanted].tolist()


class Fixed:
    name = "fixed"

    def run(self, images, thresholds):
        boxes = np.array([[0, 0, 16, 32], [-5, 8, 40, 24]], dtype=np.float32)
        return [Candidates(boxes, np.array([0.9, 0.6], np.float32), np.array([1, 0])) for _ in images]


def test_boxes_are_scaled_and_clipped_to_the_original_however_it_was_resized() -> None:
    def boxes(resize):
        description = DetectorDescription(("a", "b"), "MIT", 32, resize, "", 0.5, 0.05, 100)
        detector = Detector("fixed", description, Fixed())
        picture = decode_image(encoded(halves(size=(64, 32))))
        (answer,) = detector.predict([detector.prepare(picture, {})])
        return [entry["box"] for entry in answer["detections"]]

    assert boxes("stretch") == [[0, 0, 32, 32], [0, 8, 64, 24]]
    assert boxes("letterbox") == [[0, 0, 32, 32], [0, 0, 64, 32]]


@needs_onnx
def test_an_export_from_other_weights_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_thundernet(tmp_path / "mine")
    config = (tmp_path / "mine" / "config.json").read_text()
    write_tiny_detector(tmp_path / "mine")
    (tmp_path / "mine" / "config.json").write_text(config)
    assert load_vision_model(tmp_path / "mine").info.runtime == "torch"
    assert "export" in caplog.text
    (tmp_path / "mine" / "model.safetensors").unlink()
    assert load_vision_model(tmp_path / "mine").info.runtime == "onnxruntime"
    assert load_vision_model(tmp_path / "mine" / "model.onnx").info.class_names == ("red", "blue")


@pytest.mark.parametrize(("path", "name"), [
    ("cats", "cats"), ("runs/cats/model", "cats"), ("runs/cats/model/model.onnx", "cats"), ("cats.onnx", "cats"),
    ("/model", "model"), ("/model/model.onnx", "model"),
])  # fmt: skip
def test_a_model_is_called_after_its_run(path: str, name: str) -> None:
    assert name_of(Path(path)) == name


@needs_onnx
def test_onnx_runtime_computes_with_the_threads_it_is_given(tmp_path: Path) -> None:
    folder = write_tiny_detector(tmp_path / "mine")
    for num_threads in (1, 2):
        model = load_vision_model(folder, num_threads)
        assert model.runtime.session.get_session_options().intra_op_num_threads == num_threads  # type: ignore[attr-defined]


@needs_onnx
def test_what_is_no_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no vision model"):
        load_vision_model(tmp_path)
    (tmp_path / "a.onnx").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="no ONNX model"):
        load_vision_model(tmp_path / "a.onnx")
    (tmp_path / "config.json").write_text('{"format": "other"}')
    with pytest.raises(CheckpointError, match="does not describe a detector"):
        load_vision_model(tmp_path)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ModelError, match="score_treshold"):
        DetectionOptions.from_json({"score_treshold": 0.5})


def test_a_large_jpeg_may_be_decoded_smaller_but_keeps_its_size() -> None:
    data = encoded(halves(size=(1600, 1200)), "JPEG")
    picture = decode_image(data, enough=100)
    assert (picture.width, picture.height) == (1600, 1200)
    assert (picture.image.width, picture.image.height) == (400, 300)
    assert decode_image(data).image.size == (1600, 1200)


def test_the_header_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    data = encoded(halves(size=(100, 50)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="100x50") as error:
        decode_image(data, ImageLimits(max_pixels=4999))
    assert error.value.code == "image_too_large"
    with pytest.raises(ImageError, match="100x50"):
        decode_image(data, ImageLimits(max_side=99))
