"""ThunderNet against the paper's shapes and costs, its modules one by one, and its losses."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from vision.detection.boxes import box_iou, encode_boxes
from vision.detection.context_enhancement import ContextEnhancement
from vision.detection.rpn import AnchorGrid, ProposalBudget, RegionProposalHead, select_proposals
from vision.detection.spatial_attention import SpatialAttention
from vision.detection.thundernet import ThunderNet, ThunderNetConfig
from vision.detection.thundernet_loss import ThunderNetLoss, smooth_l1
from vision.detection.truth import TrueBoxError
from vision.mining import OHEM, RandomSample, StratifiedOHEM, loss_rank_mining

SNET_DIMS = {"snet49": (60, 120, 512), "snet146": (132, 264, 528), "snet535": (248, 496, 992)}


class FakeBackbone(nn.Module):
    """Strided convolutions with a given number of channels at strides 8, 16 and 32."""

    def __init__(self, dims=(8, 12, 16)):
        super().__init__()
        self.feature_channels = dims
        blocks = zip((3, *dims), dims, (8, 2, 2), (9, 3, 3), strict=False)
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


def small_model(num_classes=3, seed=0, **config):
    torch.manual_seed(seed)
    return ThunderNet(FakeBackbone(), num_classes, ThunderNetConfig(**config)).eval()


def count_macs(module, *inputs):
    """Multiply-adds of the convolutions and linear layers that run."""
    total = 0

    def add(layer, _, output):
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    hooks = [m.register_forward_hook(add) for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        module(*inputs)
    for hook in hooks:
        hook.remove()
    return total


def num_parameters(*modules):
    return sum(p.numel() for m in modules for p in m.parameters())


# --- Shapes and cost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "c4", "anchors"),
    [
        ((320, 320), (20, 20), 10_000),
        ((240, 240), (15, 15), 5_625),
        ((480, 480), (30, 30), 22_500),
        ((320, 256), (20, 16), 8_000),
    ],
)
def test_shapes(size, c4, anchors):
    model = small_model()
    with torch.no_grad():
        maps = model.dense(torch.randn(2, 3, *size))
        regions = model.propose(maps, ProposalBudget(400, 30))
        logits, deltas = model.classify(maps, regions)
        detections = model(torch.randn(2, 3, *size))
    assert maps.f_sam.shape == (2, 245, *c4)
    assert maps.objectness.shape == (2, anchors, 2)
    assert maps.deltas.shape == (2, anchors, 4) and maps.anchors.shape == (anchors, 4)
    assert logits.shape == (sum(map(len, regions)), 4) and deltas.shape == (len(logits), 4)
    assert len(detections) == 2
    for boxes in regions:
        assert boxes.min() >= 0 and (boxes.amax(dim=0) <= torch.tensor([size[1], size[0]] * 2)).all()


# Parameters of the published detector (COCO, without the ImageNet classifier) less those of the backbone.
@pytest.mark.parametrize(("name", "detector"), [("snet49", 791_651), ("snet146", 834_771), ("snet535", 1_118_971)])
def test_parameters_of_the_detection_part(name, detector):
    model = ThunderNet(FakeBackbone(SNET_DIMS[name]), 80)
    assert num_parameters(model) - num_parameters(model.backbone) == detector


@pytest.mark.parametrize(("name", "context"), [("snet49", 24.4e6), ("snet146", 38.9e6), ("snet535", 73.2e6)])
def test_cost_of_each_part(name, context):
    _, c4, c5 = SNET_DIMS[name]
    maps = (torch.zeros(1, c4, 20, 20), torch.zeros(1, c5, 10, 10))
    assert count_macs(ContextEnhancement(c4, c5), *maps) == pytest.approx(context, abs=0.05e6)
    f_cem, f_rpn = torch.zeros(1, 245, 20, 20), torch.zeros(1, 256, 20, 20)
    assert count_macs(RegionProposalHead(), f_cem) == pytest.approx((2.45 + 25.09 + 5.12 + 10.24) * 1e6, abs=0.02e6)
    assert count_macs(SpatialAttention(), f_cem, f_rpn) == pytest.approx(25.09e6, abs=0.01e6)


@pytest.mark.parametrize(("classes", "macs"), [(80, 50.18e6 + 16.6e6 + 0.82e6), (20, 50.18e6 + 4.3e6 + 0.82e6)])
def test_cost_of_200_regions(classes, macs):
    model = ThunderNet(FakeBackbone(), classes)
    layers = nn.Sequential(model.hidden, nn.ModuleList([model.class_logits, model.box_deltas])[0])
    cost = count_macs(layers, torch.zeros(200, 245)) + count_macs(
        nn.Sequential(model.box_deltas), torch.zeros(200, 1024)
    )
    assert cost == pytest.approx(macs, abs=0.05e6)


# --- Anchors --------------------------------------------------------------------------------------------------------


def test_anchors_of_one_cell():
    boxes = AnchorGrid().boxes(1, 1, like=torch.zeros(1, dtype=torch.float64))
    sizes = boxes[:, 2:] - boxes[:, :2]
    torch.testing.assert_close((boxes[:, 2:] + boxes[:, :2]) / 2, torch.full((25, 2), 8.0, dtype=torch.float64))
    expected = [(45.25, 22.63), (36.95, 27.71), (32, 32), (27.71, 36.95), (22.63, 45.25)]
    assert sizes[:5].flatten().tolist() == pytest.approx([x for pair in expected for x in pair], abs=0.01)
    areas = sizes.prod(dim=1).view(5, 5)
    torch.testing.assert_close(areas, torch.tensor([32.0, 64, 128, 256, 512]).double().square()[:, None].expand(5, 5))
    ratios = (sizes[:, 1] / sizes[:, 0]).view(5, 5)
    torch.testing.assert_close(ratios, torch.tensor([0.5, 0.75, 1, 4 / 3, 2]).double().expand(5, 5))


def test_a_planted_output_lands_on_its_anchor():
    """The heads' channels and cells and the anchors must be flattened in one order."""
    head, grid = RegionProposalHead(), AnchorGrid()
    anchor_id, row, column = 13, 4, 9
    f_cem = torch.zeros(1, 245, 6, 11)
    for name, values in (("objectness", 2), ("deltas", 4)):
        planted = torch.zeros(1, 25 * values, 6, 11)
        planted[0, anchor_id * values + 1, row, column] = 1
        layer = getattr(head, name)
        layer.forward = lambda _, planted=planted: planted
    _, objectness, deltas = head(f_cem)
    index = (anchor_id * 6 + row) * 11 + column
    assert objectness.nonzero().tolist() == [[0, index, 1]]
    assert deltas.nonzero().tolist() == [[0, index, 1]]
    box = grid.boxes(6, 11, like=f_cem)[index]
    assert ((box[:2] + box[2:]) / 2).tolist() == [(column + 0.5) * 16, (row + 0.5) * 16]
    scale, ratio = grid.scales[anchor_id // 5], grid.ratios[anchor_id % 5]
    assert (box[2:] - box[:2]).tolist() == pytest.approx([scale / math.sqrt(ratio), scale * math.sqrt(ratio)])


# --- Modules --------------------------------------------------------------------------------------------------------


def test_both_convolutions_of_the_proposal_network_are_activated():
    head, f_cem = RegionProposalHead(), torch.randn(2, 245, 5, 6)
    between = head.depthwise(f_cem)
    f_rpn, _, _ = head(f_cem)
    assert between.shape == (2, 245, 5, 6) and f_rpn.shape == (2, 256, 5, 6)
    for activated in (between, f_rpn):
        assert activated.min() == 0 and activated.max() > 0


def test_attention_lies_between_zero_and_one():
    attention = SpatialAttention().eval()
    f_cem, f_rpn = torch.randn(2, 245, 5, 6), torch.randn(2, 256, 5, 6)
    factor = attention(f_cem, f_rpn) / f_cem
    assert ((factor > 0) & (factor < 1)).all()
    nn.init.zeros_(attention.project.weight)
    torch.testing.assert_close(attention(f_cem, f_rpn), f_cem / 2)


def test_the_detection_loss_reaches_the_proposal_network_through_the_attention():
    model = small_model()
    maps = model.dense(torch.randn(1, 3, 64, 64))
    logits, _ = model.classify(maps, [torch.tensor([[4.0, 4, 40, 50]])])
    logits.sum().backward()
    assert model.rpn.pointwise[0].weight.grad.abs().max() > 0
    assert model.rpn.objectness.weight.grad is None


def test_context_is_the_sum_of_three_views():
    module = ContextEnhancement(4, 6, 8)
    c4, c5 = torch.randn(1, 4, 15, 15), torch.randn(1, 6, 8, 8)
    output = module(c4, c5)
    assert output.shape == (1, 8, 15, 15)
    rows = (torch.arange(15) * 8) // 15
    wide = functional.conv2d(c5, module.wide_view.weight, module.wide_view.bias)[:, :, rows][:, :, :, rows]
    pooled = functional.conv2d(c5.mean((2, 3), keepdim=True), module.global_view.weight, module.global_view.bias)
    torch.testing.assert_close(output, module.local_view(c4) + wide + pooled)
    assert (output < 0).any()
    raised = module(c4, c5 + torch.randn(1, 6, 1, 1)) - output
    torch.testing.assert_close(raised, raised[:, :, :1, :1].expand_as(raised), atol=1e-5, rtol=1e-5)


def test_without_its_parts_the_map_is_c4_alone_and_not_reweighed():
    whole, bare = small_model(), small_model(context_enhancement=False, spatial_attention=False)
    images = torch.rand(1, 3, 64, 64)
    _, c4, c5 = bare.backbone.forward_features(images)
    maps = bare.dense(images)
    torch.testing.assert_close(maps.f_cem, bare.context_enhancement.local_view(c4))
    assert maps.f_sam is maps.f_cem
    gone = {name.rpartition(".")[0] for name in whole.state_dict()} - {n.rpartition(".")[0] for n in bare.state_dict()}
    views = {f"context_enhancement.{name}_view" for name in ("wide", "global")}
    assert gone == views | {"spatial_attention.project", "spatial_attention.normalize"}
    torch.testing.assert_close(bare.context_enhancement(c4, c5), bare.context_enhancement(c4, 0 * c5))


def test_proposals_are_ranked_clipped_thinned_and_constant():
    anchors = torch.tensor([[0.0, 0, 40, 40], [2, 2, 42, 42], [50, 50, 90, 90], [300, 300, 340, 340]])
    objectness = torch.tensor([[[0.0, 1.0], [0.0, 2.0], [0.0, 0.5], [0.0, 9.0]]], requires_grad=True)
    deltas = encode_boxes(
        torch.tensor([[0.0, 0, 40, 40], [2, 2, 42, 42], [50, 50, 120, 90], [300, 300, 340, 340]]), anchors
    )
    (boxes,) = select_proposals(objectness, deltas[None].requires_grad_(), anchors, (100, 100), ProposalBudget(10, 10))
    assert not boxes.requires_grad
    torch.testing.assert_close(boxes, torch.tensor([[2.0, 2, 42, 42], [50, 50, 100, 90]]))
    (one,) = select_proposals(objectness, deltas[None], anchors, (100, 100), ProposalBudget(10, 1))
    assert len(one) == 1
    (before,) = select_proposals(objectness, deltas[None], anchors, (100, 100), ProposalBudget(2, 10))
    torch.testing.assert_close(before, torch.tensor([[2.0, 2, 42, 42]]))


def test_detections_are_decoded_scored_and_suppressed_per_class(monkeypatch):
    model = small_model(num_classes=2)
    regions = torch.tensor([[10.0, 10, 50, 50], [11.0, 10, 51, 50], [60.0, 60, 90, 100]])
    probabilities = torch.tensor([[0.1, 0.86, 0.04], [0.2, 0.5, 0.3], [0.3, 0.01, 0.69]])
    deltas = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0], [1.0, 0, 0, 0]])
    monkeypatch.setattr(model, "dense", lambda images: SimpleNamespace(image_size=(100, 95)))
    monkeypatch.setattr(model, "propose", lambda maps, budget: [regions])
    monkeypatch.setattr(model, "classify", lambda maps, proposals: (probabilities.log(), deltas))
    (found,) = model(torch.zeros(1, 3, 100, 95))
    overlap = 39 / 41
    assert found.class_ids.tolist() == [0, 1, 1, 0]
    assert found.scores.tolist() == pytest.approx([0.86, 0.69, 0.3, 0.5 * (1 - overlap)])
    torch.testing.assert_close(found.boxes[1], torch.tensor([63.0, 60, 93, 100]))


