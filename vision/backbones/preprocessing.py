"""What must happen to an image before a network sees it; part of a checkpoint, since weights are useless without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CHANNEL_ORDERS = ("rgb", "bgr")


@dataclass(frozen=True)
class Normalization:
    """``(x - mean) / std`` for each channel of an image in [0, 1]; both are given in ``channel_order``."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    channel_order: str = "rgb"

    def __post_init__(self) -> None:
        if self.channel_order not in CHANNEL_ORDERS:
            raise ValueError(f"channel_order is {self.channel_order!r}; allowed are {', '.join(CHANNEL_ORDERS)}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} must hold three numbers each, std above 0")

    def __call__(self, images: Tensor) -> Tensor:
        """RGB ``images`` [..., 3, H, W] in [0, 1] -> what the network takes, same shape and dtype."""
        if self.channel_order == "bgr":
            images = images.flip(-3)
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device)[:, None, None]
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device)[:, None, None]
        return (images - mean) / std


IMAGENET = Normalization()
BGR_255 = Normalization(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255), channel_order="bgr")
"""Raw 0 to 255 in BGR: how the authors trained SNet and ShuffleNetV2."""

NORMALIZATIONS: dict[str, Normalization] = {"imagenet": IMAGENET, "bgr_255": BGR_255}


@dataclass(frozen=True)
class Preprocessing:
    """Test-time preprocessing: the short side to ``resize`` pixels, a centre crop of ``image_size``, normalisation."""

    image_size: int = 224
    resize: int = 256
    normalization: Normalization = field(default=IMAGENET)

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= self.resize:
            raise ValueError(f"image_size {self.image_size} must be at least 1 and at most resize {self.resize}")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Preprocessing:
        """Rebuild from ``dataclasses.asdict`` after a trip through JSON."""
        constants = values["normalization"]
        return cls(
            image_size=values["image_size"],
            resize=values["resize"],
            normalization=Normalization(
                mean=tuple(constants["mean"]), std=tuple(constants["std"]), channel_order=constants["channel_order"]
            ),
        )
