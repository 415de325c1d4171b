"""A one-stage peer to time a detector against: NanoDet-m's published structure and cost, with random weights.

NanoDet-m at 320 pixels (RangiLyu/nanodet, Apache-2.0): ShuffleNetV2 1.0x without its last convolution, a
path-aggregation neck of 1x1 convolutions to 96 channels, and on each of three levels two depthwise-separable
convolutions before 80 classes and four distributions of 8 bins. Written from that description; counted here it has
0.34 G multiply-adds and 0.95 million parameters, its authors list 0.72 G operations and 0.95 million. Weights do not
change the time of a convolution. How many boxes are left does, so the 100 best always go through the suppression.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from vision.backbones.layers import conv_bn_relu, depthwise_bn
from vision.backbones.shufflenet_v2 import ShuffleNetV2, ShuffleNetV2Config
from vision.serving.export import OPSET, require_packages
from vision.serving.kinds.detector import greedy_nms
from vision.serving.networks import open_session
from vision.serving.protocol import Pixels

CHANNELS = 96
NUM_CLASSES = 80
BINS = 8
STRIDES = (8, 16, 32)
NUM_CANDIDATES = 100
NMS_THRESHOLD = 0.6


class OneStagePeer(nn.Module):
    """Images [B, 3, S, S], RGB in [0, 1], to class scores [B, M, 80] and box distributions [B, M, 4 * 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ShuffleNetV2(ShuffleNetV2Config((116, 232, 464), final_channels=None))
        self.lateral = nn.ModuleList(nn.Conv2d(width, CHANNELS, 1) for width in self.backbone.feature_channels)
        self.heads = nn.ModuleList(self._head() for _ in STRIDES)

    @staticmethod
    def _head() -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [*depthwise_bn(CHANNELS, 3, 1), nn.ReLU(), *conv_bn_relu(CHANNELS, CHANNELS, 1)]
        return nn.Sequential(*layers, nn.Conv2d(CHANNELS, NUM_CLASSES + 4 * BINS, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """All predictions of all levels."""
        maps = self.backbone.forward_features(self.backbone.normalization(images))
        levels = [lateral(level) for lateral, level in zip(self.lateral, maps, strict=True)]
        for index in (1, 0):
            upper = functional.interpolate(levels[index + 1], size=levels[index].shape[-2:], mode="bilinear")
            levels[index] = levels[index] + upper
        for index in (1, 2):
            lower = functional.interpolate(levels[index - 1], size=levels[index].shape[-2:], mode="bilinear")
            levels[index] = levels[index] + lower
        outputs = [head(level).flatten(2).transpose(1, 2) for head, level in zip(self.heads, levels, strict=True)]
        joined = torch.cat(outputs, dim=1)
        return joined[..., :NUM_CLASSES].sigmoid(), joined[..., NUM_CLASSES:]


def export_peer(output: Path, size: int) -> None:
    """Write the peer for one image at a time."""
    require_packages()
    program = torch.onnx.export(
        OneStagePeer().eval(), (torch.rand(1, 3, size, size),), dynamo=True, opset_version=OPSET, verbose=False,
        input_names=["images"], output_names=["scores", "distributions"],
    )  # fmt: skip
    assert program is not None
    program.save(output, external_data=False)


class PeerDetector:
    """The peer on ONNX Runtime with one thread, boxes and all."""

    def __init__(self, file: Path, size: int) -> None:
        self.session = open_session(file, 1)
        self.size = size
        self.centres, self.strides = grid(size)

    def run(self, image: Pixels) -> int:
        """Detect on one image uint8 [3, S, S]; the number of boxes that are left."""
        scores, distributions = self.session.run(None, {"images": image[None].astype(np.float32) / 255})
        best = np.argpartition(scores[0].max(axis=1), -NUM_CANDIDATES)[-NUM_CANDIDATES:]
        bins = np.exp(distributions[0][best].reshape(-1, 4, BINS))
        distances = (bins @ np.arange(BINS) / bins.sum(axis=2)) * self.strides[best, None]
        centres = self.centres[best]
        boxes = np.concatenate([centres - distances[:, :2], centres + distances[:, 2:]], axis=1).astype(np.float32)
        class_ids = scores[0][best].argmax(axis=1)
        best_scores = scores[0][best].max(axis=1)
        kept, _ = greedy_nms(boxes, best_scores, class_ids, NMS_THRESHOLD, NUM_CANDIDATES, soft=True)
        return len(kept)


def grid(size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Centres [M, 2] and strides [M] of all cells, level by level."""
    centres, strides = [], []
    for stride in STRIDES:
        steps = (np.arange(-(-size // stride)) + 0.5) * stride
        x, y = np.meshgrid(steps, steps)
        centres.append(np.stack([x.ravel(), y.ravel()], axis=1))
        strides.append(np.full(x.size, stride))
    return np.concatenate(centres).astype(np.float32), np.concatenate(strides).astype(np.float32)