# --- Losses ---------------------------------------------------------------------------------------------------------


def test_smooth_l1_by_hand():
    assert smooth_l1(torch.tensor([[0.05, -2.0]]), sigma=3.0).item() == pytest.approx(0.5 * 9 * 0.0025 + 2 - 0.5 / 9)
    assert smooth_l1(torch.tensor([[0.5, -2.0]]), sigma=1.0).item() == pytest.approx(0.125 + 1.5)


def scene(count=2, side=128, seed=0):
    """Images with one bright square of class 0 or 1 each, and their truth."""
    generator = torch.Generator().manual_seed(seed)
    images, boxes, labels = 0.1 * torch.randn(count, 3, side, side, generator=generator), [], []
    for i in range(count):
        x, y = torch.randint(8, side - 56, (2,), generator=generator).tolist()
        images[i, i % 2, y : y + 48, x : x + 48] += 2
        boxes.append(torch.tensor([[x, y, x + 48.0, y + 48.0]]))
        labels.append(torch.tensor([i % 2]))
    return images, boxes, labels


MINERS = [
    (OHEM(32), None),
    (StratifiedOHEM(32), None),
    (RandomSample(32), None),
    (OHEM(32), lambda loss, boxes: loss_rank_mining(loss, boxes, k=64)),
]


