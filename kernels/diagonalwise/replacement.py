"""Swap the depthwise layers of a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from kernels.diagonalwise.layer import (
    DepthwiseConv2d,
    DiagonalwiseConv2d,
    MaskedDiagonalwiseConv2d,
    geometry,
    is_depthwise,
)

Model = TypeVar("Model", bound=nn.Module)


def refactorize(model: Model, channels_per_group: int | None = None) -> Model:
    """Replace every depthwise convolution below ``model`` by a ``DiagonalwiseConv2d``, always, and return the model.

    The parameters are shared, so state dicts and optimisers stay valid. Whether it pays is another question, which
    ``tune`` answers by measuring. A layer that was replaced before takes the new ``channels_per_group``.
    """
    return replace_layers(
        model, lambda layer: DiagonalwiseConv2d.replacing(native(layer), channels_per_group=channels_per_group)
    )


def restore(model: Model) -> Model:
    """The inverse of ``refactorize``: every depthwise layer below ``model`` becomes a plain ``nn.Conv2d`` again."""
    return replace_layers(model, native)


def replace_layers(model: Model, replace: Callable[[nn.Conv2d], nn.Conv2d]) -> Model:
    """Put ``replace(layer)`` in the place of every depthwise layer below ``model``, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if is_depthwise(child):
                setattr(module, name, replace(child))  # type: ignore[arg-type]  # is_depthwise has checked the type
    return model


def native(layer: nn.Conv2d) -> nn.Conv2d:
    """A plain ``nn.Conv2d`` over the parameters of ``layer``; a plain layer is returned as it is."""
    if not isinstance(layer, DepthwiseConv2d):
        return layer
    with torch.device("meta"):
        new = nn.Conv2d(layer.in_channels, layer.out_channels, groups=layer.groups, **geometry(layer))
    new.weight = layer.compact() if isinstance(layer, MaskedDiagonalwiseConv2d) else layer.weight
    new.bias = layer.bias
    return new.train(layer.training)
