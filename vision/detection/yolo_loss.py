"""YOLOv2's loss as a differentiable sum whose gradients are darknet's deltas (``region_layer.c``, as on a GPU)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vision.detection.boxes import box_iou
from vision.detection.truth import check_truth
from vision.detection.yolo_v2 import STRIDE, Predictions, YOLOv2, shape_iou

MapMiner = Callable[[Tensor, Tensor], Tensor]

# darknet's weights: of coordinates, of the objectness of true boxes, of background, of warm-up, and its no-penalty IoU.
COORDINATES = 1.0
OBJECT = 5.0
BACKGROUND = 1.0
WARM_UP = 0.01
IGNORE_IOU = 0.6
# The focal loss's usual gamma.
FOCUSING = 2.0


@dataclass(frozen=True)
class Assignment:
    """Which prediction answers for which true box: one row for each answering prediction, T in all.

    ``places`` holds image, anchor, row and column ids, each [T]; ``centres`` and ``sizes`` [T, 2] are what sigmoid(tx,
    ty) and (tw, th) should be; ``boxes`` [T, 4] in pixels; ``labels`` [T]; ``weights`` [T] of the coordinate term.
    """

    places: tuple[Tensor, Tensor, Tensor, Tensor]
    centres: Tensor
    sizes: Tensor
    boxes: Tensor
    labels: Tensor
    weights: Tensor


class YOLOv2Loss:
    """The loss of one batch, mined or whole.

    ``miner`` maps losses [N, A, S, S] and boxes [N, A, S, S, 4] to a mask of the predictions that train, for instance a
    ``vision.mining.LossRankMiner``; None keeps all. The sum over the kept is divided by the batch, as darknet's step
    is. ``focal`` (ours) weights each objectness term by the square of its error, as the focal loss does with
    cross-entropy: easy background then counts for next to nothing. ``background`` is the weight of predictions without
    a true box. With ``keeps_answers`` those with one always train, whatever the miner says.
    """

    def __init__(
        self,
        miner: MapMiner | None = None,
        focal: bool = False,
        background: float = BACKGROUND,
        keeps_answers: bool = False,
    ) -> None:
        self.miner = miner
        self.focusing = FOCUSING if focal else 0.0
        self.background, self.keeps_answers = background, keeps_answers

    def __call__(
        self, model: YOLOv2, images: Tensor, true_boxes: Sequence[Tensor], true_labels: Sequence[Tensor], warm_up: bool
    ) -> dict[str, Tensor]:
        """Named scalars whose sum is to be minimised.

        Arguments as for ``ThunderNetLoss``. With ``warm_up``, darknet's first 12,800 images, predictions without a true
        box are also drawn to their own anchor in the middle of their cell; mining never masks that term. Mine only
        after it.
        """
        check_truth(true_boxes, true_labels, model.num_classes)
        predictions = model.predict(images)
        assignment = assign(predictions, true_boxes, true_labels, model.config.anchors)
        loss = detection_loss(predictions, assignment, true_boxes, self.focusing, self.background)
        if self.miner is not None:
            kept = self.miner(loss.detach(), predictions.boxes.detach())
            if self.keeps_answers:
                kept[assignment.places] = True
            loss = loss * kept
        losses = {"detection": loss.sum() / len(images)}
        if warm_up:
            losses["warm_up"] = warm_up_loss(predictions, assignment).sum() / len(images)
        return losses


def assign(
    predictions: Predictions,
    true_boxes: Sequence[Tensor],
    true_labels: Sequence[Tensor],
    anchors: Sequence[Sequence[float]],
) -> Assignment:
    """Give every true box to the cell of its centre and the anchor of best shape.

    Where two true boxes want one prediction the later one gets it, as in darknet.
    """
    rows, columns = predictions.objectness.shape[2:]
    boxes = torch.cat(list(true_boxes)).to(predictions.boxes)
    labels = torch.cat(list(true_labels))
    image_ids = torch.cat([labels.new_full((len(x),), i) for i, x in enumerate(true_boxes)])
    centres = (boxes[:, :2] + boxes[:, 2:]) / (2 * STRIDE)
    sizes = (boxes[:, 2:] - boxes[:, :2]) / STRIDE
    cells = torch.minimum(centres.floor(), centres.new_tensor([columns - 1, rows - 1])).long()
    anchor_ids = shape_iou(sizes, anchors).argmax(dim=1)

    places = (image_ids, anchor_ids, cells[:, 1], cells[:, 0])
    last = {place: index for index, place in enumerate(zip(*(ids.tolist() for ids in places), strict=True))}
    kept = torch.tensor(list(last.values()), dtype=torch.long, device=boxes.device)
    relative_area = sizes.prod(dim=1) / (rows * columns)
    return Assignment(
        places=(places[0][kept], places[1][kept], places[2][kept], places[3][kept]),
        centres=(centres - cells)[kept],
        sizes=(sizes / sizes.new_tensor(anchors)[anchor_ids]).log()[kept],
        boxes=boxes[kept],
        labels=labels[kept],
        weights=COORDINATES * (2 - relative_area)[kept],
    )


def detection_loss(
    predictions: Predictions,
    assignment: Assignment,
    true_boxes: Sequence[Tensor],
    focusing: float = 0.0,
    background: float = BACKGROUND,
) -> Tensor:
    """Every prediction's own loss [N, A, S, S]: nothing is summed, so that it can be ranked.

    A prediction with a true box: squared errors of centre and size, more weight for small boxes; objectness against the
    IoU it reaches, a constant (darknet's rescore); cross-entropy of its class. Any other: objectness against 0, unless
    it overlaps some true box by more than 0.6; ``background`` weighs that term. With ``focusing`` each objectness error
    e costs |e|^focusing e^2.
    """
    places = assignment.places
    empty = background / 2 * _focused_square(predictions.objectness, focusing)
    loss = torch.where(_best_overlap(predictions, true_boxes) > IGNORE_IOU, 0.0, empty)

    found = predictions.boxes.detach()[places]
    reached = box_iou(found, assignment.boxes).diagonal()
    coordinates = (predictions.centres[places] - assignment.centres).square().sum(dim=-1)
    coordinates = coordinates + (predictions.sizes[places] - assignment.sizes).square().sum(dim=-1)
    objectness = _focused_square(predictions.objectness[places] - reached, focusing)
    classes = functional.cross_entropy(predictions.class_logits[places], assignment.labels, reduction="none")
    return loss.index_put(places, assignment.weights / 2 * coordinates + OBJECT / 2 * objectness + classes)


def _focused_square(error: Tensor, focusing: float) -> Tensor:
    return error.abs().pow(2 + focusing) if focusing else error.square()


def warm_up_loss(predictions: Predictions, assignment: Assignment) -> Tensor:
    """Squared distance of every unassigned prediction [N, A, S, S] from its own anchor in the middle of its cell."""
    distance = (predictions.centres - 0.5).square().sum(dim=-1) + predictions.sizes.square().sum(dim=-1)
    # darknet writes the true boxes' deltas over these, it does not add them.
    return (WARM_UP / 2 * distance).index_put(assignment.places, distance.new_zeros(len(assignment.labels)))


@torch.no_grad()
def _best_overlap(predictions: Predictions, true_boxes: Sequence[Tensor]) -> Tensor:
    best = torch.zeros_like(predictions.objectness)
    for image_best, boxes, truth in zip(best, predictions.boxes, true_boxes, strict=True):
        if len(truth):
            image_best.copy_(box_iou(boxes.view(-1, 4), truth.to(boxes)).amax(dim=1).view_as(image_best))
    return best
