"""Object detection: ThunderNet, and YOLOv2 as the one-stage host of mining."""

from vision.detection.detections import Detections
from vision.detection.thundernet import ThunderNet, ThunderNetConfig
from vision.detection.thundernet_loss import ThunderNetLoss
from vision.detection.truth import TrueBoxError
from vision.detection.yolo_loss import YOLOv2Loss
from vision.detection.yolo_v2 import YOLOv2, YOLOv2Config

__all__ = [
    "Detections",
    "ThunderNet",
    "ThunderNetConfig",
    "ThunderNetLoss",
    "TrueBoxError",
    "YOLOv2",
    "YOLOv2Config",
    "YOLOv2Loss",
]
