"""Linear layers on packed weights: the native kernels, or the reference where they are not built."""

import ctypes

import torch
from torch import Tensor

from kernels.linear_lowbit import reference
from kernels.linear_lowbit.packed import PackedWeight, unpack
from kernels.linear_lowbit.reference import QuantisedWeight
from kernels.native import library


def linear(x: Tensor, packed: PackedWeight) -> Tensor:
    """x [..., in_features] times the packed weight: [..., out_features] in x's dtype.

    Every row's result is the same bit for bit whatever the number of rows and whatever stands beside it. A row with
    NaN or infinity gives NaN for all its outputs on 4 and 8 bits. Raises ValueError for another width, dtype or device.
    """
    if x.shape[-1] != packed.in_features:
        raise ValueError(f"the weight takes {packed.in_features} input features, got x of shape {list(x.shape)}")
    if not x.is_floating_point() or x.device.type != "cpu":
        raise ValueError(f"x must be a floating-point tensor on the CPU, got {x.dtype} on {x.device}")
    rows = x.detach().reshape(-1, packed.in_features).to(torch.float32).contiguous()
    out = _reference(rows, packed) if library() is None else _native(rows, packed)
    return out.to(x.dtype).reshape(*x.shape[:-1], packed.out_features)


def _native(rows: Tensor, packed: PackedWeight) -> Tensor:
    native = library()
    assert native is not None
    out = torch.empty(len(rows), packed.out_features)
    native.dovetail_linear(ctypes.byref(packed.descriptor), rows.data_ptr(), len(rows), out.data_ptr())
    return out


def _reference(rows: Tensor, packed: PackedWeight) -> Tensor:
    weight = unpack(packed)
    if isinstance(weight, QuantisedWeight):
        return reference.linear_integer(rows, weight)
    return reference.linear_float(rows, weight)
