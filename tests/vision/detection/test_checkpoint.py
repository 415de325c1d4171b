import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from vision.backbones import create_backbone
from vision.backbones.checkpoint import save_backbone
from vision.backbones.preprocessing import BGR_255
from vision.data.view import Resize
from vision.detection import Detections
from vision.detection.checkpoint import load_detector, read_detector_config, save_detector
from vision.detection.detector import DetectorConfig, LoadedDetector, build_detector, detect_images
from vision.detection.rpn import AnchorGrid, ProposalBudget
from vision.detection.thundernet import ThunderNetConfig
from vision.detection.yolo_v2 import YOLOv2Config
from vision.serving.folder import CheckpointError

THUNDERNET = DetectorConfig(
    "thundernet",
    "snet49",
    ("a", "b"),
    image_size=96,
    normalization=BGR_255,
    licence="MIT",
    head=ThunderNetConfig(
        anchors=AnchorGrid(scales=(16, 32)), test_budget=ProposalBudget(100, 20), score_threshold=0.0
    ),
)
YOLO = DetectorConfig(
    "yolo_v2",
    "fd_mobilenet_x0_25",
    ("a",),
    image_size=64,
    resize="letterbox",
    head=YOLOv2Config(width=16, anchors=((1.0, 1.5), (2.0, 2.0))),
)


@pytest.mark.parametrize("config", [THUNDERNET, YOLO], ids=["thundernet", "yolo_v2"])
def test_a_saved_detector_comes_back_the_same(config: DetectorConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_detector(config).eval()
    save_detector(model, config, tmp_path / "model")
    loaded = load_detector(tmp_path / "model")
    assert loaded.config == config
    assert not loaded.model.training
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    (before,), (after,) = (detect_images(x, [image]) for x in (LoadedDetector(model, config), loaded))
    assert len(before.boxes) > 0
    assert torch.equal(before.boxes, after.boxes) and torch.equal(before.scores, after.scores)


class Planted(nn.Module):
    """Finds one box, the same on every image, in the pixels of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.box = nn.Parameter(torch.tensor([[24.0, 12, 60, 96]]))

    def forward(self, images: torch.Tensor) -> list[Detections]:
        return [Detections(self.box.detach(), torch.tensor([0.9]), torch.tensor([1])) for _ in images]


@pytest.mark.parametrize(("resize", "box"), [("stretch", [48.0, 60, 120, 480]), ("letterbox", [0.0, 60, 156, 480])])
def test_detections_are_in_the_pixels_of_each_image(resize: Resize, box: list[float]) -> None:
    """On a picture of 192 by 480; the letterbox starts 144 pixels left of it, so the box is cut off there."""
    loaded = LoadedDetector(Planted(), dataclasses.replace(THUNDERNET, resize=resize))  # type: ignore[arg-type]
    first, second = detect_images(loaded, [Image.new("RGB", (192, 480)), Image.new("L", (96, 96))])
    assert first.boxes.tolist() == [box]
    assert second.boxes.tolist() == [[24, 12, 60, 96]]
    assert detect_images(loaded, []) == []


def test_images_of_another_kind_are_refused() -> None:
    loaded = LoadedDetector(build_detector(YOLO).eval(), YOLO)
    with pytest.raises(ValueError, match=r"torch\.float32 \(3, 8, 8\); expected torch\.uint8"):
        detect_images(loaded, [torch.zeros(3, 8, 8)])


@pytest.mark.parametrize(("change", "message"), [
    ({"architecture": "ssd"}, "architecture is 'ssd'; allowed are thundernet, yolo_v2"),
    ({"resize": "crop"}, "resize is 'crop'"),
    ({"image_size": 16}, "image_size is 16"),
    ({"class_names": ("a", "a")}, "each only once"),
    ({"head": YOLOv2Config()}, "cannot be described by YOLOv2Config"),
])  # fmt: skip
def test_impossible_descriptions_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(THUNDERNET, **change)  # type: ignore[arg-type]


def test_folders_that_hold_no_detector_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_detector(tmp_path / "none")
    save_backbone(create_backbone("snet49"), tmp_path / "backbone")
    with pytest.raises(CheckpointError, match="does not describe a detector"):
        load_detector(tmp_path / "backbone")

    save_detector(build_detector(YOLO), YOLO, tmp_path / "yolo")
    file = tmp_path / "yolo" / "config.json"
    good = file.read_text()
    file.write_text(json.dumps(json.loads(good) | {"image_size": 50}))
    with pytest.raises(CheckpointError, match="image_size is 50"):
        read_detector_config(tmp_path / "yolo")
    file.write_text(json.dumps(json.loads(good) | {"class_names": ["a", "b"]}))
    with pytest.raises(
        CheckpointError, match=r"yolo_v2 on fd_mobilenet_x0_25; keys 2 of another shape: output\.weight"
    ):
        load_detector(tmp_path / "yolo")
    (tmp_path / "yolo" / "model.safetensors").write_bytes(b"broken")
    file.write_text(good)
    with pytest.raises(CheckpointError, match="cannot read"):
        load_detector(tmp_path / "yolo")