@pytest.mark.parametrize(("region_miner", "anchor_miner"), MINERS)
def test_losses_are_finite_and_reach_every_parameter(region_miner, anchor_miner):
    model = small_model(num_classes=2).train()
    loss = ThunderNetLoss(region_miner, anchor_miner, ProposalBudget(300, 100))
    losses = loss(model, *scene(), progress=0.5)
    assert set(losses) == {"rpn_classification", "rpn_localization", "rcnn_classification", "rcnn_localization"}
    assert all(value.ndim == 0 and value.isfinite() and value > 0 for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_trains_in_mixed_precision():
    model = small_model(num_classes=2).train()
    with torch.autocast("cpu", torch.bfloat16):
        maps = model.dense(scene()[0])
        losses = ThunderNetLoss(OHEM(32), budget=ProposalBudget(300, 100))(model, *scene(), progress=0.5)
    assert maps.f_sam.dtype == torch.bfloat16 and maps.anchors.dtype == torch.float32
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()


def test_an_image_without_boxes_is_all_background():
    model = small_model(num_classes=2).train()
    loss = ThunderNetLoss(OHEM(32), budget=ProposalBudget(300, 100))
    losses = loss(
        model, torch.randn(2, 3, 64, 64), [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.long)] * 2, 0.0
    )
    assert losses["rpn_localization"] == losses["rcnn_localization"] == 0
    assert losses["rpn_classification"] > 0 and losses["rcnn_classification"] > 0
    sum(losses.values()).backward()


