"""What ThunderNet trains on: the losses of both stages and the choice of anchors and regions.

Formulas and weights follow Light-Head R-CNN (arXiv 1711.07264), whose training ThunderNet (arXiv 1903.11752, section
4.1) takes over; matching thresholds are those of the authors' published configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vision.detection.boxes import decode_boxes, encode_boxes
from vision.detection.matching import Matches, match_boxes, sample_balanced
from vision.detection.rpn import TRAINING_BUDGET, ProposalBudget
from vision.detection.thundernet import REGION_STDS, DenseMaps, ThunderNet
from vision.detection.truth import check_truth

RegionMiner = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
AnchorMiner = Callable[[Tensor, Tensor], Tensor]
Reweighing = Callable[[Tensor, Tensor], Tensor]
# More terms on the regions that train: from the maps, those regions by image, their class logits and labels.
Lesson = Callable[[DenseMaps, Sequence[Tensor], Tensor, Tensor], dict[str, Tensor]]


def smooth_l1(difference: Tensor, sigma: float) -> Tensor:
    """0.5 sigma^2 x^2 where |x| < 1 / sigma^2, else |x| - 0.5 / sigma^2, summed over the last dimension."""
    return functional.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none", beta=1 / sigma**2).sum(
        dim=-1
    )


class ThunderNetLoss:
    """The four losses of one batch.

    ``region_miner`` picks the regions of each image the second stage trains on, a ``vision.mining.Miner``: OHEM in the
    paper, per image here (ours; Light-Head mines the batch of a device as one). ``anchor_miner`` picks anchors for the
    first stage from losses [N, M] and boxes [N, M, 4] as ``loss_rank_mining`` does; None draws ``anchors_per_image`` at
    random from ``generator`` (torch's own by default), at most half of them positive, as the authors do. ``reweighing``
    chooses none but trains on all, from their cross-entropies and which are positive, both [N, M], making weighted ones
    as ``vision.mining.focal_loss`` does.
    """

    def __init__(
        self,
        region_miner: RegionMiner,
        anchor_miner: AnchorMiner | None = None,
        budget: ProposalBudget = TRAINING_BUDGET,
        anchors_per_image: int = 256,
        generator: torch.Generator | None = None,
        reweighing: Reweighing | None = None,
    ) -> None:
        self.region_miner = region_miner
        self.anchor_miner = anchor_miner
        self.budget = budget
        self.anchors_per_image = anchors_per_image
        self.generator = generator
        self.reweighing = reweighing

    def __call__(
        self,
        model: ThunderNet,
        images: Tensor,
        true_boxes: Sequence[Tensor],
        true_labels: Sequence[Tensor],
        progress: float,
        lesson: Lesson | None = None,
    ) -> dict[str, Tensor]:
        """Named scalars whose sum is to be minimised, and those of ``lesson``.

        ``images`` [N, 3, H, W]; per image ``true_boxes`` [G, 4] in its pixels, ``true_labels`` [G] from 0 to
        num_classes - 1; G may be 0. ``progress``, from 0 to 1, is the share of training done. Raises ``TrueBoxError``.
        """
        check_truth(true_boxes, true_labels, model.num_classes)
        maps = model.dense(images)
        first_stage = self._first_stage(maps, true_boxes)
        regions = [
            torch.cat([proposals, boxes])
            for proposals, boxes in zip(model.propose(maps, self.budget), true_boxes, strict=True)
        ]
        second_stage = self._second_stage(model, maps, regions, true_boxes, true_labels, progress, lesson)
        return {**first_stage, **second_stage}

    def _first_stage(self, maps: DenseMaps, true_boxes: Sequence[Tensor]) -> dict[str, Tensor]:
        """Both terms averaged over the chosen anchors, or over the positive ones where all are reweighed.

        Background has no box term.
        """
        matches = [match_boxes(maps.anchors, boxes, 0.7, 0.3, rescue_iou=0.3) for boxes in true_boxes]
        classification, localization = _anchor_losses(maps, matches, true_boxes)
        positive = torch.stack([match.positive for match in matches])
        if self.reweighing is not None:
            classification = self.reweighing(classification, positive)
            chosen = positive | torch.stack([match.negative for match in matches])
            count = positive.sum().clamp(min=1)
        else:
            chosen = self._choose_anchors(maps, matches, (classification + localization).detach())
            count = chosen.sum().clamp(min=1)
        return {
            "rpn_classification": (classification * chosen).sum() / count,
            "rpn_localization": (localization * chosen).sum() / count,
        }

    def _choose_anchors(self, maps: DenseMaps, matches: Sequence[Matches], loss: Tensor) -> Tensor:
        """Bool mask [N, M] of the anchors that train; never one that is neither positive nor negative."""
        if self.anchor_miner is not None:
            used = torch.stack([match.positive | match.negative for match in matches])
            boxes = decode_boxes(maps.deltas.detach(), maps.anchors)
            return self.anchor_miner(loss * used, boxes) & used
        chosen = torch.zeros_like(loss, dtype=torch.bool)
        for row, match in zip(chosen, matches, strict=True):
            drawn = sample_balanced(match.positive, match.negative, self.anchors_per_image, 0.5, self.generator)
            row[torch.cat(drawn)] = True
        return chosen

    def _second_stage(
        self,
        model: ThunderNet,
        maps: DenseMaps,
        regions: Sequence[Tensor],
        true_boxes: Sequence[Tensor],
        true_labels: Sequence[Tensor],
        progress: float,
        lesson: Lesson | None,
    ) -> dict[str, Tensor]:
        """Both terms averaged over the mined regions of the batch, the box term twice as heavy (Light-Head).

        As in Shrivastava et al. (arXiv 1604.03540, section 4) all regions go through the head once without gradient,
        to be ranked, and the chosen ones a second time: cheaper than a gradient that is mostly masked out.
        """
        labels, answers = label_regions(regions, true_boxes, true_labels)
        with torch.no_grad():
            _, classification, localization = _region_losses(
                model, maps, regions, torch.cat(labels), torch.cat(answers)
            )
        chosen, start = [], 0
        for boxes, image_labels in zip(regions, labels, strict=True):
            rows = slice(start, start + len(boxes))
            chosen.append(self.region_miner(classification[rows], localization[rows], boxes, image_labels, progress))
            start += len(boxes)
        trained, own_labels = _take(regions, chosen), torch.cat(_take(labels, chosen))
        logits, classification, localization = _region_losses(
            model, maps, trained, own_labels, torch.cat(_take(answers, chosen))
        )
        count = max(len(classification), 1)
        losses = {
            "rcnn_classification": classification.sum() / count,
            "rcnn_localization": 2 * localization.sum() / count,
        }
        return losses | (lesson(maps, trained, logits, own_labels) if lesson is not None else {})


def _take(values: Sequence[Tensor], chosen: Sequence[Tensor]) -> list[Tensor]:
    return [value[indices] for value, indices in zip(values, chosen, strict=True)]


def _region_losses(
    model: ThunderNet, maps: DenseMaps, regions: Sequence[Tensor], labels: Tensor, answers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Class logits [R, C + 1], cross-entropy and smooth L1 of every region [R]; the latter 0 for background."""
    logits, deltas = model.classify(maps, regions)
    classification = functional.cross_entropy(logits, labels, reduction="none")
    foreground = labels > 0
    anchors = torch.cat(list(regions))[foreground]
    differences = deltas[foreground] - encode_boxes(answers[foreground], anchors, REGION_STDS)
    localization = torch.zeros_like(classification).index_put((foreground,), smooth_l1(differences, sigma=1.0))
    return logits, classification, localization


def _anchor_losses(maps: DenseMaps, matches: Sequence[Matches], true_boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of objectness and smooth L1 of deltas, of every anchor [N, M]; the latter 0 but for positives."""
    positive = torch.stack([match.positive for match in matches])
    classification = functional.cross_entropy(maps.objectness.movedim(-1, 1), positive.long(), reduction="none")
    image_ids, anchor_ids = positive.nonzero(as_tuple=True)
    answers = torch.cat([boxes[m.box_ids[m.positive]] for boxes, m in zip(true_boxes, matches, strict=True)])
    differences = maps.deltas[image_ids, anchor_ids] - encode_boxes(answers, maps.anchors[anchor_ids])
    localization = torch.zeros_like(classification)
    return classification, localization.index_put((image_ids, anchor_ids), smooth_l1(differences, sigma=3.0))


def label_regions(
    regions: Sequence[Tensor], true_boxes: Sequence[Tensor], true_labels: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Label [R], 0 for background, and answering true box [R, 4] of each image's regions; foreground from 0.5."""
    labels, answers = [], []
    for boxes, truth, classes in zip(regions, true_boxes, true_labels, strict=True):
        matches = match_boxes(boxes, truth, positive_iou=0.5, negative_iou=0.5)
        if len(truth) == 0:
            labels.append(torch.zeros_like(matches.box_ids))
            answers.append(torch.zeros_like(boxes))
        else:
            labels.append(torch.where(matches.positive, classes[matches.box_ids] + 1, 0))
            answers.append(truth[matches.box_ids])
    return labels, answers
