"""What every backbone offers: maps at strides 8, 16 and 32, a classifier head, and its preprocessing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from vision.backbones.preprocessing import IMAGENET, Normalization, Preprocessing

FeatureMaps = tuple[Tensor, Tensor, Tensor]


class BackboneError(ValueError):
    """Something about a backbone cannot be done; the subclasses say what."""


class UnknownBackboneError(BackboneError):
    """No backbone of this name."""


class ConfigurationError(BackboneError):
    """A configuration that no network can be built from (groups that do not divide, odd channels)."""


class InputShapeError(BackboneError):
    """Images the network cannot take: not three channels, or smaller than its stride."""


class Backbone(nn.Module, ABC):
    """Base of all families.

    A family sets ``config_type`` and ``variants`` (published name -> configuration), fills ``feature_channels`` and
    ``head``, and implements ``stage_maps``. ``preprocessing`` and ``class_names`` are not parameters, but they are
    saved and loaded with the weights.
    """

    config_type: ClassVar[type[Any]]
    variants: ClassVar[Mapping[str, Any]]
    author_normalization: ClassVar[Normalization] = IMAGENET
    feature_strides: ClassVar[tuple[int, int, int]] = (8, 16, 32)

    feature_channels: tuple[int, int, int]
    head: nn.Linear

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ConfigurationError(f"num_classes is {num_classes}; it must be at least 1")
        self.config = config
        self.preprocessing = Preprocessing()
        self.class_names: tuple[str, ...] = ()
        self.dropout = nn.Dropout(getattr(config, "dropout", 0.0))

    @property
    def num_classes(self) -> int:
        """Width of the classifier."""
        return self.head.out_features

    @property
    def normalization(self) -> Normalization:
        """What the images of ``forward`` must have gone through."""
        return self.preprocessing.normalization

    @property
    def name(self) -> str:
        """The registered name of this configuration, or the class's name with "custom"."""
        found = (name for name, config in self.variants.items() if config == self.config)
        return next(found, f"custom {type(self).__name__}")

    @abstractmethod
    def stage_maps(self, images: Tensor) -> FeatureMaps:
        """The family's own forward pass up to the classifier."""

    @abstractmethod
    def rename_author_key(self, key: str) -> str:
        """The name in this layout of a tensor of the authors' published checkpoint (same shape, same meaning)."""

    def forward_features(self, images: Tensor) -> FeatureMaps:
        """Normalised ``images`` [B, 3, H, W] -> maps [B, ``feature_channels``[i], H/8 | H/16 | H/32, ...], rounded up.

        Errors: InputShapeError for another number of channels, or a side under 32 pixels.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputShapeError(
                f"images have shape {tuple(images.shape)}; expected [batch, 3, height, width] (repeat a grey channel)"
            )
        if min(images.shape[2:]) < self.feature_strides[-1]:
            raise InputShapeError(
                f"images are {images.shape[3]}x{images.shape[2]} pixels; both sides must be at least "
                f"{self.feature_strides[-1]}, the stride of the last map"
            )
        return self.stage_maps(images)

    def embed(self, images: Tensor) -> Tensor:
        """Normalised ``images`` [B, 3, H, W] -> the pooled last map [B, ``feature_channels[-1]``]."""
        return self.forward_features(images)[-1].mean((2, 3))

    def classify(self, embedding: Tensor) -> Tensor:
        """What ``embed`` gives [B, C] -> logits [B, num_classes]."""
        logits: Tensor = self.head(self.dropout(embedding))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Normalised ``images`` [B, 3, H, W] of any size from 32 pixels -> logits [B, num_classes]."""
        return self.classify(self.embed(images))

    def replace_head(self, num_classes: int) -> None:
        """A fresh classifier for another set of classes; the features stay."""
        self.head = nn.Linear(self.head.in_features, num_classes, bias=self.head.bias is not None)
        nn.init.normal_(self.head.weight, 0.0, 0.01)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)
        self.class_names = ()