def test_first_stage_terms_equal_a_loop():
    """With every anchor chosen, both terms are sums over anchors by the definition, over the anchors in use."""
    model = small_model(num_classes=2)
    images, boxes, labels = torch.randn(1, 3, 64, 64), [torch.tensor([[10.0, 12, 44, 40]])], [torch.tensor([1])]
    losses = ThunderNetLoss(OHEM(8), lambda loss, _: torch.ones_like(loss, dtype=torch.bool))(
        model, images, boxes, labels, 0
    )
    maps = model.dense(images)
    overlaps = box_iou(maps.anchors, boxes[0])[:, 0]
    classification = localization = used = 0
    for anchor, overlap, logits, deltas in zip(maps.anchors, overlaps, maps.objectness[0], maps.deltas[0], strict=True):
        if overlap >= 0.7 or overlap == overlaps.max():
            classification -= logits.log_softmax(0)[1]
            for x in (deltas - encode_boxes(boxes[0][0], anchor)).tolist():
                localization += 4.5 * x * x if abs(x) < 1 / 9 else abs(x) - 1 / 18
            used += 1
        elif overlap < 0.3:
            classification -= logits.log_softmax(0)[0]
            used += 1
    assert used < len(overlaps)
    assert losses["rpn_classification"].item() == pytest.approx((classification / used).item(), rel=1e-4)
    assert losses["rpn_localization"].item() == pytest.approx(localization / used, rel=1e-4)


