"""A detector with all it takes to use it: network, classes, input size, normalisation, licence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from vision.backbones import create_backbone
from vision.backbones.preprocessing import IMAGENET, Normalization
from vision.data.classification import to_tensor
from vision.data.view import RESIZES, Resize, render, whole_image
from vision.detection.backbone import Backbone
from vision.detection.boxes import clip_boxes
from vision.detection.detections import Detections
from vision.detection.thundernet import ThunderNet, ThunderNetConfig
from vision.detection.yolo_v2 import STRIDE, Darknet19, YOLOv2, YOLOv2Config

Head = ThunderNetConfig | YOLOv2Config
Network = ThunderNet | YOLOv2

ARCHITECTURES: dict[str, type[Head]] = {"thundernet": ThunderNetConfig, "yolo_v2": YOLOv2Config}
DARKNET = "darknet19"
NOTHING_FOUND = (
    "the detector finds none of the %s; train longer, lower the learning rate, or look at the labels before using it"
)


@dataclass(frozen=True)
class DetectorConfig:
    """What a saved detector says of itself.

    ``architecture`` is "thundernet" or "yolo_v2"; ``backbone`` a name of ``vision.backbones``, or "darknet19" under
    YOLOv2. Images are brought to ``image_size`` pixels square by ``resize`` and go through ``normalization``. ``head``
    holds sizes, anchors and the thresholds of test time. ``licence`` is that of the weights, which follows from the
    data they were trained on; "unknown" where nobody said. ``training_recall`` is the share of boxes of some training
    images that it finds at the default threshold; 0 says that the training failed. None: nobody looked.
    """

    architecture: str
    backbone: str
    class_names: tuple[str, ...]
    image_size: int = 320
    resize: Resize = "stretch"
    normalization: Normalization = IMAGENET
    licence: str = "unknown"
    description: str = ""
    head: Head = field(default_factory=ThunderNetConfig)
    training_recall: float | None = None

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture is {self.architecture!r}; allowed are {', '.join(ARCHITECTURES)}")
        if not isinstance(self.head, ARCHITECTURES[self.architecture]):
            raise ValueError(f"the head of {self.architecture} cannot be described by {type(self.head).__name__}")
        if self.resize not in RESIZES:
            raise ValueError(f"resize is {self.resize!r}; allowed are {', '.join(RESIZES)}")
        if self.image_size < STRIDE or (self.architecture == "yolo_v2" and self.image_size % STRIDE):
            raise ValueError(
                f"image_size is {self.image_size}; it must be at least {STRIDE}, and a multiple of it for yolo_v2"
            )
        if not self.class_names or len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"class_names are {self.class_names}; a detector needs at least one, each only once")


@dataclass(frozen=True)
class LoadedDetector:
    """A network, in evaluation mode, and its description."""

    model: Network
    config: DetectorConfig


def build_detector(config: DetectorConfig) -> Network:
    """A freshly initialised network. Errors: UnknownBackboneError."""
    backbone: Backbone = Darknet19() if config.backbone == DARKNET else create_backbone(config.backbone)
    if isinstance(config.head, ThunderNetConfig):
        return ThunderNet(backbone, len(config.class_names), config.head)
    return YOLOv2(backbone, len(config.class_names), config.head)


def prepare(image: Image.Image, config: DetectorConfig) -> Tensor:
    """An image as the detector takes it, before normalisation: uint8 [3, image_size, image_size]."""
    view = whole_image(image.width, image.height, config.resize)
    return to_tensor(render(image.convert("RGB"), view, config.image_size))


@torch.inference_mode()
def detect_images(loaded: LoadedDetector, images: Sequence[Image.Image | Tensor]) -> list[Detections]:
    """What is on each image, boxes in that image's own pixels, on the CPU; all images run as one batch.

    An image is a Pillow image or a uint8 RGB tensor [3, H, W], of any size.
    """
    if not images:
        return []
    pictures = [to_picture(image) for image in images]
    config, device = loaded.config, next(loaded.model.parameters()).device
    batch = torch.stack([prepare(picture, config) for picture in pictures]).to(device)
    found = loaded.model(config.normalization(batch.float() / 255))
    return [
        to_original(detections, picture.width, picture.height, config)
        for detections, picture in zip(found, pictures, strict=True)
    ]


def to_original(detections: Detections, width: int, height: int, config: DetectorConfig) -> Detections:
    """``detections`` of a network's input in the pixels of the image of ``width`` by ``height`` it was made from."""
    view = whole_image(width, height, config.resize)
    boxes = torch.from_numpy(view.boxes_out(detections.boxes.cpu().numpy(), config.image_size))
    return Detections(clip_boxes(boxes, height, width), detections.scores.cpu(), detections.class_ids.cpu())


def to_picture(image: Image.Image | Tensor) -> Image.Image:
    """A uint8 RGB tensor [3, H, W] as a Pillow image; a Pillow image as it is."""
    if isinstance(image, Image.Image):
        return image
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"the image is {image.dtype} {tuple(image.shape)}; expected torch.uint8 [3, height, width]")
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
