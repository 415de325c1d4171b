"""MENet, merging-and-evolution networks (Qin et al., arXiv 1803.09127)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vision.backbones.backbone import Backbone, ConfigurationError, FeatureMaps
from vision.backbones.layers import channel_shuffle, conv_bn, conv_bn_relu, depthwise_bn

STAGE_UNITS = (4, 8, 4)


@dataclass(frozen=True)
class MENetConfig:
    """``alpha-MENet-beta x 1 (g)``: alpha is the width of the first stage, beta the width of the narrow side path.

    Later stages double the width. ``narrow_channels`` None leaves out the side path: what remains is ShuffleNetV1, the
    paper's baseline.
    """

    first_stage_channels: int
    narrow_channels: int | None
    groups: int
    stem_channels: int = 24

    @property
    def stage_channels(self) -> tuple[int, int, int]:
        """Widths of the three stages."""
        return self.first_stage_channels, 2 * self.first_stage_channels, 4 * self.first_stage_channels


class SidePath(nn.Module):
    """Merging gathers what the groups know in a few channels; evolution turns it into a gate for the bottleneck map.

    The gate has the full spatial resolution. Batch normalisation comes before the sigmoid.
    """

    def __init__(self, channels: int, narrow_channels: int, stride: int) -> None:
        super().__init__()
        self.merge = conv_bn_relu(channels, narrow_channels, 1)
        self.evolve = nn.Sequential(
            *conv_bn(narrow_channels, narrow_channels, 3, stride),
            nn.ReLU(),
            *conv_bn(narrow_channels, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> gate in (0, 1), [B, C, H/stride, W/stride]."""
        gate: Tensor = self.evolve(self.merge(x))
        return gate


class MEModule(nn.Module):
    """ShuffleNetV1's bottleneck with the side path. With stride 2 the pooled input fills the last channels.

    ``first_groups`` is 1 in the first module of a net, whose input is too narrow to be grouped.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        narrow_channels: int | None,
        groups: int,
        first_groups: int,
        stride: int,
    ) -> None:
        super().__init__()
        bottleneck = out_channels // 4
        expanded = out_channels if stride == 1 else out_channels - in_channels
        refuse_uneven_groups((in_channels,), first_groups)
        refuse_uneven_groups((bottleneck, expanded), groups)
        self.groups = groups
        self.compress = nn.Sequential(*conv_bn(in_channels, bottleneck, 1, groups=first_groups), nn.ReLU())
        self.side = None if narrow_channels is None else SidePath(bottleneck, narrow_channels, stride)
        self.depthwise = nn.Sequential(*depthwise_bn(bottleneck, 3, stride))
        self.expand = nn.Sequential(*conv_bn(bottleneck, expanded, 1, groups=groups))
        self.pool = None if stride == 1 else nn.AvgPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]."""
        shuffled = channel_shuffle(self.compress(x), self.groups)
        bottleneck = self.depthwise(shuffled)
        if self.side is not None:
            bottleneck = bottleneck * self.side(shuffled)
        expanded = self.expand(bottleneck)
        joined = expanded + x if self.pool is None else torch.cat((expanded, self.pool(x)), dim=1)
        return torch.relu(joined)


def refuse_uneven_groups(channels: tuple[int, ...], groups: int) -> None:
    """ConfigurationError where ``groups`` does not divide every one of ``channels``."""
    uneven = [count for count in channels if count < 1 or groups < 1 or count % groups]
    if uneven:
        raise ConfigurationError(
            f"{groups} groups do not divide {uneven[0]} channels; choose a number of groups that divides a quarter of "
            "every stage and what a stage adds to its input"
        )


class MENet(Backbone):
    """Stem, max pool, three stages of ME modules, pooled classifier."""

    config_type = MENetConfig
    variants: ClassVar[Mapping[str, MENetConfig]] = {
        "menet_108_8x1_g3": MENetConfig(108, 8, groups=3, stem_channels=12),
        "menet_128_8x1_g4": MENetConfig(128, 8, groups=4, stem_channels=12),
        "menet_160_8x1_g8": MENetConfig(160, 8, groups=8, stem_channels=16),
        "menet_228_12x1_g3": MENetConfig(228, 12, groups=3),
        "menet_256_12x1_g4": MENetConfig(256, 12, groups=4),
        "menet_352_12x1_g8": MENetConfig(352, 12, groups=8),
        "menet_348_12x1_g3": MENetConfig(348, 12, groups=3),
        "menet_456_24x1_g3": MENetConfig(456, 24, groups=3, stem_channels=48),
        # Ours: without the side path and as much wider as that costs, the control for what the path is worth.
        "menet_120_0x1_g3": MENetConfig(120, None, groups=3, stem_channels=12),
    }

    def __init__(self, config: MENetConfig, num_classes: int = 1000) -> None:
        super().__init__(config, num_classes)
        self.stem = conv_bn_relu(3, config.stem_channels, 3, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = nn.ModuleList()
        channels, narrow, groups = config.stem_channels, config.narrow_channels, config.groups
        for out_channels, units in zip(config.stage_channels, STAGE_UNITS, strict=True):
            first_groups = groups if len(self.stages) else 1
            stage = [MEModule(channels, out_channels, narrow, groups, first_groups, stride=2)]
            stage += [MEModule(out_channels, out_channels, narrow, groups, groups, stride=1) for _ in range(units - 1)]
            self.stages.append(nn.Sequential(*stage))
            channels = out_channels
        self.feature_channels = config.stage_channels
        self.head = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation: Kaiming normal over the outputs; for the classifier uniform, with the range it
        has over the authors' 1000 classes (over ten it would be ten times as wide, and the logits too large to train).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        bound = (6 / 1000) ** 0.5
        nn.init.uniform_(self.head.weight, -bound, bound)
        nn.init.zeros_(self.head.bias)

    def stage_maps(self, images: Tensor) -> FeatureMaps:
        """Outputs of the three stages."""
        stride8 = self.stages[0](self.pool(self.stem(images)))
        stride16 = self.stages[1](stride8)
        return stride8, stride16, self.stages[2](stride16)

    def rename_author_key(self, key: str) -> str:
        """``features.init.conv``, ``features.stage_S_N.s_bn_merge`` and so on; both count from one."""
        key = re.sub(r"^features\.stage_(\d+)_(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.{int(m[2]) - 1}.", key)
        for theirs, ours in (
            ("features.init.conv.", "stem.0."),
            ("features.init.bn.", "stem.1."),
            ("classifier.", "head."),
            (".s_merge.", ".side.merge.0."),
            (".s_bn_merge.", ".side.merge.1."),
            (".s_conv.", ".side.evolve.0."),
            (".s_bn_conv.", ".side.evolve.1."),
            (".s_evolve.", ".side.evolve.3."),
            (".s_bn_evolve.", ".side.evolve.4."),
        ):
            key = key.replace(theirs, ours)
        return re.sub(r"\.(bn_)?(compress|depthwise|expand)\.(?!\d)", lambda m: f".{m[2]}.{1 if m[1] else 0}.", key)
