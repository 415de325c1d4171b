"""Detectors up to their suppression: in torch, and ThunderNet as one ONNX graph with a fixed number of proposals.

Everything is plain ONNX operators. Position-sensitive RoI align, which ONNX lacks, is the same gathers as in torch;
the proposals' suppression is the standard NonMaxSuppression, made to answer a fixed number of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vision.detection.boxes import clip_boxes, decode_boxes
from vision.detection.checkpoint import load_detector
from vision.detection.detector import NOTHING_FOUND, LoadedDetector
from vision.detection.psroi_align import Reduction, axis_samples
from vision.detection.rpn import ProposalBudget
from vision.detection.thundernet import REGION_STDS, DenseMaps, ThunderNet
from vision.serving.protocol import ExportError, Floats, Outputs, Parity, Traced

NMS_OPSET = 18  # of ONNX's NonMaxSuppression
SAMPLES = 2  # points of a bin along each axis, as ``psroi_align`` has by default
# Rows of file and torch whose boxes are further apart are no pair (reference: half a pixel, a thousandth).
BOX_TOLERANCE_PX = 0.5
SCORE_TOLERANCE = 1e-3
# Two overlaps may lie on either side of the suppression's threshold by rounding alone.
MAX_UNMATCHED = 0.02
TINY_SCORE = 1e-9
# Scores below every real one: rows that only fill up, and boxes without area, which must not even do that.
FILLER_SCORE, NO_AREA_SCORE = -1e8, -1e9


class Candidates(nn.Module):
    """A detector up to its suppression, in plain torch.

    Images [N, 3, S, S], RGB in [0, 1], to boxes [N, P, 4] in input pixels and class probabilities [N, P, classes]; rows
    that only fill up have probability 0.
    """

    def __init__(self, loaded: LoadedDetector) -> None:
        super().__init__()
        self.model = loaded.model
        self.normalization = loaded.config.normalization

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and class probabilities."""
        found = self.model.candidates(self.normalization(images))
        boxes, probabilities = ([image[part] for image in found] for part in range(2))
        return nn.utils.rnn.pad_sequence(boxes, True), nn.utils.rnn.pad_sequence(probabilities, True)


