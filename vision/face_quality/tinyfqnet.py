"""tinyFQnet: one aligned face in, one number out (Peng et al., arXiv 2106.04852).

The paper's layer table was not at hand. This network is ours; it matches the published size of 21.8 thousand
parameters.
"""

from __future__ import annotations

from torch import Tensor, nn

# Expansion of the width inside a block, its output width, its stride; None expands nothing.
BLOCKS: tuple[tuple[int | None, int, int], ...] = ((None, 12, 1), (3, 20, 2), (3, 32, 2), (3, 32, 1), (3, 40, 2))
STEM_WIDTH = 8


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; added to its input where neither size nor width changes.

    Batch norm after each convolution, ReLU after the first two (Sandler et al., arXiv 1801.04381).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int | None) -> None:
        super().__init__()
        width = in_channels * (expansion or 1)
        expand = [] if expansion is None else [*_normalized(nn.Conv2d(in_channels, width, 1, bias=False)), nn.ReLU()]
        self.layers = nn.Sequential(
            *expand,
            *_normalized(nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)),
            nn.ReLU(),
            *_normalized(nn.Conv2d(width, out_channels, 1, bias=False)),
        )
        self.keeps_shape = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] to [N, out, H / stride, W / stride]."""
        y: Tensor = self.layers(x)
        return x + y if self.keeps_shape else y


class TinyFQNet(nn.Module):
    """Recognition utility of aligned RGB faces, 0 to 1, higher is better; 21,801 parameters, 7.0 MMAC at 112 pixels.

    Images are [N, 3, 112, 112], (x / 255 - 0.5) / 0.5, aligned by ``align_face``; other sizes run. The score compares
    only with scores of the same weights and alignment. ``width`` multiplies every layer's channels: a wider scorer
    to learn from.
    """

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width is {width}; it must be at least 1")
        self.width = width
        channels = width * STEM_WIDTH
        layers: list[nn.Module] = [*_normalized(nn.Conv2d(3, channels, 3, 2, padding=1, bias=False)), nn.ReLU()]
        for expansion, block_width, stride in BLOCKS:
            layers.append(InvertedResidual(channels, width * block_width, stride, expansion))
            channels = width * block_width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, 1)

    def logits(self, images: Tensor) -> Tensor:
        """The score before the sigmoid [N], for losses that take logits."""
        pooled = self.features(images).mean(dim=(2, 3))
        logits: Tensor = self.head(pooled).squeeze(1)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Scores [N]."""
        return self.logits(images).sigmoid()


def normalize_faces(images: Tensor) -> Tensor:
    """RGB faces in [0, 1] to the network's range -1 to 1."""
    return (images - 0.5) / 0.5


def _normalized(convolution: nn.Conv2d) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return convolution, nn.BatchNorm2d(convolution.out_channels)
