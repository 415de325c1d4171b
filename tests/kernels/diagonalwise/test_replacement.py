import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels.diagonalwise import DiagonalwiseConv2d, MaskedDiagonalwiseConv2d, refactorize, restore
from kernels.diagonalwise.layer import is_depthwise
from kernels.diagonalwise.replacement import replace_layers


def small_net() -> nn.Sequential:
    """Separable blocks with both strides, both kernel sizes and channels 32 does not divide."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
    for inside, outside, kernel, stride in ((12, 19, 3, 1), (19, 38, 5, 2), (38, 40, 3, 2)):
        layers += [
            nn.Sequential(
                nn.Conv2d(inside, inside, kernel, stride, kernel // 2, groups=inside, bias=False),
                nn.BatchNorm2d(inside), nn.ReLU(), nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside),
                nn.ReLU(),
            )
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5))


def loss_curve(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=4e-5)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        labels = torch.randint(0, 5, (8,), generator=generator)
        images = torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64) + labels[:, None, None, None] / 2
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def masked(model: nn.Module) -> nn.Module:
    return replace_layers(model, MaskedDiagonalwiseConv2d.replacing)


@pytest.mark.parametrize("convert", [refactorize, lambda m: refactorize(m, 8), masked], ids=["default", "m8", "masked"])
def test_training_gives_the_same_loss_curve(convert: object) -> None:
    native = small_net().double()
    other = convert(copy.deepcopy(native))  # type: ignore[operator]
    expected = loss_curve(native, 50)
    assert expected[-1] < 0.7 * expected[0], "the net must learn, or equal curves say nothing"
    assert loss_curve(other, 50) == pytest.approx(expected, rel=1e-7)


def test_every_depthwise_layer_is_replaced_and_nothing_else() -> None:
    model = refactorize(small_net())
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert [type(layer) for layer in convolutions] == [nn.Conv2d, *[DiagonalwiseConv2d, nn.Conv2d] * 3]
    assert all(isinstance(layer, DiagonalwiseConv2d) == is_depthwise(layer) for layer in convolutions)


def test_restore_is_the_inverse() -> None:
    model = small_net()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    text = str(model)
    assert restore(refactorize(model)) is model
    assert str(model) == text
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


def test_an_optimiser_made_before_still_trains_the_layers() -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refactorize(model)
    before = model[3][0].weight.detach().clone()
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[3][0].weight, before)


def test_checkpoints_pass_between_forms() -> None:
    native, changed, dense = small_net(), refactorize(small_net()), masked(small_net())
    with torch.no_grad():
        for p in native.parameters():
            p.normal_()
    changed.load_state_dict(native.state_dict())
    dense.load_state_dict(changed.state_dict())
    again = small_net()
    again.load_state_dict(dense.state_dict())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in native.state_dict().items())


def test_restoring_the_masked_form_keeps_the_filters() -> None:
    native = small_net().eval()
    x = torch.randn(1, 3, 16, 16)
    model = restore(masked(copy.deepcopy(native)))
    assert str(model) == str(native)
    torch.testing.assert_close(model(x), native(x))


def test_a_new_group_width_replaces_the_old() -> None:
    model = refactorize(refactorize(small_net()), 4)
    assert {m.channels_per_group for m in model.modules() if isinstance(m, DiagonalwiseConv2d)} == {4}


def test_mode_is_kept() -> None:
    assert not any(layer.training for layer in refactorize(small_net().eval()).modules())
