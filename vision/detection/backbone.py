"""What a detector asks of a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Backbone(Protocol):
    """An ``nn.Module`` with maps at strides 8, 16 and 32."""

    @property
    def feature_dims(self) -> Sequence[int]:
        """Channels of the three maps."""
        ...

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [N, 3, H, W] to maps [N, feature_dims[i], H / stride, W / stride], sides rounded up."""
        ...