class FixedRegions(nn.Module):
    """A ThunderNet up to its regions: what is left to do is the threshold and Soft-NMS.

    Images [B, 3, S, S], RGB in [0, 1], to boxes [B, P, 4] in input pixels and class probabilities [B, P, classes]; P is
    the test budget's number of proposals. Rows that were not needed have probability 0.
    """

    def __init__(self, loaded: LoadedDetector) -> None:
        super().__init__()
        if not isinstance(loaded.model, ThunderNet):
            raise ExportError(f"{loaded.config.architecture} cannot be exported; only thundernet can")
        self.model = loaded.model
        self.normalization = loaded.config.normalization

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and class probabilities."""
        maps = self.model.dense(self.normalization(images))
        proposals, is_real = propose_fixed(maps, self.model.config.test_budget)
        num_images, num_proposals, _ = proposals.shape
        image_ids = torch.arange(num_images).repeat_interleave(num_proposals)
        regions = proposals.flatten(0, 1)
        config = self.model.config
        pooled = pool_by_rows(maps.f_sam, regions, image_ids, config.anchors.stride, config.bins, config.reduction)
        logits, deltas = self.model.classify_pooled(pooled)
        boxes = clip_boxes(decode_boxes(deltas, regions, REGION_STDS), *maps.image_size)
        probabilities = logits.softmax(dim=-1)[:, 1:].reshape(num_images, num_proposals, -1)
        return boxes.view(proposals.shape), probabilities * is_real


def pool_by_rows(
    features: Tensor, boxes: Tensor, image_ids: Tensor, stride: int, bins: int, reduction: Reduction
) -> Tensor:
    """``psroi_align`` with the channels of a bin beside each other: ONNX Runtime's Gather copies them as one row.

    That is three times as fast there as the layout torch likes, which is why there are two.
    """
    num_images, channels, height, width = features.shape
    depth = channels // (bins * bins)
    rows = features.reshape(num_images, depth, bins * bins * height * width).transpose(1, 2).reshape(-1, depth)
    y_cells, y_weights = axis_samples(boxes[:, 1], boxes[:, 3], height, stride, bins, SAMPLES)
    x_cells, x_weights = axis_samples(boxes[:, 0], boxes[:, 2], width, stride, bins, SAMPLES)
    bin_ids = torch.arange(bins * bins).view(1, bins, 1, bins, 1)
    first_row = (image_ids.view(-1, 1, 1, 1, 1) * bins * bins + bin_ids) * (height * width)
    sampled = features.new_zeros(())
    for y in range(2):
        for x in range(2):
            places = first_row + y_cells[y][:, :, :, None, None] * width + x_cells[x][:, None, None, :, :]
            weights = y_weights[y][:, :, :, None, None] * x_weights[x][:, None, None, :, :]
            sampled = sampled + rows[places] * weights.unsqueeze(-1)
    pooled = sampled.amax(dim=(2, 4)) if reduction == "max" else sampled.mean(dim=(2, 4))
    return pooled.permute(0, 3, 1, 2)


def propose_fixed(maps: DenseMaps, budget: ProposalBudget) -> tuple[Tensor, Tensor]:
    """Exactly ``budget.after_nms`` proposals an image [B, P, 4], and which of them are real [B, P, 1], as 0 or 1.

    Boxes that overlap nothing stand behind the candidates with scores below all of theirs, so that the suppression
    finds enough to keep on every image.
    """
    scores = maps.objectness[..., 1] - maps.objectness[..., 0]
    best = scores.topk(min(budget.before_nms, scores.shape[1]))
    deltas = maps.deltas.gather(1, best.indices.unsqueeze(-1).expand(-1, -1, 4))
    boxes = clip_boxes(decode_boxes(deltas, maps.anchors[best.indices]), *maps.image_size)
    has_area = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
    filler_corners = -2.0 * torch.arange(1, budget.after_nms + 1)[:, None].expand(-1, 2)
    fillers = torch.cat([filler_corners - 1, filler_corners], dim=-1).expand(boxes.shape[0], -1, -1)
    boxes = torch.cat([boxes, fillers], dim=1)
    scores = functional.pad(best.values.where(has_area, NO_AREA_SCORE), (0, budget.after_nms), value=FILLER_SCORE)
    kept = onnx_nms(boxes, scores, budget)
    proposals = boxes.gather(1, kept.unsqueeze(-1).expand(-1, -1, 4))
    return clip_boxes(proposals, *maps.image_size), (scores.gather(1, kept) > FILLER_SCORE).float().unsqueeze(-1)


def onnx_nms(boxes: Tensor, scores: Tensor, budget: ProposalBudget) -> Tensor:
    """Indices [B, P] of the boxes [B, M, 4] that ONNX's NonMaxSuppression keeps; at least P must survive.

    The operator has no twin in torch, so this runs only in an exported file.
    """
    num_images, num_kept = boxes.shape[0], budget.after_nms
    selected = torch.onnx.ops.symbolic(
        "NonMaxSuppression",
        [boxes, scores.unsqueeze(1), torch.tensor([num_kept]), torch.tensor([budget.nms_threshold])],
        dtype=torch.int64,
        shape=[num_images * num_kept, 3],
        version=NMS_OPSET,
    )
    return selected[:, 2].view(num_images, num_kept)


def trace_detector(checkpoint: Path, image_size: int | None = None) -> Traced:
    """The detector saved in ``checkpoint`` as it is exported. Errors: CheckpointError, ExportError."""
    loaded = load_detector(checkpoint)
    if image_size is not None and image_size != loaded.config.image_size:
        raise ExportError(f"a detector keeps its size, {loaded.config.image_size} pixels; leave {image_size} out")
    regions, size = FixedRegions(loaded).eval(), loaded.config.image_size
    proposals = regions.model.config.test_budget.after_nms
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> Tensor:
        """Smooth random images."""
        coarse = torch.rand(count, 3, 8, 8, generator=generator)
        return functional.interpolate(coarse, size=(size, size), mode="bilinear")

    plain = Candidates(loaded).eval()
    return Traced(
        module=regions,
        outputs=("boxes", "probabilities"),
        image_size=size,
        config=dataclasses.asdict(loaded.config),
        compare=lambda pairs: compare(pairs, proposals),
        images=images,
        expected=lambda images: [part.numpy() for part in plain(images)],
        sees_nothing=NOTHING_FOUND % "boxes on its own training images" if loaded.config.training_recall == 0 else "",
    )


@dataclass(frozen=True)
class Comparison:
    """Rows of one image matched one to one: differences of the pairs, and the scores of rows without a partner."""

    box_differences: Floats
    score_differences: Floats
    unmatched_score: float
    total_score: float


def compare(pairs: Sequence[tuple[Outputs, Outputs]], proposals: int) -> Parity:
    """The file's rows against torch's: largest difference of a box in pixels and of a score among those matched, and

    the share of all scores, on both sides, that stand in rows without a partner.
    """
    found = [
        match_rows(*rows)
        for (boxes, scores), (other_boxes, other_scores) in pairs
        for rows in zip(boxes, scores, other_boxes, other_scores, strict=True)
    ]
    box_difference = float(max(image.box_differences.max(initial=0.0) for image in found))
    score_difference = float(max(image.score_differences.max(initial=0.0) for image in found))
    total = sum(image.total_score for image in found)
    unmatched = sum(image.unmatched_score for image in found) / max(total, TINY_SCORE)
    figures = {
        "proposals": proposals, "box_difference_px": box_difference, "score_difference": score_difference,
        "unmatched_share": unmatched,
    }  # fmt: skip
    if score_difference <= SCORE_TOLERANCE and unmatched <= MAX_UNMATCHED:
        return Parity(figures)
    return Parity(
        figures,
        f"answered apart from torch: boxes {box_difference:.2g} px, scores {score_difference:.2g}, {unmatched:.1%} of "
        "what was found without a counterpart",
    )


def match_rows(boxes: Floats, scores: Floats, other_boxes: Floats, other_scores: Floats) -> Comparison:
    """Pair rows of ``boxes`` [N, 4], ``scores`` [N, C] with the others [M, 4], [M, C], by falling score.

    Each takes, of the rows that are left and whose box is nearer than the tolerance, the one with the most similar
    scores. Boxes alone do not tell rows apart: regions that decode to the same clipped box, the whole image above all,
    have scores of their own.
    """
    box_distances = np.abs(boxes[:, None] - other_boxes[None]).max(axis=2)
    score_distances = np.abs(scores[:, None] - other_scores[None]).max(axis=2)
    costs = np.where(box_distances <= BOX_TOLERANCE_PX, score_distances, np.inf)
    best, other_best = scores.max(axis=1), other_scores.max(axis=1)
    rows, partners = [], []
    for row in np.argsort(-best, kind="stable"):
        partner = int(costs[row].argmin()) if costs.shape[1] else 0
        if costs.shape[1] and np.isfinite(costs[row, partner]):
            costs[:, partner] = np.inf
            rows.append(int(row))
            partners.append(partner)
    unmatched = np.delete(best, rows).sum() + np.delete(other_best, partners).sum()
    return Comparison(
        box_distances[rows, partners], score_distances[rows, partners], float(unmatched),
        float(best.sum() + other_best.sum()),
    )  # fmt: skip
