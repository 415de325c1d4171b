"""What a detector asks of a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from vision.backbones.backbone import Backbone as Classifier


class Backbone(Protocol):
    """An ``nn.Module`` with maps at strides 8, 16 and 32."""

    @property
    def feature_channels(self) -> Sequence[int]:
        """Channels of the three maps."""
        ...

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [N, 3, H, W] to maps [N, feature_channels[i], H / stride, W / stride], sides rounded up."""
        ...


def without_classifier(backbone: Backbone) -> Backbone:
    """``backbone`` after taking off, in place, the classifier it was trained with, which no detector runs.

    Left in, it would be saved and counted, and a run on several processes would wait for its gradient.
    """
    if isinstance(backbone, Classifier) and hasattr(backbone, "head"):
        del backbone.head
    return backbone
