"""The network's published size and its contract."""

import pytest
import torch
from torch import nn

from vision.face_quality import TinyFQNet
from vision.face_quality.tinyfqnet import InvertedResidual


def macs(model, side):
    total = 0

    def add(layer, _, output):
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(add)
    model.eval()(torch.zeros(1, 3, side, side))
    return total


def test_parameters():
    model = TinyFQNet()
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    assert sum(p.numel() for p in model.parameters()) == 21_801
    assert sum(p.numel() for p in norms) == 1_456
    by_layer = [sum(p.numel() for p in block.parameters()) for block in model.features]
    assert by_layer[0] + by_layer[1] == 232
    assert by_layer[3:] == [208, 1_660, 3_964, 7_456, 8_240]
    assert sum(p.numel() for p in model.head.parameters()) == 41


@pytest.mark.parametrize(("side", "expected"), [(112, 7_006_648), (96, 5.15e6), (64, 2.29e6)])
def test_cost(side, expected):
    assert macs(TinyFQNet(), side) == pytest.approx(expected, rel=0 if side == 112 else 2e-3)


def test_scores_are_one_number_an_image():
    model = TinyFQNet().eval()
    images = torch.randn(5, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    scores = model(images)
    assert scores.shape == (5,) and ((scores > 0) & (scores < 1)).all()
    torch.testing.assert_close(scores, model.logits(images).sigmoid())
    one_by_one = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(scores, one_by_one, atol=1e-6, rtol=0)


def test_only_the_block_of_equal_shape_is_residual():
    residual = [block.keeps_shape for block in TinyFQNet().features if hasattr(block, "keeps_shape")]
    assert residual == [False, False, False, True, False]
    block, x = InvertedResidual(4, 4, stride=1, expansion=3).eval(), torch.randn(2, 4, 6, 6)
    nn.init.zeros_(block.layers[-1].weight)
    assert torch.equal(block(x), x)


def test_it_learns_which_of_two_textures_is_sharp():
    torch.manual_seed(0)
    sharp = torch.randn(32, 3, 24, 24)
    blurred = nn.functional.avg_pool2d(sharp, 5, 1, 2) * 3
    images, labels = torch.cat([sharp, blurred]), torch.cat([torch.ones(32), torch.zeros(32)])
    model = TinyFQNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model.logits(images), labels).backward()
        optimizer.step()
    scores = model.eval()(images)
    assert scores[:32].mean() > scores[32:].mean() + 0.3
