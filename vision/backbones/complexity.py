"""Sizes of networks: parameters and multiply-accumulates."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Complexity:
    """``parameters`` are the trainable ones; ``conv_macs`` and ``linear_macs`` are for one image."""

    parameters: int
    conv_macs: int
    linear_macs: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all convolutions and linear layers."""
        return self.conv_macs + self.linear_macs


def layer_macs(layer: nn.Module, output: Tensor) -> int:
    """Multiply-accumulates behind one ``output`` [1, ...] of a convolution or linear layer."""
    if isinstance(layer, nn.Conv2d):
        return output.numel() * layer.weight[0].numel()
    if isinstance(layer, nn.Linear):
        return output.numel() * layer.in_features
    return 0


def count(model: nn.Module, height: int = 224, width: int | None = None) -> Complexity:
    """Count ``model`` for one image of ``height`` x ``width`` (square by default) without computing anything.

    Batch normalisation, activations, pooling and additions are not multiply-accumulates of a layer and count nothing.
    """
    meta = copy.deepcopy(model).to("meta").eval()
    totals = {nn.Conv2d: 0, nn.Linear: 0}

    def add(layer: nn.Module, _: Any, output: Tensor) -> None:
        kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
        totals[kind] += layer_macs(layer, output)

    for layer in meta.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(add)
    with torch.no_grad():
        meta(torch.empty(1, 3, height, width or height, device="meta"))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Complexity(parameters, totals[nn.Conv2d], totals[nn.Linear])
