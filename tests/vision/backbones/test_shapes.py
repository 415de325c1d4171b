import pytest
import torch

from vision.backbones import UnknownBackboneError, create_backbone, list_backbones
from vision.backbones.backbone import ConfigurationError, InputShapeError
from vision.backbones.menet import MENet, MENetConfig
from vision.backbones.mobilenet import MobileNet, MobileNetConfig
from vision.backbones.shufflenet_v2 import ShuffleNetV2, ShuffleNetV2Config

CHANNELS = {
    "snet49": (60, 120, 512),
    "snet146": (132, 264, 528),
    "snet535": (248, 496, 992),
    "shufflenet_v2_x0_5": (48, 96, 1024),
    "shufflenet_v2_x1_0": (116, 232, 1024),
    "shufflenet_v2_x1_5": (176, 352, 1024),
    "shufflenet_v2_x2_0": (244, 488, 2048),
    "menet_108_8x1_g3": (108, 216, 432),
    "menet_120_0x1_g3": (120, 240, 480),
    "menet_128_8x1_g4": (128, 256, 512),
    "menet_160_8x1_g8": (160, 320, 640),
    "menet_228_12x1_g3": (228, 456, 912),
    "menet_256_12x1_g4": (256, 512, 1024),
    "menet_352_12x1_g8": (352, 704, 1408),
    "menet_348_12x1_g3": (348, 696, 1392),
    "menet_456_24x1_g3": (456, 912, 1824),
    "fd_mobilenet_x1_0": (128, 256, 1024),
    "fd_mobilenet_x0_75": (96, 192, 768),
    "fd_mobilenet_x0_5": (64, 128, 512),
    "fd_mobilenet_x0_25": (32, 64, 256),
    "mobilenet_v1_x1_0": (256, 512, 1024),
    "mobilenet_v1_x0_75": (192, 384, 768),
    "mobilenet_v1_x0_5": (128, 256, 512),
    "mobilenet_v1_x0_25": (64, 128, 256),
    "mobilenet_v1_x0_125": (32, 64, 128),
    "plain_w6": (24, 24, 24),
    "plain_w12": (48, 48, 48),
    "plain_w32": (128, 128, 128),
}


@pytest.mark.parametrize("name", list_backbones())
@pytest.mark.parametrize("side", [224, 320])
def test_feature_maps(name: str, side: int) -> None:
    with torch.device("meta"):
        model = create_backbone(name).eval()
        maps = model.forward_features(torch.empty(2, 3, side, side))
    assert model.feature_channels == CHANNELS[name]
    assert [tuple(m.shape) for m in maps] == [
        (2, channels, side // stride, side // stride)
        for channels, stride in zip(CHANNELS[name], (8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize("name", ["snet49", "shufflenet_v2_x0_5", "menet_108_8x1_g3", "fd_mobilenet_x0_25"])
def test_any_size_from_the_stride_up(name: str) -> None:
    model = create_backbone(name, num_classes=7).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
        assert [m.shape[2:] for m in model.forward_features(torch.randn(1, 3, 65, 97))] == [(9, 13), (5, 7), (3, 4)]


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 3, 64, 16)])
def test_images_smaller_than_the_stride_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputShapeError, match=f"{shape[3]}x{shape[2]} pixels.*at least 32"):
        create_backbone("fd_mobilenet_x0_25")(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (3, 64, 64)])
def test_images_without_three_channels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputShapeError, match=r"\[batch, 3, height, width\]"):
        create_backbone("fd_mobilenet_x0_25")(torch.zeros(shape))


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UnknownBackboneError, match=r"'snet50'.*snet49, snet146.*mobilenet_v1_x0_25"):
        create_backbone("snet50")


def test_names_round_trip() -> None:
    with torch.device("meta"):
        assert [create_backbone(name).name for name in list_backbones()] == list_backbones()
        assert MENet(MENetConfig(120, 8, 3)).name == "custom MENet"


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_menet_takes_any_groups_that_divide(groups: int) -> None:
    # 264: bottlenecks 66, 132, 264; the first module of the net expands by 264 - 24 = 240.
    model = MENet(MENetConfig(264, 8, groups), num_classes=5).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(("channels", "groups"), [(228, 4), (108, 5), (228, 0)])
def test_groups_that_do_not_divide_are_refused(channels: int, groups: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{groups} groups do not divide"):
        MENet(MENetConfig(channels, 12, groups))


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="multiple of 4"):
        ShuffleNetV2Config((50, 100, 200))
    with pytest.raises(ConfigurationError, match="form is 'X'; allowed are M, E"):
        ShuffleNetV2Config((48, 96, 192), form="X")
    with pytest.raises(ConfigurationError, match="cannot go from 24 to 24"):
        ShuffleNetV2(ShuffleNetV2Config((24, 48, 96)))
    with pytest.raises(ConfigurationError, match=r"width is 0\.01"):
        MobileNet(MobileNetConfig(0.01))
    with pytest.raises(ConfigurationError, match="num_classes is 0"):
        create_backbone("snet49", 0)


def test_replacing_the_head_keeps_the_features() -> None:
    model = create_backbone("snet49", 10)
    before = model.stem[0].weight.clone()
    model.class_names = ("a",) * 10
    model.replace_head(3)
    assert model.num_classes == 3
    assert model.head.bias is None
    assert model.class_names == ()
    assert torch.equal(model.stem[0].weight, before)
