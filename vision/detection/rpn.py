"""Anchors, the region proposal network and the choice of proposals (ThunderNet, arXiv 1903.11752, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vision.detection.boxes import clip_boxes, decode_boxes, nms


@dataclass(frozen=True)
class AnchorGrid:
    """The anchors of a single map: every scale and ratio around every cell's centre.

    ``scales`` are square roots of areas in pixels, ``ratios`` height over width; the defaults are the paper's. A centre
    lies at ((j + 0.5) stride, (i + 0.5) stride), which is ours (the paper does not say). No anchor is left out at the
    border: at 320 pixels two thirds of them cross it, all the largest among them.
    """

    stride: int = 16
    scales: tuple[float, ...] = (32, 64, 128, 256, 512)
    ratios: tuple[float, ...] = (1 / 2, 3 / 4, 1, 4 / 3, 2)

    @property
    def num_per_cell(self) -> int:
        """A, anchors around one centre."""
        return len(self.scales) * len(self.ratios)

    def boxes(self, height: int, width: int, like: Tensor) -> Tensor:
        """All anchors of a map of ``height`` by ``width`` cells, [A * height * width, 4], in the order of the heads.

        Scales vary slowest, then ratios, rows and columns. ``like`` gives dtype and device.
        """
        scales, ratios = like.new_tensor(self.scales), like.new_tensor(self.ratios)
        widths = (scales[:, None] / ratios.sqrt()).flatten()
        heights = (scales[:, None] * ratios.sqrt()).flatten()
        x = (torch.arange(width, dtype=like.dtype, device=like.device) + 0.5) * self.stride
        y = (torch.arange(height, dtype=like.dtype, device=like.device) + 0.5) * self.stride
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        half_sizes = torch.stack([widths, heights], dim=-1)[:, None, None, :] / 2
        return torch.cat([centres - half_sizes, centres + half_sizes], dim=-1).view(-1, 4)


class RegionProposalHead(nn.Module):
    """A 5x5 depthwise and a 1x1 convolution, then objectness and box deltas of every anchor.

    Objectness is a two-way softmax (the paper's cost fits two outputs better than one). Both convolutions before are
    without bias, with batch norm and ReLU; their output F_rpn also feeds the spatial attention.
    """

    def __init__(self, channels: int = 245, width: int = 256, num_anchors: int = 25) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.pointwise = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.objectness = nn.Conv2d(width, num_anchors * 2, 1)
        self.deltas = nn.Conv2d(width, num_anchors * 4, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, f_cem: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """F_rpn [N, width, H, W]; objectness logits [N, M, 2], background first; deltas [N, M, 4]; M = A H W."""
        f_rpn = self.pointwise(self.depthwise(f_cem))
        return f_rpn, _flatten_anchors(self.objectness(f_rpn), 2), _flatten_anchors(self.deltas(f_rpn), 4)


@dataclass(frozen=True)
class ProposalBudget:
    """How many of the best-scored boxes enter the suppression, and how many proposals leave it at most."""

    before_nms: int
    after_nms: int
    nms_threshold: float = 0.7


# Ours, after Light-Head R-CNN (arXiv 1711.07264), whose 2000 the paper keeps; small runs do well with (600, 300).
TRAINING_BUDGET = ProposalBudget(before_nms=12_000, after_nms=2_000)
# The paper's cost counts 200 regions.
TEST_BUDGET = ProposalBudget(before_nms=2_000, after_nms=200)


@torch.no_grad()
def select_proposals(
    objectness: Tensor, deltas: Tensor, anchors: Tensor, image_size: tuple[int, int], budget: ProposalBudget
) -> list[Tensor]:
    """The best proposals [K, 4] of each image, by falling objectness, clipped to ``image_size`` (height, width).

    ``objectness`` [N, M, 2], ``deltas`` [N, M, 4] and ``anchors`` [M, 4] as ``RegionProposalHead`` orders them.
    Proposals are constants: they carry no gradient. Boxes wholly outside the image are dropped.
    """
    proposals = []
    for scores, image_deltas in zip(objectness[..., 1] - objectness[..., 0], deltas, strict=True):
        best = scores.topk(min(budget.before_nms, len(scores)))
        boxes = clip_boxes(decode_boxes(image_deltas[best.indices], anchors[best.indices]), *image_size)
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        boxes, kept_scores = boxes[has_area], best.values[has_area]
        proposals.append(boxes[nms(boxes, kept_scores, budget.nms_threshold, max_kept=budget.after_nms)])
    return proposals


def _flatten_anchors(maps: Tensor, values: int) -> Tensor:
    """[N, A * values, H, W] to [N, A * H * W, values]."""
    num_images, _, height, width = maps.shape
    return maps.view(num_images, -1, values, height, width).permute(0, 1, 3, 4, 2).reshape(num_images, -1, values)
