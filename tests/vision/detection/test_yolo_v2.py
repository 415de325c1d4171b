"""YOLOv2 against the published sizes, and its loss against darknet's rules worked by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from vision.detection.boxes import box_iou
from vision.detection.truth import TrueBoxError
from vision.detection.yolo_loss import YOLOv2Loss, assign, detection_loss, warm_up_loss
from vision.detection.yolo_v2 import (
    PUBLISHED_HEAD,
    Darknet19,
    Predictions,
    YOLOv2,
    YOLOv2Config,
    shape_iou,
)
from vision.mining import LossRankMiner, RandomPredictions


class FakeBackbone(nn.Module):
    feature_channels = (8, 12, 16)

    def __init__(self):
        super().__init__()
        blocks = ((3, 8, 8, 9), (8, 12, 2, 3), (12, 16, 2, 3))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o, s, k in blocks
        )

    def forward_features(self, images):
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return tuple(maps)


def small_model(num_classes=2, seed=0, **config):
    torch.manual_seed(seed)
    return YOLOv2(FakeBackbone(), num_classes, YOLOv2Config(width=32, **config))


def macs(model, side):
    """Multiply-adds of every convolution, from shapes alone."""
    total = 0

    def add(layer, _, output):
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(add)
    model.to("meta").eval().predict(torch.zeros(1, 3, side, side, device="meta"))
    return total


@pytest.mark.parametrize(
    ("side", "classes", "expected"), [(416, 20, 14.68e9), (544, 20, 25.10e9), (320, 20, 8.69e9), (608, 80, 31.47e9)]
)
def test_published_cost(side, classes, expected, monkeypatch):
    with torch.device("meta"):
        model = YOLOv2(Darknet19(), classes, PUBLISHED_HEAD)
    # The grid is computed beside the network; it has no place among counted shapes.
    monkeypatch.setattr(YOLOv2, "_decode", lambda self, centres, sizes: centres)
    assert macs(model, side) == pytest.approx(expected, rel=5e-4)


def test_published_parameters():
    with torch.device("meta"):
        model = YOLOv2(Darknet19(), 20, PUBLISHED_HEAD)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(50.66e6, rel=5e-4)
    assert model.output.out_channels == 125
    with torch.device("meta"):
        assert YOLOv2(Darknet19(), 80, PUBLISHED_HEAD).output.out_channels == 425


@pytest.mark.parametrize(("size", "cells"), [((320, 320), (10, 10)), ((416, 416), (13, 13)), ((320, 256), (10, 8))])
def test_shapes(size, cells):
    model = small_model().eval()
    predictions = model.predict(torch.randn(2, 3, *size))
    assert predictions.objectness.shape == (2, 5, *cells)
    assert predictions.boxes.shape == (2, 5, *cells, 4)
    assert predictions.class_logits.shape == (2, 5, *cells, 2)
    assert len(model(torch.randn(2, 3, *size))) == 2


def test_sides_that_do_not_fold_are_refused():
    with pytest.raises(ValueError, match="multiples of 32"):
        small_model().predict(torch.randn(1, 3, 240, 320))


def test_channels_are_anchor_major_and_boxes_decode_as_published():
    model = small_model(num_classes=3).eval()
    planted = torch.zeros(1, 5, 8, 4, 6)
    planted[0, 2, :, 1, 3] = torch.tensor([0.5, -1.0, 0.2, -0.3, 2.0, 1.0, 2.0, 3.0])
    model.output.forward = lambda _: planted.flatten(1, 2)
    predictions = model.predict(torch.randn(1, 3, 128, 192))
    width, height = model.config.anchors[2]

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    x, y = (3 + sigmoid(0.5)) * 32, (1 + sigmoid(-1.0)) * 32
    w, h = width * math.exp(0.2) * 32, height * math.exp(-0.3) * 32
    expected = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    assert predictions.boxes[0, 2, 1, 3].tolist() == pytest.approx(expected, rel=1e-5)
    assert predictions.objectness[0, 2, 1, 3].item() == pytest.approx(sigmoid(2.0))
    assert predictions.class_logits[0, 2, 1, 3].tolist() == [1, 2, 3]
    empty = predictions.boxes[0, 0, 0, 0]
    assert ((empty[:2] + empty[2:]) / 2).tolist() == [16, 16]


def test_detections_are_thinned_per_class():
    model = small_model(num_classes=2).eval()
    boxes = torch.tensor([[0.0, 0, 40, 40], [1, 0, 41, 40], [60, 60, 90, 90]])
    scores = torch.tensor([[0.9, 0.001], [0.8, 0.3], [0.004, 0.5]])
    found = model._detect(boxes, scores)
    assert found.scores.tolist() == pytest.approx([0.9, 0.5, 0.3])
    assert found.class_ids.tolist() == [0, 1, 1]
    assert torch.equal(found.boxes, boxes[[0, 2, 1]])


def test_sizes_never_overflow():
    model = small_model()
    boxes = model._decode(torch.full((1, 5, 2, 2, 2), 0.5), torch.full((1, 5, 2, 2, 2), 500.0))
    assert boxes.isfinite().all()


def test_shape_iou_by_hand():
    found = shape_iou(torch.tensor([[2.0, 4.0]]), [(2.0, 4.0), (4.0, 2.0), (1.0, 1.0)])
    assert found.tolist() == [pytest.approx([1.0, 4 / 12, 1 / 8])]


ANCHORS = ((1.0, 1.0), (3.0, 2.0))


def toy_predictions(raw):
    """Predictions of one 2 x 2 map with two anchors and three classes from raw outputs [1, 2, 2, 2, 8]."""
    model = small_model(num_classes=3, anchors=ANCHORS)
    centres, sizes = raw[..., :2].sigmoid(), raw[..., 2:4]
    return Predictions(centres, sizes, raw[..., 4].sigmoid(), raw[..., 5:], model._decode(centres, sizes))


def slow_loss(raw, true_box, label):
    """The same map's loss, one prediction at a time."""
    loss = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    centre_x, centre_y = (true_box[0] + true_box[2]) / 64, (true_box[1] + true_box[3]) / 64
    w, h = (true_box[2] - true_box[0]) / 32, (true_box[3] - true_box[1]) / 32
    ious = [min(w, a) * min(h, b) / (w * h + a * b - min(w, a) * min(h, b)) for a, b in ANCHORS]
    owner = (ious.index(max(ious)), int(centre_y), int(centre_x))
    for anchor, (aw, ah) in enumerate(ANCHORS):
        for row in range(2):
            for column in range(2):
                tx, ty, tw, th, to, *classes = raw[0, anchor, row, column].tolist()
                x, y, obj = (1 / (1 + math.exp(-t)) for t in (tx, ty, to))
                middle_x, middle_y, half_w, half_h = column + x, row + y, aw * math.exp(tw) / 2, ah * math.exp(th) / 2
                box = [32 * v for v in (middle_x - half_w, middle_y - half_h, middle_x + half_w, middle_y + half_h)]
                iou = box_iou(torch.tensor([box]).double(), torch.tensor([true_box]).double()).item()
                if (anchor, row, column) == owner:
                    k = 2 - w * h / 4
                    value = 0.5 * k * (x - centre_x + column) ** 2 + 0.5 * k * (y - centre_y + row) ** 2
                    value += 0.5 * k * (tw - math.log(w / aw)) ** 2 + 0.5 * k * (th - math.log(h / ah)) ** 2
                    value += 0.5 * 5 * (obj - iou) ** 2
                    value += math.log(sum(math.exp(c) for c in classes)) - classes[label]
                else:
                    value = 0.0 if iou > 0.6 else 0.5 * obj**2
                loss[0, anchor, row, column] = value
    return loss