def test_second_stage_trains_on_what_the_miner_picks():
    model = small_model(num_classes=2)
    images, boxes, labels = scene()
    seen = []

    def last_two(classification, localization, regions, region_labels, progress):
        seen.append((classification, localization, regions, region_labels, progress))
        return torch.arange(len(regions))[-2:]

    losses = ThunderNetLoss(last_two, budget=ProposalBudget(300, 50))(model, images, boxes, labels, 0.25)
    # True boxes stand last among the regions, with their own label and no distance to themselves.
    for image, (_, _, regions, region_labels, progress) in enumerate(seen):
        assert torch.equal(regions[-1:], boxes[image])
        assert region_labels[-1] == labels[image] + 1
        assert progress == 0.25
    classification = torch.cat([c[-2:] for c, *_ in seen])
    localization = torch.cat([g[-2:] for _, g, *_ in seen])
    torch.testing.assert_close(losses["rcnn_classification"], classification.mean())
    torch.testing.assert_close(losses["rcnn_localization"], 2 * localization.mean())


def test_second_stage_losses_of_every_region_equal_a_loop():
    model = small_model(num_classes=2)
    images, boxes, labels = scene(count=1)
    seen = []

    def all_of_them(classification, localization, regions, region_labels, progress):
        seen.append((classification, localization, regions, region_labels))
        return torch.arange(len(regions))

    near = boxes[0] + torch.tensor([[6.0, -4, 9, 5]])
    model.propose = lambda maps, budget: [torch.cat([near, near + 20, torch.tensor([[0.0, 0, 9, 9]])])]
    ThunderNetLoss(all_of_them)(model, images, boxes, labels, 0.0)
    classification, localization, regions, region_labels = seen[0]
    assert region_labels.tolist() == [1, 0, 0, 1]
    logits, deltas = model.classify(model.dense(images), [regions])
    for i, label in enumerate(region_labels.tolist()):
        assert classification[i].item() == pytest.approx(-logits[i].log_softmax(0)[label].item())
        wanted = encode_boxes(boxes[0][0], regions[i]) / torch.tensor([0.1, 0.1, 0.2, 0.2])
        distances = (deltas[i] - wanted).abs().tolist()
        expected = sum(0.5 * x * x if x < 1 else x - 0.5 for x in distances) if label else 0.0
        assert localization[i].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("boxes", "labels"),
    [
        ([[10.0, 10, 10, 20]], [0]),
        ([[20.0, 10, 10, 20]], [0]),
        ([[float("nan"), 10, 20, 20]], [0]),
        ([[10.0, 10, 20, 20]], [2]),
        ([[10.0, 10, 20, 20]], [-1]),
        ([[10.0, 10, 20, 20]], [0, 1]),
    ],
)
def test_impossible_truth_is_refused(boxes, labels):
    loss = ThunderNetLoss(OHEM(8))
    with pytest.raises(TrueBoxError, match="image 0"):
        loss(small_model(num_classes=2), torch.randn(1, 3, 64, 64), [torch.tensor(boxes)], [torch.tensor(labels)], 0.0)


def test_no_classes_are_refused():
    with pytest.raises(ValueError, match="at least one class"):
        ThunderNet(FakeBackbone(), 0)


@pytest.mark.slow
@pytest.mark.parametrize(("region_miner", "anchor_miner"), MINERS)
def test_learns_four_images_by_heart(region_miner, anchor_miner):
    """About 15 seconds each."""
    model = small_model(num_classes=2, seed=1).train()
    loss = ThunderNetLoss(region_miner, anchor_miner, ProposalBudget(300, 100))
    images, boxes, labels = scene(count=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = 150
    for step in range(steps):
        optimizer.zero_grad()
        sum(loss(model, images, boxes, labels, step / steps).values()).backward()
        optimizer.step()
    for found, true_boxes, true_labels in zip(model.eval()(images), boxes, labels, strict=True):
        assert found.class_ids[0] == true_labels[0] and found.scores[0] > 0.5
        assert box_iou(found.boxes[:1], true_boxes).item() > 0.7
