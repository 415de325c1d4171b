"""Layers that take the place of a depthwise ``nn.Conv2d``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.diagonalwise.reference import compact_weight, diagonal_mask, expand_weight

DEFAULT_CHANNELS_PER_GROUP = 32


class NotDepthwiseError(ValueError):
    """The layer is not a depthwise convolution this package can replace."""


def is_depthwise(layer: nn.Module) -> bool:
    """Whether ``layer`` is a convolution with one filter for each channel, over several pixels, padded by zeros."""
    return (
        isinstance(layer, nn.Conv2d)
        and layer.groups == layer.in_channels == layer.out_channels > 1
        and max(layer.kernel_size) > 1
        and layer.padding_mode == "zeros"
    )


def geometry(layer: nn.Conv2d) -> dict[str, Any]:
    """The arguments, beside the channels, that make another layer like ``layer``."""
    names = ("kernel_size", "stride", "padding", "dilation")
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


def default_channels_per_group(channels: int) -> int:
    """The largest divisor of ``channels`` up to 32.

    The authors take 32 itself, which fails where it does not divide; the divisor is this project's choice.
    """
    return max(m for m in range(1, min(channels, DEFAULT_CHANNELS_PER_GROUP) + 1) if channels % m == 0)


class DepthwiseConv2d(nn.Conv2d):
    """Base of the replacements: the parameters, state dict and meaning of a depthwise ``nn.Conv2d``.

    ``replacing`` shares the parameters of the layer it is given, so optimisers that hold them stay valid.
    """

    def __init__(
        self, channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1, bias: bool = True
    ) -> None:
        super().__init__(channels, channels, kernel_size, stride, padding, dilation, groups=channels, bias=bias)

    @classmethod
    def replacing(cls, layer: nn.Conv2d, **options: Any) -> DepthwiseConv2d:
        """This kind of layer over the parameters of ``layer``. Errors: NotDepthwiseError."""
        if not is_depthwise(layer):
            raise NotDepthwiseError(
                f"{layer} is not depthwise: groups, in_channels and out_channels must be equal and above 1, the kernel "
                "larger than 1x1 and the padding by zeros"
            )
        with torch.device("meta"):
            new = cls(layer.out_channels, **geometry(layer), **options)
        new.adopt(layer)
        return new.train(layer.training)

    def adopt(self, layer: nn.Conv2d) -> None:
        """Take over the parameters of ``layer``."""
        self.weight, self.bias = layer.weight, layer.bias


class DiagonalwiseConv2d(DepthwiseConv2d):
    """A depthwise convolution computed as a grouped one with diagonal groups (arXiv 1803.09926).

    The parameters stay compact; each forward pass lays them on the diagonals. ``channels_per_group`` m trades
    arithmetic (m times the depthwise layer's) for larger matrix products; None takes ``default_channels_per_group``.
    Where m does not divide the channels they are padded with zeros up to the next multiple.
    """

    def __init__(self, *args: Any, channels_per_group: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if channels_per_group is None:
            channels_per_group = default_channels_per_group(self.in_channels)
        if channels_per_group < 1:
            raise ValueError(f"channels_per_group is {channels_per_group}; it must be at least 1")
        self.channels_per_group = min(channels_per_group, self.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> what the depthwise ``nn.Conv2d`` returns."""
        m = self.channels_per_group
        missing = -self.in_channels % m
        weight = self.weight
        if missing:
            x = F.pad(x, (0, 0, 0, 0, 0, missing))
            weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing))
        groups = weight.shape[0] // m
        y = F.conv2d(x, expand_weight(weight, m), None, self.stride, self.padding, self.dilation, groups)
        y = y[:, : self.out_channels] if missing else y
        return y if self.bias is None else y + self.bias[:, None, None]

    def extra_repr(self) -> str:
        """As nn.Conv2d, with the group width."""
        inherited: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{inherited}, channels_per_group={self.channels_per_group}"


class MaskedDiagonalwiseConv2d(DepthwiseConv2d):
    """The authors' own form: the grouped weight [C, m, k, k] is the parameter, masked in every forward pass.

    Kept to compare with; it stores m times the parameters and the optimiser's state. The mask must be applied each
    time: off-diagonal gradients are otherwise not zero, and the layer turns into a grouped convolution at the first
    step. The state dict holds the compact weight, as every depthwise layer's does. m must divide the channels.
    """

    def __init__(self, *args: Any, channels_per_group: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        m = default_channels_per_group(self.in_channels) if channels_per_group is None else channels_per_group
        if m < 1 or self.in_channels % m:
            raise ValueError(f"channels_per_group is {m}; it must divide the {self.in_channels} channels")
        self.channels_per_group = m
        self.register_buffer("mask", diagonal_mask(self.in_channels, m), persistent=False)
        self.weight = nn.Parameter(expand_weight(self.weight.detach(), m))

    def adopt(self, layer: nn.Conv2d) -> None:
        """Copy the filters; this form cannot share them."""
        self.weight = nn.Parameter(expand_weight(layer.weight.detach(), self.channels_per_group))
        self.bias = layer.bias
        self.mask = diagonal_mask(self.in_channels, self.channels_per_group).to(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> what the depthwise ``nn.Conv2d`` returns."""
        groups = self.in_channels // self.channels_per_group
        weight = self.weight * self.mask
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, groups)

    def compact(self) -> nn.Parameter:
        """The filters [C, 1, k, k] as a parameter of their own."""
        return nn.Parameter(compact_weight(self.weight.detach()), requires_grad=self.weight.requires_grad)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = compact_weight(destination[prefix + "weight"])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key = prefix + "weight"
        kept = state_dict.get(key)
        if kept is not None and kept.shape == (self.out_channels, 1, *self.kernel_size):
            state_dict[key] = expand_weight(kept, self.channels_per_group)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if kept is not None:
            state_dict[key] = kept
