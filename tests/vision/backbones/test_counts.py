"""Parameters and multiply-accumulates of every published variant, counted from the authors' tables."""

import dataclasses

import pytest

from vision.backbones import create_backbone, list_backbones
from vision.backbones.backbone import Backbone
from vision.backbones.complexity import Complexity, count
from vision.backbones.menet import MENet, MENetConfig
from vision.backbones.shufflenet_v2 import ShuffleNetV2
from vision.backbones.snet import SNet

# name: parameters, multiply-accumulates at 224, of them in convolutions
PUBLISHED = {
    "snet49": (874_584, 51_234_056, 50_722_056),
    "snet146": (1_573_512, 162_520_824, 161_992_824),
    "snet535": (4_539_920, 539_883_024, 538_891_024),
    "shufflenet_v2_x0_5": (1_366_792, 40_476_448, 39_452_448),
    "shufflenet_v2_x1_0": (2_279_760, 145_814_296, 144_790_296),
    "shufflenet_v2_x1_5": (3_507_720, 298_970_656, 297_946_656),
    "shufflenet_v2_x2_0": (7_403_600, 590_783_000, 588_735_000),
    "menet_108_8x1_g3": (654_516, 38_287_440, 37_855_440),
    "menet_128_8x1_g4": (750_796, 40_916_224, 40_404_224),
    "menet_160_8x1_g8": (850_120, 39_269_248, 38_629_248),
    "menet_228_12x1_g3": (1_806_568, 144_092_352, 143_180_352),
    "menet_256_12x1_g4": (1_888_240, 140_842_560, 139_818_560),
    "menet_352_12x1_g8": (2_272_872, 144_281_024, 142_873_024),
    "menet_348_12x1_g3": (3_368_128, 299_616_192, 298_224_192),
    "menet_456_24x1_g3": (5_304_784, 551_048_928, 549_224_928),
    "menet_120_0x1_g3": (718_324, 37_589_856, 37_109_856),
    "fd_mobilenet_x1_0": (2_901_288, 144_489_728, 143_465_728),
    "fd_mobilenet_x0_75": (1_833_304, 84_282_816, 83_514_816),
    "fd_mobilenet_x0_5": (993_928, 40_132_224, 39_620_224),
    "fd_mobilenet_x0_25": (383_160, 12_037_952, 11_781_952),
    "mobilenet_v1_x1_0": (4_231_976, 568_740_352, 567_716_352),
    "mobilenet_v1_x0_75": (2_585_560, 325_400_448, 324_632_448),
    "mobilenet_v1_x0_5": (1_331_592, 149_497_088, 148_985_088),
    "mobilenet_v1_x0_25": (470_072, 41_030_272, 40_774_272),
    "mobilenet_v1_x0_125": (186_480, 12_085_568, 11_957_568),
    "plain_w6": (38_950, 7_390_464, 7_366_464),
    "plain_w12": (104_116, 25_449_600, 25_401_600),
    "plain_w32": (517_896, 162_698_240, 162_570_240),
}
AT_320 = {
    "snet49": 104_026_400,
    "snet146": 331_125_600,
    "snet535": 1_100_769_600,
    "fd_mobilenet_x1_0": 293_811_200,
    "fd_mobilenet_x0_75": 171_206_400,
    "fd_mobilenet_x0_5": 81_369_600,
    "fd_mobilenet_x0_25": 24_300_800,
    "mobilenet_v1_x1_0": 1_159_628_800,
    "mobilenet_v1_x0_75": 663_283_200,
    "mobilenet_v1_x0_5": 304_563_200,
    "mobilenet_v1_x0_25": 83_468_800,
}
# form E: parameters, multiply-accumulates at 224
EQUAL_SPLIT = {
    "snet49": (874_548, 51_205_832),
    "snet146": (1_571_748, 161_137_848),
    "snet535": (4_534_144, 535_354_640),
    "shufflenet_v2_x0_5": (1_366_792, 40_476_448),
    "shufflenet_v2_x1_0": (2_278_604, 144_907_992),
    "shufflenet_v2_x1_5": (3_503_624, 295_759_392),
    "shufflenet_v2_x2_0": (7_393_996, 583_253_464),
}
# parameters of stem, stages and last convolution; millions of multiply-accumulates of the same parts
SNET_PARTS = {
    "snet49": ((696, 12_204, 77_820, 147_960, 123_904), (8.129, 10.612, 16.758, 9.202, 6.021)),
    "snet146": ((696, 44_388, 332_772, 667_656, 0), (8.129, 37.143, 74.123, 42.598, 0.0)),
    "snet535": ((1_392, 142_232, 1_114_264, 2_290_032, 0), (16.257, 122.906, 252.032, 147.695, 0.0)),
}
# ShuffleNetV1, which MENet becomes without its side path: configuration, parameters, millions of multiply-accumulates
WITHOUT_SIDE_PATH = [
    (MENetConfig(108, None, 3, 12), 627_292, 31.53),
    (MENetConfig(128, None, 4, 12), 720_332, 33.43),
    (MENetConfig(160, None, 8, 16), 814_472, 30.61),
    (MENetConfig(228, None, 3), 1_731_712, 125.27),
    (MENetConfig(256, None, 4), 1_806_832, 120.49),
    (MENetConfig(352, None, 8), 2_169_000, 118.68),
    (MENetConfig(348, None, 3), 3_265_192, 274.24),
    (MENetConfig(456, None, 3, 48), 5_015_104, 475.78),
    (MENetConfig(240, None, 3), 1_865_728, 137.46),
    (MENetConfig(272, None, 4), 1_968_344, 134.34),
    (MENetConfig(384, None, 8), 2_434_768, 138.37),
    (MENetConfig(120, None, 3, 12), 718_324, 37.59),
    (MENetConfig(360, None, 3), 3_442_168, 292.44),
    (MENetConfig(480, None, 3, 48), 5_450_776, 524.05),
]


