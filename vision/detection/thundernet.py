"""ThunderNet, a two-stage detector for small machines (Qin et al., arXiv 1903.11752, ICCV 2019).

Read it beside figure 2 of the paper:

    image -> backbone -> C4 [stride 16], C5 [stride 32]
          -> context enhancement -> F_cem, 245 channels at stride 16
          -> region proposal head -> F_rpn, objectness, deltas -> proposals
          -> spatial attention (F_cem, F_rpn) -> F_sam
          -> position-sensitive RoI align, 7 x 7 bins of 5 channels -> 245 values a region
          -> one fully connected layer of 1024 -> classes, one box

245 is 5 * 7 * 7: each bin reads its own 5 channels. Boxes are class-agnostic and 200 regions are classified: with that
the paper's operation counts come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernels.losses import at_least_float32
from vision.detection.backbone import Backbone, without_classifier
from vision.detection.boxes import clip_boxes, decode_boxes, soft_nms
from vision.detection.context_enhancement import ContextEnhancement
from vision.detection.detections import Detections
from vision.detection.psroi_align import Reduction, psroi_align
from vision.detection.rpn import TEST_BUDGET, AnchorGrid, ProposalBudget, RegionProposalHead, select_proposals
from vision.detection.spatial_attention import SpatialAttention

# Standard deviations by which region deltas are divided, as in Fast R-CNN.
REGION_STDS = (0.1, 0.1, 0.2, 0.2)


@dataclass(frozen=True)
class ThunderNetConfig:
    """The detection part's sizes; the defaults are the paper's.

    ``depth`` channels are read by each of ``bins`` x ``bins`` bins. ``reduction`` joins the samples of a bin: "max" as
    the authors' operator. Test-time settings are the authors' published ones: Soft-NMS, linear, at 0.5. Without
    ``context_enhancement`` the regions' map is C4 alone, without ``spatial_attention`` it is not re-weighed: the parts
    whose worth the paper's ablation tells.
    """

    bins: int = 7
    depth: int = 5
    rpn_width: int = 256
    head_width: int = 1024
    reduction: Reduction = "max"
    anchors: AnchorGrid = field(default_factory=AnchorGrid)
    test_budget: ProposalBudget = TEST_BUDGET
    score_threshold: float = 0.05
    soft_nms_threshold: float = 0.5
    max_detections: int = 100
    context_enhancement: bool = True
    spatial_attention: bool = True

    @property
    def channels(self) -> int:
        """Channels of F_cem and F_sam."""
        return self.depth * self.bins**2


@dataclass(frozen=True)
class DenseMaps:
    """What is computed once an image: both maps [N, channels, H, W] and the proposal network's view of every anchor.

    Regions are read from ``f_sam``; ``f_cem``, before the attention, is what a student detector may imitate.
    ``objectness`` [N, M, 2], ``deltas`` [N, M, 4], ``anchors`` [M, 4], ``image_size`` (height, width) in pixels.
    """

    f_cem: Tensor
    f_sam: Tensor
    objectness: Tensor
    deltas: Tensor
    anchors: Tensor
    image_size: tuple[int, int]


class ThunderNet(nn.Module):
    """The detector over any ``Backbone``, whose classifier it drops. ``num_classes`` does not count the background.

    Called on images [N, 3, H, W] it answers ``Detections`` per image. Training goes through ``dense``, ``propose`` and
    ``classify``: see ``ThunderNetLoss``.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        config: ThunderNetConfig = ThunderNetConfig(),
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; a detector needs at least one class beside the background")
        self.config = config
        self.num_classes = num_classes
        self.backbone = without_classifier(backbone)
        _, c4_channels, c5_channels = backbone.feature_channels
        self.context_enhancement = ContextEnhancement(
            c4_channels, c5_channels, config.channels, surroundings=config.context_enhancement
        )
        self.rpn = RegionProposalHead(config.channels, config.rpn_width, config.anchors.num_per_cell)
        self.spatial_attention = (
            SpatialAttention(config.rpn_width, config.channels) if config.spatial_attention else None
        )
        self.hidden = nn.Sequential(nn.Linear(config.channels, config.head_width), nn.ReLU())
        self.class_logits = nn.Linear(config.head_width, num_classes + 1)
        self.box_deltas = nn.Linear(config.head_width, 4)
        for layer, std in ((self.hidden[0], 0.01), (self.class_logits, 0.01), (self.box_deltas, 0.001)):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def dense(self, images: Tensor) -> DenseMaps:
        """Everything before the regions: images [N, 3, H, W] to ``DenseMaps``."""
        _, c4, c5 = self.backbone.forward_features(images)
        f_cem = self.context_enhancement(c4, c5)
        f_rpn, objectness, deltas = self.rpn(f_cem)
        # Box arithmetic needs single precision: half has quarter-pixel steps at 320.
        deltas = at_least_float32(deltas)
        return DenseMaps(
            f_cem=f_cem,
            f_sam=f_cem if self.spatial_attention is None else self.spatial_attention(f_cem, f_rpn),
            objectness=at_least_float32(objectness),
            deltas=deltas,
            anchors=self.config.anchors.boxes(f_cem.shape[-2], f_cem.shape[-1], like=deltas),
            image_size=(images.shape[-2], images.shape[-1]),
        )

    def propose(self, maps: DenseMaps, budget: ProposalBudget) -> list[Tensor]:
        """Proposals [K, 4] of every image, without gradient."""
        return select_proposals(maps.objectness, maps.deltas, maps.anchors, maps.image_size, budget)

    def classify(self, maps: DenseMaps, regions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits [R, num_classes + 1], background first, and box deltas [R, 4] of all images' regions."""
        return self.classify_pooled(self.pool(maps, regions))

    def pool(self, maps: DenseMaps, regions: Sequence[Tensor]) -> Tensor:
        """What the second stage sees of all images' regions: [R, depth, bins, bins]."""
        image_ids = torch.cat([boxes.new_full((len(boxes),), i, dtype=torch.long) for i, boxes in enumerate(regions)])
        return psroi_align(
            maps.f_sam,
            torch.cat(list(regions)),
            image_ids,
            self.config.anchors.stride,
            self.config.bins,
            reduction=self.config.reduction,
        )

    def classify_pooled(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """``classify`` behind the pooling: [R, depth, bins, bins] to class logits and box deltas."""
        hidden = self.hidden(pooled.flatten(1))
        return at_least_float32(self.class_logits(hidden)), at_least_float32(self.box_deltas(hidden))

    def candidates(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of every image boxes [P, 4] and class probabilities [P, classes], before the suppression."""
        maps = self.dense(images)
        proposals = self.propose(maps, self.config.test_budget)
        logits, deltas = self.classify(maps, proposals)
        boxes = clip_boxes(decode_boxes(deltas, torch.cat(proposals), REGION_STDS), *maps.image_size)
        probabilities = logits.softmax(dim=-1)[:, 1:]
        sizes = [len(regions) for regions in proposals]
        return list(zip(torch.split(boxes, sizes), torch.split(probabilities, sizes), strict=True))

    def forward(self, images: Tensor) -> list[Detections]:
        """Detections of every image."""
        return [self._detect(*image) for image in self.candidates(images)]

    def _detect(self, boxes: Tensor, probabilities: Tensor) -> Detections:
        rows, class_ids = (probabilities > self.config.score_threshold).nonzero(as_tuple=True)
        kept, scores = soft_nms(
            boxes[rows],
            probabilities[rows, class_ids],
            self.config.soft_nms_threshold,
            class_ids,
            max_kept=self.config.max_detections,
        )
        return Detections(boxes[rows[kept]], scores, class_ids[kept])
