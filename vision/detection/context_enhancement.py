"""Context enhancement: one map from three scales (ThunderNet, arXiv 1903.11752, section 3.2, figure 4)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class ContextEnhancement(nn.Module):
    """F_cem = W4 C4 + up(W5 C5) + broadcast(Wg mean(C5)): a local, a wider and a global view of one cell.

    ``c4`` [N, c4_channels, H, W] at stride 16 and ``c5`` at stride 32 give [N, channels, H, W]. The three W are 1x1
    convolutions with bias; nothing is activated, neither before nor after the sum. C5 is enlarged to the exact size of
    C4 by its nearest cell, since at sides like 240 the sizes are 15 and 8 and a factor of 2 would not fit. Without
    ``surroundings`` F_cem = W4 C4, no enhancement at all.
    """

    def __init__(self, c4_channels: int, c5_channels: int, channels: int = 245, *, surroundings: bool = True) -> None:
        super().__init__()
        self.surroundings = surroundings
        self.local_view = nn.Conv2d(c4_channels, channels, 1)
        if not surroundings:
            initialise(self.local_view)
            return
        self.wide_view = nn.Conv2d(c5_channels, channels, 1)
        self.global_view = nn.Conv2d(c5_channels, channels, 1)
        for convolution in (self.local_view, self.wide_view, self.global_view):
            initialise(convolution)

    def forward(self, c4: Tensor, c5: Tensor) -> Tensor:
        """F_cem, at the size of ``c4``."""
        local: Tensor = self.local_view(c4)
        if not self.surroundings:
            return local
        wide = functional.interpolate(self.wide_view(c5), size=c4.shape[-2:], mode="nearest")
        whole_image = self.global_view(c5.mean(dim=(2, 3), keepdim=True))
        enhanced: Tensor = local + wide + whole_image
        return enhanced


def initialise(convolution: nn.Conv2d) -> None:
    """The authors' beginning."""
    nn.init.xavier_uniform_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
