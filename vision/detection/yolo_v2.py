"""YOLOv2, the one-stage host of loss rank mining (Redmon and Farhadi, arXiv 1612.08242; darknet's yolov2-voc.cfg).

The same head sits on Darknet-19, which is the published detector, or on any light backbone of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.losses import at_least_float32
from vision.detection.backbone import Backbone, without_classifier
from vision.detection.boxes import MAX_SIZE_DELTA, clip_boxes, nms
from vision.detection.detections import Detections

STRIDE = 32

# Published anchors: width and height in cells of 32 pixels.
VOC_ANCHORS = ((1.3221, 1.73145), (3.19275, 4.00944), (5.05587, 8.09892), (9.47112, 4.84053), (11.2364, 10.0071))

# Widths of Darknet-19 between its max pools; 3x3 convolutions, every second one 1x1.
DARKNET_STAGES = (
    (32,),
    (64,),
    (128, 64, 128),
    (256, 128, 256),
    (512, 256, 512, 256, 512),
    (1024, 512, 1024, 512, 1024),
)


def convolution(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Convolution without bias, batch norm, leaky ReLU of slope 0.1: darknet's block."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(0.1),
    )


class Darknet19(nn.Module):
    """The trunk of the published YOLOv2: maps at strides 8, 16 and 32 with 256, 512 and 1024 channels."""

    feature_channels = (256, 512, 1024)

    def __init__(self) -> None:
        super().__init__()
        stages, channels = [], 3
        for widths in DARKNET_STAGES:
            layers = []
            for position, width in enumerate(widths):
                layers.append(convolution(channels, width, 3 if position % 2 == 0 else 1))
                channels = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """The last map of each of the last three stages."""
        maps = []
        for index, stage in enumerate(self.stages):
            images = stage(functional.max_pool2d(images, 2) if index else images)
            maps.append(images)
        return tuple(maps[3:])


@dataclass(frozen=True)
class YOLOv2Config:
    """The head's sizes; the defaults are ours, for a light backbone: about its own cost at 320 pixels.

    ``width`` of the last 3x3 convolution and of ``num_convolutions`` 3x3 ones on C5 before it; ``passthrough`` channels
    of C4, folded to four times as many at C5's size. The published head is ``PUBLISHED_HEAD``. ``anchors`` are (width,
    height) in cells of 32 pixels; find them for other data by k-means on 1 - IoU of the box shapes.
    """

    width: int = 256
    num_convolutions: int = 0
    passthrough: int = 32
    anchors: tuple[tuple[float, float], ...] = VOC_ANCHORS
    score_threshold: float = 0.005
    nms_threshold: float = 0.45
    max_detections: int = 100


PUBLISHED_HEAD = YOLOv2Config(width=1024, num_convolutions=2, passthrough=64)


@dataclass(frozen=True)
class Predictions:
    """The final map taken apart: N images, A anchors, S x S cells, C classes.

    ``centres`` [N, A, S, S, 2] are sigmoid(tx, ty), the place inside the cell; ``sizes`` [N, A, S, S, 2] are (tw, th),
    logarithms against the anchor; ``objectness`` [N, A, S, S] after the sigmoid; ``class_logits`` [N, A, S, S, C];
    ``boxes`` [N, A, S, S, 4] in pixels.
    """

    centres: Tensor
    sizes: Tensor
    objectness: Tensor
    class_logits: Tensor
    boxes: Tensor


class YOLOv2(nn.Module):
    """The detector over any ``Backbone``, whose classifier it drops.

    Called on images [N, 3, H, W] it answers ``Detections`` per image; ``predict`` gives what ``YOLOv2Loss`` trains.
    Image sides must be multiples of 32, so that C4 folds onto C5.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        config: YOLOv2Config = YOLOv2Config(),
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; a detector needs at least one class")
        self.config = config
        self.num_classes = num_classes
        self.backbone = without_classifier(backbone)
        _, c4_channels, c5_channels = backbone.feature_channels
        layers, channels = [], c5_channels
        for _ in range(config.num_convolutions):
            layers.append(convolution(channels, config.width, 3))
            channels = config.width
        self.deepen = nn.Sequential(*layers)
        self.passthrough = convolution(c4_channels, config.passthrough, 1)
        self.join = convolution(channels + 4 * config.passthrough, config.width, 3)
        self.output = nn.Conv2d(config.width, len(config.anchors) * (5 + num_classes), 1)

    def predict(self, images: Tensor) -> Predictions:
        """All predictions. bx = (j + sigmoid(tx)) 32, bw = pw exp(tw) 32 (section 2, figure 3 of the paper)."""
        height, width = images.shape[-2:]
        if height % STRIDE or width % STRIDE:
            raise ValueError(
                f"images are {width}x{height}; both sides must be multiples of {STRIDE}: resize or pad them"
            )
        _, c4, c5 = self.backbone.forward_features(images)
        folded = functional.pixel_unshuffle(self.passthrough(c4), 2)
        raw = at_least_float32(self.output(self.join(torch.cat([folded, self.deepen(c5)], dim=1))))
        # Channels are anchor-major; inside an anchor tx, ty, tw, th, to, classes.
        raw = torch.unflatten(raw, 1, (len(self.config.anchors), -1)).movedim(2, -1)
        centres, sizes = raw[..., :2].sigmoid(), raw[..., 2:4]
        return Predictions(centres, sizes, raw[..., 4].sigmoid(), raw[..., 5:], self._decode(centres, sizes))

    def candidates(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of every image boxes [P, 4] and class probabilities [P, classes], before the suppression."""
        predictions = self.predict(images)
        scores = predictions.objectness.unsqueeze(-1) * predictions.class_logits.softmax(dim=-1)
        boxes = clip_boxes(predictions.boxes, images.shape[-2], images.shape[-1])
        return list(zip(boxes.flatten(1, 3), scores.flatten(1, 3), strict=True))

    def forward(self, images: Tensor) -> list[Detections]:
        """Detections of every image."""
        return [self._detect(*image) for image in self.candidates(images)]

    def _decode(self, centres: Tensor, sizes: Tensor) -> Tensor:
        rows, columns = centres.shape[2:4]
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        cells = torch.stack([x, y], dim=-1).to(centres)
        anchors = centres.new_tensor(self.config.anchors)[:, None, None, :]
        middle, half = (cells + centres) * STRIDE, anchors * sizes.clamp(max=MAX_SIZE_DELTA).exp() * (STRIDE / 2)
        return torch.cat([middle - half, middle + half], dim=-1)

    def _detect(self, boxes: Tensor, scores: Tensor) -> Detections:
        rows, class_ids = (scores > self.config.score_threshold).nonzero(as_tuple=True)
        found = scores[rows, class_ids]
        kept = nms(boxes[rows], found, self.config.nms_threshold, class_ids, self.config.max_detections)
        return Detections(boxes[rows[kept]], found[kept], class_ids[kept])


def shape_iou(sizes: Tensor, anchors: Sequence[Sequence[float]]) -> Tensor:
    """IoU of boxes and anchors laid on one centre: sizes [G, 2] in cells and A anchors to [G, A]."""
    shapes = sizes.new_tensor(anchors)
    intersection = torch.minimum(sizes[:, None], shapes).prod(dim=-1)
    return intersection / (sizes.prod(dim=-1)[:, None] + shapes.prod(dim=-1) - intersection)
