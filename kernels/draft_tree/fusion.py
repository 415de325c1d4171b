"""The fusion of feature and token that begins a drafter, packed."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from torch import Tensor

from kernels.linear_lowbit import PackedWeight
from kernels.native import PackedDescriptor


class FusionDescriptor(ctypes.Structure):
    """`struct Fusion` of csrc/fusion.h."""

    _fields_ = [
        ("feature", PackedDescriptor), ("token", PackedDescriptor), ("gate", PackedDescriptor),
        ("token_norm", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("gated", ctypes.c_int32), ("epsilon", ctypes.c_float),
    ]  # fmt: skip


@dataclass(frozen=True)
class PackedFusion:
    """Made by `gated_fusion` or `linear_fusion`; what the other kind needs is None. Vectors are fp32."""

    feature: PackedWeight
    token: PackedWeight | None = None
    gate: PackedWeight | None = None
    token_norm: Tensor | None = None
    bias: Tensor | None = None
    epsilon: float = 0.0

    @property
    def hidden_size(self) -> int:
        """Width of features, embeddings and the result."""
        return self.feature.out_features

    @functools.cached_property
    def descriptor(self) -> FusionDescriptor:
        """What native code is handed; valid as long as this object lives."""
        absent = PackedDescriptor()
        return FusionDescriptor(
            self.feature.descriptor,
            absent if self.token is None else self.token.descriptor,
            absent if self.gate is None else self.gate.descriptor,
            None if self.token_norm is None else self.token_norm.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            int(self.gate is not None),
            self.epsilon,
        )


def gated_fusion(
    feature: PackedWeight, token: PackedWeight, gate: PackedWeight, token_norm: Tensor, epsilon: float
) -> PackedFusion:
    """z h1 + (1 - z) h2 with h1 = f W1, h2 = SiLU(RMSNorm(e) W2), z = sigmoid([h1; h2] Wz): Dynamic Gating Fusion.

    `feature` W1 and `token` W2 are [H, H], `gate` Wz is [H, 2 H].
    """
    width = feature.out_features
    shapes = [(weight.out_features, weight.in_features) for weight in (feature, token, gate)]
    if shapes != [(width, width), (width, width), (width, 2 * width)] or token_norm.shape != (width,):
        raise ValueError(f"a gated fusion wants [H, H], [H, H], [H, 2 H] and a norm [H], got {shapes}")
    return PackedFusion(feature, token, gate, token_norm.detach().float().contiguous(), epsilon=epsilon)


def linear_fusion(weight: PackedWeight, bias: Tensor) -> PackedFusion:
    """[e; f] W + b with W [H, 2 H]: EAGLE's."""
    if weight.in_features != 2 * weight.out_features or bias.shape != (weight.out_features,):
        raise ValueError(f"a linear fusion wants [H, 2 H], got [{weight.out_features}, {weight.in_features}]")
    return PackedFusion(weight, bias=bias.detach().float().contiguous())