@pytest.mark.parametrize("true_box", [[34.0, 5.0, 62.0, 40.0], [2.0, 6.0, 60.0, 58.0], [0.0, 0.0, 60.0, 40.0]])
def test_loss_equals_darknets_rules_on_a_toy(true_box):
    raw = torch.randn(1, 2, 2, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3
    predictions, truth = toy_predictions(raw), [torch.tensor([true_box]).double()]
    assignment = assign(predictions, truth, [torch.tensor([1])], ANCHORS)
    torch.testing.assert_close(
        detection_loss(predictions, assignment, truth), slow_loss(raw, true_box, 1), atol=1e-9, rtol=1e-6
    )


def test_background_that_overlaps_a_true_box_is_not_punished():
    predictions = toy_predictions(torch.zeros(1, 2, 2, 2, 8))
    # Centred in the second column, but the wide anchor of the first column covers most of it, too.
    truth = [torch.tensor([[-14.0, -16.0, 82.0, 48.0]])]
    loss = detection_loss(predictions, assign(predictions, truth, [torch.tensor([0])], ANCHORS), truth)
    assert box_iou(predictions.boxes[0, 1, 0, :1], truth[0]).item() == pytest.approx(78 / 114)
    background = torch.full((1, 2, 2, 2), 0.125)
    background[0, 1, 0, 0] = 0
    background[0, 1, 0, 1] = loss[0, 1, 0, 1]
    assert loss[0, 1, 0, 1] > 1
    assert torch.equal(loss, background)


def test_gradient_equals_darknets_deltas():
    """d/dto = 5 (o - IoU) o (1 - o), the IoU a constant; d/dtx = k (x - x*) x (1 - x); d/dtw = k (tw - tw*)."""
    raw = torch.randn(1, 2, 2, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3
    raw.requires_grad_()
    truth = [torch.tensor([[34.0, 5.0, 62.0, 40.0]]).double()]
    predictions = toy_predictions(raw)
    assignment = assign(predictions, truth, [torch.tensor([1])], ANCHORS)
    detection_loss(predictions, assignment, truth).sum().backward()
    owner = (0, 0, 0, 1)
    x, objectness = predictions.centres[owner][0].detach(), predictions.objectness[owner].detach()
    reached = box_iou(predictions.boxes[owner].detach()[None], truth[0])[0, 0]
    k = 2 - (28 * 35) / 64**2
    assert raw.grad[owner][0].item() == pytest.approx((k * (x - (48 / 32 - 1)) * x * (1 - x)).item())
    width = raw[owner][2].detach()
    assert raw.grad[owner][2].item() == pytest.approx((k * (width - math.log(28 / 32))).item())
    assert raw.grad[owner][4].item() == pytest.approx(
        (5 * (objectness - reached) * objectness * (1 - objectness)).item()
    )
    probabilities = raw[owner][5:].detach().softmax(0) - functional.one_hot(torch.tensor(1), 3)
    torch.testing.assert_close(raw.grad[owner][5:], probabilities)


def test_the_later_of_two_true_boxes_gets_the_prediction():
    predictions = toy_predictions(torch.zeros(1, 2, 2, 2, 8))
    truth = [torch.tensor([[4.0, 4, 30, 30], [2.0, 2, 31, 31], [40.0, 40, 60, 60]])]
    assignment = assign(predictions, truth, [torch.tensor([0, 1, 2])], ANCHORS)
    assert sorted(assignment.labels.tolist()) == [1, 2]
    # A centre on the far border still has a cell.
    edge = assign(predictions, [torch.tensor([[60.0, 60, 68, 68]])], [torch.tensor([0])], ANCHORS)
    assert [int(x) for x in edge.places] == [0, 0, 1, 1]


def test_warm_up_draws_the_unassigned_to_their_anchors():
    raw = torch.zeros(1, 2, 2, 2, 8)
    raw[0, 1, 1, 1, 2] = 2.0
    predictions = toy_predictions(raw)
    assignment = assign(predictions, [torch.tensor([[4.0, 4, 30, 30]])], [torch.tensor([0])], ANCHORS)
    loss = warm_up_loss(predictions, assignment)
    assert loss.nonzero().tolist() == [[0, 1, 1, 1]]
    assert loss[0, 1, 1, 1].item() == pytest.approx(0.005 * 4)
    raw[0, 0, 0, 0, 2] = 2.0
    assert warm_up_loss(toy_predictions(raw), assignment)[0, 0, 0, 0] == 0


def scene(count=4, side=128):
    generator = torch.Generator().manual_seed(0)
    images, boxes, labels = 0.1 * torch.randn(count, 3, side, side, generator=generator), [], []
    for i in range(count):
        x, y = torch.randint(8, side - 56, (2,), generator=generator).tolist()
        images[i, i % 2, y : y + 48, x : x + 48] += 2
        boxes.append(torch.tensor([[x, y, x + 48.0, y + 48.0]]))
        labels.append(torch.tensor([i % 2]))
    return images, boxes, labels


def test_losses_are_finite_and_reach_every_parameter():
    model = small_model().train()
    losses = YOLOv2Loss()(model, *scene(), warm_up=True)
    assert set(losses) == {"detection", "warm_up"}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_trains_in_mixed_precision():
    model = small_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = YOLOv2Loss(LossRankMiner())(model, *scene(), warm_up=True)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()


def test_mining_all_predictions_is_the_plain_loss_bit_for_bit():
    model = small_model().eval()
    plain = YOLOv2Loss()(model, *scene(), warm_up=False)["detection"]
    mined = YOLOv2Loss(LossRankMiner(1.0, nms_threshold=None))(model, *scene(), warm_up=False)["detection"]
    assert torch.equal(plain, mined)


def test_mining_keeps_the_costliest_predictions_and_the_warm_up_whole():
    model = small_model().eval()
    images, boxes, labels = scene()
    predictions = model.predict(images)
    unreduced = detection_loss(predictions, assign(predictions, boxes, labels, model.config.anchors), boxes)
    mined = YOLOv2Loss(LossRankMiner(0.1, nms_threshold=None))(model, images, boxes, labels, warm_up=True)
    expected = unreduced.flatten(1).topk(8).values.sum() / 4
    torch.testing.assert_close(mined["detection"], expected)
    torch.testing.assert_close(mined["warm_up"], YOLOv2Loss()(model, images, boxes, labels, warm_up=True)["warm_up"])


def test_random_predictions_spare_what_answers_for_a_true_box():
    torch.manual_seed(0)
    model = small_model().eval()
    images, boxes, labels = (
        torch.rand(3, 3, 64, 64),
        [torch.tensor([[3.0, 5.0, 40.0, 60.0]])] * 3,
        [torch.zeros(1).long()] * 3,
    )
    predictions = model.predict(images)
    assignment = assign(predictions, boxes, labels, model.config.anchors)
    whole = detection_loss(predictions, assignment, boxes)
    answers = whole[assignment.places].sum()
    kept = RandomPredictions(0.1)(whole, predictions.boxes)
    assert kept.flatten(1).sum(dim=1).tolist() == [2, 2, 2]
    everything = sum(whole.flatten()).item() / 3
    for seed in range(5):
        torch.manual_seed(seed)
        loss = YOLOv2Loss(RandomPredictions(0.1), keeps_answers=True)(model, images, boxes, labels, warm_up=False)
        assert answers.item() / 3 <= loss["detection"].item() < everything
    half = detection_loss(predictions, assignment, boxes, background=0.5)
    torch.testing.assert_close(half[assignment.places], whole[assignment.places])
    half[assignment.places], whole[assignment.places] = 0, 0
    torch.testing.assert_close(half, whole / 2)


def test_images_without_boxes_have_background_only():
    model = small_model().train()
    nothing = [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.long)] * 2
    images = torch.randn(2, 3, 64, 64)
    losses = YOLOv2Loss()(model, images, *nothing, warm_up=True)
    torch.testing.assert_close(losses["detection"], model.predict(images).objectness.square().sum() / 2 / 2)
    sum(losses.values()).backward()


def test_impossible_truth_is_refused():
    with pytest.raises(TrueBoxError, match="image 0"):
        YOLOv2Loss()(small_model(), torch.randn(1, 3, 64, 64), [torch.zeros(1, 4)], [torch.tensor([0])], warm_up=False)


def test_no_classes_are_refused():
    with pytest.raises(ValueError, match="at least one class"):
        YOLOv2(FakeBackbone(), 0)


@pytest.mark.slow
@pytest.mark.parametrize("miner", [None, LossRankMiner(0.15), LossRankMiner(0.3, element="cell")])
def test_learns_four_images_by_heart(miner):
    """About 10 seconds each."""
    model = small_model(anchors=((1.0, 1.0), (1.5, 1.5), (3.0, 3.0))).train()
    loss = YOLOv2Loss(miner)
    images, boxes, labels = scene()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        sum(loss(model, images, boxes, labels, warm_up=False).values()).backward()
        optimizer.step()
    for found, true_boxes, true_labels in zip(model.eval()(images), boxes, labels, strict=True):
        assert found.class_ids[0] == true_labels[0] and found.scores[0] > 0.5
        assert box_iou(found.boxes[:1], true_boxes).item() > 0.7