def variant(name: str, **changes: object) -> Backbone:
    network = SNet if name.startswith("snet") else ShuffleNetV2
    return network(dataclasses.replace(network.variants[name], **changes))


def parameters(module: object) -> int:
    return sum(p.numel() for p in module.parameters())  # type: ignore[attr-defined]


def test_every_registered_backbone_is_counted() -> None:
    assert set(PUBLISHED) == set(list_backbones())


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_at_224(name: str) -> None:
    expected, macs, conv_macs = PUBLISHED[name]
    assert count(create_backbone(name)) == Complexity(expected, conv_macs, macs - conv_macs)


@pytest.mark.parametrize("name", AT_320)
def test_macs_at_320(name: str) -> None:
    assert count(create_backbone(name), 320).macs == AT_320[name]


@pytest.mark.parametrize("name", EQUAL_SPLIT)
def test_size_of_the_equal_split(name: str) -> None:
    sizes = count(variant(name, form="E"))
    assert (sizes.parameters, sizes.macs) == EQUAL_SPLIT[name]


@pytest.mark.parametrize(("name", "conv_macs"), [
    ("snet49", 103_456_800), ("snet146", 327_775_200), ("snet535", 1_090_536_000),
])  # fmt: skip
def test_equal_split_at_320(name: str, conv_macs: int) -> None:
    assert count(variant(name, form="E"), 320).conv_macs == conv_macs


@pytest.mark.parametrize("name", SNET_PARTS)
def test_parts_of_snet(name: str) -> None:
    model = variant(name)
    sizes, millions = SNET_PARTS[name]
    parts = [model.stem, *model.stages, model.final]
    assert tuple(parameters(part) for part in parts) == sizes
    total = count(model).conv_macs
    assert total / 1e6 == pytest.approx(sum(millions), abs=0.003)
    assert parameters(model) - parameters(model.head) == sum(sizes)


@pytest.mark.parametrize(("name", "expected", "millions"), [
    ("snet49", 854_040, 47.26), ("snet146", 1_528_776, 154.15), ("snet535", 4_455_824, 524.12),
])  # fmt: skip
def test_snet_with_three_by_three_filters_is_another_network(name: str, expected: int, millions: float) -> None:
    sizes = count(variant(name, kernel_size=3))
    assert sizes.parameters == expected != PUBLISHED[name][0]
    assert sizes.macs / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(("config", "expected", "millions"), WITHOUT_SIDE_PATH)
def test_menet_without_side_path_is_shufflenet(config: MENetConfig, expected: int, millions: float) -> None:
    sizes = count(MENet(config))
    assert sizes.parameters == expected
    assert sizes.macs / 1e6 == pytest.approx(millions, abs=0.005)


def test_count_leaves_the_model_alone() -> None:
    model = create_backbone("fd_mobilenet_x0_25", 10).train()
    count(model)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.device.type == "cpu" for p in model.parameters())
