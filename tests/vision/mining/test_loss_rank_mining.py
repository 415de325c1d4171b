"""Loss rank mining over maps of losses."""

import pytest
import torch

from vision.detection.boxes import box_iou
from vision.mining import LossRankMiner, MiningInputError, focal_loss, loss_rank_mining


def loss_map(images=2, anchors=5, side=6, seed=0):
    """Losses [N, A, S, S] and boxes that overlap within a cell and between neighbours."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.rand(images, anchors, side, side, generator=generator)
    centres = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), dim=-1) * 32.0 + 16
    sizes = 20 + torch.rand(images, anchors, side, side, 2, generator=generator) * 60
    return loss, torch.cat([centres - sizes / 2, centres + sizes / 2], dim=-1)


def slow_mask(loss, boxes, k, threshold):
    mask = torch.zeros_like(loss, dtype=torch.bool)
    for n in range(len(loss)):
        kept = []
        for i in loss[n].argsort(descending=True).tolist():
            if len(kept) < k and all(box_iou(boxes[n, i : i + 1], boxes[n, j : j + 1]) <= threshold for j in kept):
                kept.append(i)
        mask[n, kept] = True
    return mask


@pytest.mark.parametrize("k", [1, 20, 1000])
def test_equals_the_loop(k):
    loss, boxes = loss_map()
    loss, boxes = loss.flatten(1), boxes.flatten(1, 3)
    mask = loss_rank_mining(loss, boxes, k, 0.5)
    assert torch.equal(mask, slow_mask(loss, boxes, k, 0.5))


def test_keeps_exactly_k_in_every_image():
    loss, boxes = loss_map()
    mask = loss_rank_mining(loss.flatten(1), boxes.flatten(1, 3), 20)
    assert mask.sum(dim=1).tolist() == [20, 20]


def test_without_suppression_it_is_top_k():
    loss, boxes = loss_map()
    flat = loss.flatten(1)
    mask = loss_rank_mining(flat, boxes.flatten(1, 3), 30, None)
    for image_mask, image_loss in zip(mask, flat, strict=True):
        assert image_loss[image_mask].min() >= image_loss[~image_mask].max()
        assert image_mask.sum() == 30


def test_all_elements_without_suppression_are_the_plain_loss_bit_for_bit():
    loss, boxes = loss_map()
    mask = LossRankMiner(share=1.0, nms_threshold=None)(loss, boxes)
    assert torch.equal((loss * mask).sum(), loss.sum())


def test_elements_outside_the_mask_get_no_gradient():
    loss, boxes = loss_map()
    loss.requires_grad_()
    boxes.requires_grad_()
    mask = LossRankMiner(share=0.2)(loss, boxes)
    (loss * mask).sum().backward()
    assert torch.equal(loss.grad, mask.float())
    assert boxes.grad is None


def test_a_share_keeps_the_floor_of_its_product():
    loss, boxes = loss_map()
    for share, expected in ((0.15, 27), (0.999, 179), (0.001, 1)):
        assert LossRankMiner(share, None)(loss, boxes).flatten(1).sum(dim=1).tolist() == [expected] * 2


def test_cells_are_ranked_by_the_sum_over_their_anchors():
    loss, boxes = loss_map()
    mask = LossRankMiner(share=0.25, nms_threshold=None, element="cell")(loss, boxes)
    assert (mask == mask[:, :1]).all()
    cells, cell_loss = mask[:, 0].flatten(1), loss.sum(1).flatten(1)
    for image_mask, image_loss in zip(cells, cell_loss, strict=True):
        assert image_mask.sum() == 9
        assert image_loss[image_mask].min() >= image_loss[~image_mask].max()


def test_a_cell_is_represented_by_its_costliest_anchor():
    loss = torch.tensor([[[[1.0, 2.0]], [[5.0, 3.0]]]])
    wide, narrow, elsewhere = [0.0, 0, 100, 100], [0.0, 0, 1, 1], [50.0, 50, 51, 51]
    boxes = torch.tensor([[[narrow, elsewhere], [wide, wide]]]).view(1, 2, 1, 2, 4)
    assert LossRankMiner(1.0, element="cell")(loss, boxes)[0, :, 0].tolist() == [[True, False]] * 2
    loss[0, :, 0, 1] = torch.tensor([3.0, 2.0])
    assert LossRankMiner(1.0, element="cell")(loss, boxes)[0, :, 0].tolist() == [[True, True]] * 2


def test_mining_finds_the_elements_that_are_hard():
    """Hard elements planted at known places of easy noise, each blurred over its neighbourhood, come out once each."""
    loss, boxes = loss_map(images=1, anchors=1, side=16)
    loss = loss * 0.1
    places = [(2, 3), (7, 12), (13, 5), (11, 11)]
    for row, column in places:
        loss[0, 0, row - 1 : row + 2, column - 1 : column + 2] += 2
        loss[0, 0, row, column] += 1
    boxes = torch.cat([boxes[..., :2] - 60, boxes[..., 2:] + 60], dim=-1)
    mask = LossRankMiner(share=4 / 256, nms_threshold=0.3)(loss, boxes)
    assert sorted(map(tuple, mask[0, 0].nonzero().tolist())) == sorted(places)
    thoughtless = LossRankMiner(share=8 / 256, nms_threshold=None)(loss, boxes)[0, 0].nonzero()
    assert len(thoughtless) == 8 and sorted(map(tuple, thoughtless.tolist())) != sorted(places)


def test_weigh_first_select_last():
    """A focal loss is mined like any other: the mask marks the largest weighted losses at their own places."""
    logits = torch.randn(1, 5, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    positive = torch.zeros(1, 5, 4, 4, dtype=torch.bool)
    positive[0, 2, 1, 1] = True
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, positive.float(), reduction="none")
    focal = focal_loss(cross_entropy, positive)
    mask = LossRankMiner(0.1, None)(focal, loss_map(1, 5, 4)[1])
    (focal * mask).sum().backward()
    assert set(logits.grad.flatten().nonzero().flatten().tolist()) == set(focal.flatten().topk(8).indices.tolist())


def test_the_map_of_a_proposal_network_is_mined_the_same_way():
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(2, 10_000, generator=generator)
    corners = torch.rand(2, 10_000, 2, generator=generator) * 320
    mask = loss_rank_mining(loss, torch.cat([corners, corners + 64], dim=-1), k=256)
    assert mask.sum(dim=1).tolist() == [256, 256]


@pytest.mark.parametrize(
    "make", [lambda: LossRankMiner(0.0), lambda: LossRankMiner(1.1), lambda: LossRankMiner(element="row")]
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(MiningInputError, match="must be"):
        make()


def test_bad_inputs_are_refused():
    loss, boxes = loss_map()
    with pytest.raises(MiningInputError, match="N, M, 4"):
        loss_rank_mining(loss, boxes, 5)
    with pytest.raises(MiningInputError, match="N, A, H, W"):
        LossRankMiner()(loss.flatten(1), boxes.flatten(1, 3))
    with pytest.raises(MiningInputError, match="at least one"):
        loss_rank_mining(loss.flatten(1), boxes.flatten(1, 3), 0)
    loss[0, 0, 0, 0] = torch.inf
    with pytest.raises(MiningInputError, match="infinity"):
        LossRankMiner()(loss, boxes)
