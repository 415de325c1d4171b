"""What re-implementations of these networks got wrong, one test each."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.backbones import create_backbone, list_backbones
from vision.backbones.layers import channel_shuffle
from vision.backbones.menet import MEModule, MENet, MENetConfig
from vision.backbones.shufflenet_v2 import BasicUnit, DownsamplingUnit


def randomise(module: nn.Module) -> nn.Module:
    """Non-trivial batch normalisation, evaluation mode, float64."""
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (layer.bias, layer.running_mean):
                nn.init.normal_(tensor)
    return module.double().eval()


def conv(x: Tensor, layer: nn.Conv2d, norm: nn.BatchNorm2d, stride: int = 1, groups: int = 1) -> Tensor:
    """Convolution and normalisation by their formulas, from the weights alone."""
    y = F.conv2d(x, layer.weight, None, stride, layer.weight.shape[-1] // 2, groups=groups)
    return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]


def depthwise(model: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in convolutions(model) if layer.groups == layer.in_channels]


@pytest.mark.parametrize("name", list_backbones())
def test_every_convolution_is_symmetric_without_bias_and_normalised(name: str) -> None:
    with torch.device("meta"):
        model = create_backbone(name)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert all(layer.bias is None for layer in convolutions(model))
    assert all(layer.padding == (layer.kernel_size[0] // 2,) * 2 for layer in convolutions(model))
    assert [n.num_features for n in norms] == [c.out_channels for c in convolutions(model)]
    assert {(n.eps, n.momentum) for n in norms} == {(1e-5, 0.1)}
    assert not any(isinstance(layer, nn.ReLU6) for layer in model.modules())
    assert not any(layer.inplace for layer in model.modules() if isinstance(layer, nn.ReLU))


@pytest.mark.parametrize(("name", "share"), [("snet49", 6_203_400), ("snet146", 13_083_000), ("snet535", 24_637_200)])
def test_snet_depthwise_filters_are_five_by_five_and_the_stem_is_not(name: str, share: int) -> None:
    with torch.device("meta"):
        model = create_backbone(name).eval()
        seen: list[int] = []
        for layer in depthwise(model):
            layer.register_forward_hook(lambda layer, _, y: seen.append(y.numel() * layer.weight[0].numel()))
        model(torch.empty(1, 3, 224, 224))
    assert model.stem[0].kernel_size == (3, 3)
    assert {layer.kernel_size for layer in depthwise(model)} == {(5, 5)}
    assert sum(seen) == share


@pytest.mark.parametrize(("name", "parameters"), [("snet49", 8_380), ("snet146", 16_068), ("snet535", 30_200)])
def test_snet_batch_norm_parameters(name: str, parameters: int) -> None:
    model = create_backbone(name)
    norms = (layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    assert sum(p.numel() for layer in norms for p in layer.parameters()) == parameters


def test_snet_stages_have_four_eight_four_units() -> None:
    for name in ("snet49", "snet146", "snet535", "shufflenet_v2_x1_0"):
        stages = create_backbone(name).stages
        assert [[type(unit) for unit in stage] for stage in stages] == [
            [DownsamplingUnit] + [BasicUnit] * n for n in (3, 7, 3)
        ]


def test_only_snet49_keeps_the_last_convolution() -> None:
    assert create_backbone("snet49").final[0].weight.shape == (512, 240, 1, 1)
    for name, width in (("snet146", 528), ("snet535", 992)):
        model = create_backbone(name)
        assert isinstance(model.final, nn.Identity)
        assert model.head.in_features == width


def test_classifier_bias_and_dropout() -> None:
    assert create_backbone("snet49").head.bias is None
    assert create_backbone("shufflenet_v2_x0_5").head.bias is not None
    dropped = {name for name in list_backbones() if create_backbone(name, 2).dropout.p}
    assert dropped == {"snet535", "shufflenet_v2_x2_0"}


def test_channel_shuffle_interleaves_groups() -> None:
    x = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert channel_shuffle(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert channel_shuffle(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("form", ["M", "E"])
def test_basic_unit_equals_its_figure(form: str) -> None:
    unit = randomise(BasicUnit(8, 5, form))
    x = torch.randn(2, 8, 7, 7, dtype=torch.float64)
    passing, worked = (x[:, ::2], x[:, 1::2]) if form == "M" else (x[:, :4], x[:, 4:])
    r = unit.right
    y = conv(worked, r[0], r[1]).relu()
    y = conv(conv(y, r[3], r[4], groups=4), r[5], r[6]).relu()
    joined = torch.cat((passing, y), 1)
    expected = joined if form == "M" else joined[:, [0, 4, 1, 5, 2, 6, 3, 7]]
    torch.testing.assert_close(unit(x), expected)
    torch.testing.assert_close(expected[:, 0::2] if form == "E" else expected[:, :4], passing)


@pytest.mark.parametrize(("form", "left_channels"), [("M", 6), ("E", 8)])
def test_downsampling_unit_equals_its_figure(form: str, left_channels: int) -> None:
    unit = randomise(DownsamplingUnit(6, 16, 3, form))
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    r, left = unit.right, unit.left
    y = conv(x, r[0], r[1]).relu()
    y = conv(conv(y, r[3], r[4], stride=2, groups=8), r[5], r[6]).relu()
    z = conv(conv(x, left[0], left[1], stride=2, groups=6), left[2], left[3]).relu()
    assert z.shape[1] == left_channels
    joined = torch.cat((z, y), 1)
    expected = joined if form == "M" else channel_shuffle(joined, 2)
    torch.testing.assert_close(unit(x), expected)


@pytest.mark.parametrize(("stride", "first_groups"), [(1, 3), (2, 3), (2, 1)])
def test_me_module_equals_its_equations(stride: int, first_groups: int) -> None:
    in_channels = 24 if stride == 1 else 12
    module = randomise(MEModule(in_channels, 24, 4, groups=3, first_groups=first_groups, stride=stride))
    x = torch.randn(2, in_channels, 9, 9, dtype=torch.float64)
    compress, merge, evolve = module.compress, module.side.merge, module.side.evolve
    x1 = conv(x, compress[0], compress[1], groups=first_groups).relu()
    x2 = x1[:, [0, 2, 4, 1, 3, 5]]
    y1 = conv(x2, merge[0], merge[1]).relu()
    x3 = conv(x2, *module.depthwise, stride=stride, groups=6)
    y2 = conv(y1, evolve[0], evolve[1], stride=stride).relu()
    x4 = x3 * torch.sigmoid(conv(y2, evolve[3], evolve[4]))
    x5 = conv(x4, *module.expand, groups=3)
    pooled = F.avg_pool2d(x, 3, 2, 1, count_include_pad=True)
    expected = (x5 + x if stride == 1 else torch.cat((x5, pooled), 1)).relu()
    torch.testing.assert_close(module(x), expected)
    assert (x3 < 0).any(), "no activation after the depthwise convolution"


def test_me_module_macs() -> None:
    expected = {(0, 0): 11_428_368, (0, 1): 9_283_344, (1, 0): 10_286_472, (1, 1): 7_783_944, (2, 0): 9_325_092}
    expected[2, 1] = 7_224_756
    with torch.device("meta"):
        model = create_backbone("menet_228_12x1_g3").eval()
        totals = dict.fromkeys(expected, 0)
        for stage, unit in expected:
            for layer in convolutions(model.stages[stage][unit]):

                def add(layer: nn.Conv2d, _: object, y: Tensor, key: tuple[int, int] = (stage, unit)) -> None:
                    totals[key] += y.numel() * layer.weight[0].numel()

                layer.register_forward_hook(add)
        model(torch.empty(1, 3, 224, 224))
    assert totals == expected


def test_only_the_first_module_of_menet_compresses_without_groups() -> None:
    model = create_backbone("menet_228_12x1_g3")
    groups = [[unit.compress[0].groups for unit in stage] for stage in model.stages]
    assert groups == [[1, 3, 3, 3], [3] * 8, [3] * 4]
    assert {unit.groups for stage in model.stages for unit in stage} == {3}


def test_menet_expands_by_what_the_pooled_input_does_not_fill() -> None:
    model = create_backbone("menet_228_12x1_g3")
    assert [stage[0].expand[0].out_channels for stage in model.stages] == [228 - 24, 228, 456]


def test_menet_gate_keeps_the_full_resolution() -> None:
    module = MENet(MENetConfig(108, 8, 3, 12)).stages[0][0].eval()
    gate = module.side(torch.randn(1, 27, 8, 10))
    assert gate.shape == (1, 27, 4, 5)
    assert 0 < gate.min() < gate.max() < 1


@pytest.mark.parametrize(("name", "layers_to_stride_32"), [("mobilenet_v1_x1_0", 24), ("fd_mobilenet_x1_0", 12)])
def test_fd_mobilenet_downsamples_with_half_the_layers(name: str, layers_to_stride_32: int) -> None:
    stride = 1
    for number, layer in enumerate(convolutions(create_backbone(name)), start=1):
        stride *= layer.stride[0]
        if stride == 32:
            assert number == layers_to_stride_32
            break


@pytest.mark.parametrize(("name", "blocks"), [("mobilenet_v1_x1_0", 13), ("fd_mobilenet_x1_0", 11)])
def test_mobilenets_are_straight_chains(name: str, blocks: int) -> None:
    model = create_backbone(name)
    assert len(model.blocks) == blocks
    assert model.blocks[-1][0].stride == (1, 1), "the misprint of the paper's table"
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
    assert all(tuple(type(layer) for layer in block) == kinds for block in model.blocks)


@pytest.mark.parametrize(
    ("name", "depthwise_macs"), [("mobilenet_v1_x1_0", 17_385_984), ("fd_mobilenet_x1_0", 4_177_152)]
)
def test_mobilenet_depthwise_share(name: str, depthwise_macs: int) -> None:
    with torch.device("meta"):
        model = create_backbone(name).eval()
        seen: list[int] = []
        for layer in depthwise(model):
            layer.register_forward_hook(lambda layer, _, y: seen.append(y.numel() * 9))
        model(torch.empty(1, 3, 224, 224))
    assert sum(seen) == depthwise_macs


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("name", ["snet49", "shufflenet_v2_x0_5", "menet_108_8x1_g3", "fd_mobilenet_x0_25"])
def test_fresh_networks_start_near_the_uniform_guess(name: str, classes: int) -> None:
    torch.manual_seed(0)
    model = create_backbone(name, classes)
    loss = F.cross_entropy(model(torch.randn(16, 3, 64, 64)), torch.randint(0, classes, (16,)))
    assert loss < math.log(classes) + 1.5


@pytest.mark.parametrize("name", ["snet49", "menet_108_8x1_g3", "fd_mobilenet_x0_25", "mobilenet_v1_x0_25"])
def test_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    model = create_backbone(name, 4)
    F.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
