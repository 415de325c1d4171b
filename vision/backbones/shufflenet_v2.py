"""ShuffleNetV2 (Ma et al., arXiv 1807.11164)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vision.backbones.backbone import Backbone, ConfigurationError, FeatureMaps
from vision.backbones.layers import channel_shuffle, conv_bn, conv_bn_relu, depthwise_bn
from vision.backbones.preprocessing import BGR_255, Normalization

FORMS = ("M", "E")
STAGE_UNITS = (4, 8, 4)


@dataclass(frozen=True)
class ShuffleNetV2Config:
    """Widths of one net. ``final_channels`` None leaves out the 1x1 convolution before the classifier.

    ``form`` says how a downsampling unit shares its output between its branches. "M" (the authors' code): the left
    branch keeps its input channels and the right one fills up; the shuffle is a strided split at the entrance of the
    next unit. "E" (the paper's figure 3): equal halves, shuffled at the end of each unit. They differ in size only
    where a stage does not double its input, that is in the first unit of the first stage.
    """

    stage_channels: tuple[int, int, int]
    final_channels: int | None = 1024
    stem_channels: int = 24
    kernel_size: int = 3
    form: str = "M"
    head_bias: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigurationError(f"form is {self.form!r}; allowed are {', '.join(FORMS)}")
        if any(channels % 4 for channels in self.stage_channels):
            raise ConfigurationError(f"stage_channels are {self.stage_channels}; each must be a multiple of 4")


def right_branch(in_channels: int, out_channels: int, middle: int, kernel_size: int, stride: int) -> nn.Sequential:
    """1x1, depthwise without activation, 1x1."""
    return nn.Sequential(
        *conv_bn(in_channels, middle, 1),
        nn.ReLU(),
        *depthwise_bn(middle, kernel_size, stride),
        *conv_bn(middle, out_channels, 1),
        nn.ReLU(),
    )


class BasicUnit(nn.Module):
    """Stride 1 (figure 3c): half of the channels pass, the other half goes through the right branch. No addition."""

    def __init__(self, channels: int, kernel_size: int, form: str) -> None:
        super().__init__()
        half = channels // 2
        self.form = form
        self.right = right_branch(half, half, half, kernel_size, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        if self.form == "M":
            return torch.cat((x[:, 0::2], self.right(x[:, 1::2])), dim=1)
        passing, worked = x.chunk(2, dim=1)
        return channel_shuffle(torch.cat((passing, self.right(worked)), dim=1), 2)


class DownsamplingUnit(nn.Module):
    """Stride 2 (figure 3d): both branches see every input channel."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, form: str) -> None:
        super().__init__()
        middle = out_channels // 2
        left_channels = in_channels if form == "M" else middle
        if left_channels >= out_channels:
            raise ConfigurationError(f"a downsampling unit cannot go from {in_channels} to {out_channels} channels")
        self.form = form
        self.right = right_branch(in_channels, out_channels - left_channels, middle, kernel_size, stride=2)
        self.left = nn.Sequential(
            *depthwise_bn(in_channels, kernel_size, stride=2), *conv_bn(in_channels, left_channels, 1), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/2, W/2]."""
        joined = torch.cat((self.left(x), self.right(x)), dim=1)
        return joined if self.form == "M" else channel_shuffle(joined, 2)


class ShuffleNetV2(Backbone):
    """Stem, max pool, three stages of units, an optional last 1x1 convolution, pooled classifier."""

    config_type = ShuffleNetV2Config
    author_normalization: ClassVar[Normalization] = BGR_255
    variants: ClassVar[Mapping[str, ShuffleNetV2Config]] = {
        "shufflenet_v2_x0_5": ShuffleNetV2Config((48, 96, 192)),
        "shufflenet_v2_x1_0": ShuffleNetV2Config((116, 232, 464)),
        "shufflenet_v2_x1_5": ShuffleNetV2Config((176, 352, 704)),
        "shufflenet_v2_x2_0": ShuffleNetV2Config((244, 488, 976), final_channels=2048, dropout=0.2),
    }

    def __init__(self, config: ShuffleNetV2Config, num_classes: int = 1000) -> None:
        super().__init__(config, num_classes)
        self.stem = conv_bn_relu(3, config.stem_channels, 3, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = nn.ModuleList()
        channels = config.stem_channels
        for out_channels, units in zip(config.stage_channels, STAGE_UNITS, strict=True):
            stage: list[nn.Module] = [DownsamplingUnit(channels, out_channels, config.kernel_size, config.form)]
            stage += [BasicUnit(out_channels, config.kernel_size, config.form) for _ in range(units - 1)]
            self.stages.append(nn.Sequential(*stage))
            channels = out_channels
        self.final: nn.Module = nn.Identity()
        if config.final_channels is not None:
            self.final = conv_bn_relu(channels, config.final_channels, 1)
            channels = config.final_channels
        self.feature_channels = (*config.stage_channels[:2], channels)
        self.head = nn.Linear(channels, num_classes, bias=config.head_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation: normal with deviation 1 over the inputs of a group, 0.01 in stem and head."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 1.0 / module.weight.shape[1])
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, 1e-4)
        for weight in (self.stem[0].weight, self.head.weight):
            nn.init.normal_(weight, 0.0, 0.01)  # type: ignore[arg-type]  # indexing a Sequential forgets the layer's type
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)

    def stage_maps(self, images: Tensor) -> FeatureMaps:
        """Outputs of the first two stages and of the last convolution (or the last stage where there is none)."""
        stride8 = self.stages[0](self.pool(self.stem(images)))
        stride16 = self.stages[1](stride8)
        return stride8, stride16, self.final(self.stages[2](stride16))

    def rename_author_key(self, key: str) -> str:
        """Both layouts of the authors: ``features.N.branch_main`` (ShuffleNetV2) and ``stage.S.N.branch`` (SNet)."""
        if flat := re.match(r"features\.(\d+)\.", key):
            index, stage = int(flat[1]), 0
            while index >= STAGE_UNITS[stage] and stage + 1 < len(STAGE_UNITS):
                index, stage = index - STAGE_UNITS[stage], stage + 1
            key = f"stages.{stage}.{index}.{key[flat.end() :]}"
        for pattern, ours in (
            (r"^first_conv\.", "stem."),
            (r"^stage\.", "stages."),
            (r"^conv_last\.", "final."),
            (r"^classifier\.0\.", "head."),
            (r"\.branch_(left|proj)\.", ".left."),
            (r"\.branch(_main)?\.", ".right."),
        ):
            key = re.sub(pattern, ours, key)
        return key
