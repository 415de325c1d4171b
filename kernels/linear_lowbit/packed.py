"""The packed weight format: codes and scales in the order in which the native kernels stream them.

One format for every machine (csrc/layout.h describes the bytes): a panel of 32 output rows is one contiguous run.
"""

import ctypes
import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear_lowbit import reference
from kernels.linear_lowbit.reference import QuantisedWeight
from kernels.native import PackedDescriptor

FORMAT_VERSION = 2  # of the bytes below; stored in checkpoints and checked when they are read
GROUP_SIZES = (16, 32, 64, 128)
_PANEL, _CHUNK = 32, 32
_ROWS_AT_ONCE = 4096
_NUMBERS_AT_ONCE = 2**21  # of a matrix that is made whole again
_SYMMETRIC, _MINIMUM, _TABLE = range(3)  # `Kind` of csrc/layout.h
_FLOAT_DTYPES = {16: torch.bfloat16, 32: torch.float32}


@dataclass(frozen=True)
class PackedWeight:
    """One weight matrix [out_features, in_features], packed. `bits`: 4, 8, 16 (bf16) or 32 (fp32).

    `group_size` inputs share a scale (unused for 16 and 32 bits); `zero_point`: each group also stores a minimum;
    `wide_scales`: scales and minima are fp32, not fp16; `table`: what the sixteen 4-bit codes stand for before their
    scale, signed bytes.
    """

    data: Tensor  # uint8 [bytes]
    out_features: int
    in_features: int
    bits: int
    group_size: int
    zero_point: bool = False
    wide_scales: bool = False
    table: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_format(self.in_features, self.bits, self.group_size)
        if self.table is not None:
            check_table(self.table, self.bits, self.zero_point)
        expected = packed_bytes(
            self.out_features, self.in_features, self.bits, self.group_size, self.zero_point, self.wide_scales
        )
        if self.data.dtype != torch.uint8 or self.data.shape != (expected,) or not self.data.is_contiguous():
            raise ValueError(
                f"packed data must be {expected} contiguous bytes for a {self.bits}-bit weight "
                f"[{self.out_features}, {self.in_features}], got {self.data.dtype} {list(self.data.shape)}"
            )

    @functools.cached_property
    def descriptor(self) -> PackedDescriptor:
        """What native code is handed; valid as long as this object lives."""
        kind = _TABLE if self.table is not None else _MINIMUM if self.zero_point else _SYMMETRIC
        return PackedDescriptor(
            self.data.data_ptr(), self.out_features, self.in_features, self.bits, self.group_size, kind,
            4 if self.wide_scales else 2, (ctypes.c_int8 * 16)(*(self.table or ())),
        )  # fmt: skip


def check_format(in_features: int, bits: int, group_size: int) -> None:
    """Refuses what the kernels do not read."""
    if bits not in (4, 8, 16, 32):
        raise ValueError(f"bits must be 4, 8, 16 (bf16) or 32 (fp32), got {bits}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {group_size}")
    if bits <= 8 and in_features % max(group_size, _CHUNK):
        fitting = [size for size in GROUP_SIZES if in_features % max(size, _CHUNK) == 0]
        advice = f"take {' or '.join(map(str, fitting))}" if fitting else "keep this layer in bf16 (bits=16)"
        raise ValueError(f"{in_features} input features do not divide into groups of {group_size}: {advice}")


def check_table(table: tuple[int, ...], bits: int, zero_point: bool) -> None:
    """Refuses a table that the kernels do not read."""
    if bits != 4 or zero_point:
        raise ValueError(f"a table is for 4-bit codes without minima, got {bits} bits, zero_point={zero_point}")
    if len(table) != 16 or not all(-128 <= entry <= 127 for entry in table):
        raise ValueError(f"a table has sixteen entries from -128 to 127, got {list(table)}")


def packed_bytes(
    out_features: int, in_features: int, bits: int, group_size: int, zero_point: bool, wide_scales: bool = False
) -> int:
    """Size of the packed weight in bytes."""
    panels = -(-out_features // _PANEL)
    if bits > 8:
        return panels * _PANEL * -(-in_features // _CHUNK) * _CHUNK * bits // 8
    return (
        panels
        * _PANEL
        * (in_features * bits // 8 + in_features // group_size * (4 if wide_scales else 2) * (1 + zero_point))
    )


class DamagedWeight(ValueError):
    """A weight holds NaN or infinity: what it was read from is damaged."""


def pack(
    weight: Tensor, bits: int, group_size: int = 32, *, zero_point: bool = False, importance: Tensor | None = None
) -> PackedWeight:
    """Packs weight [out_features, in_features] once, at load.

    bits 4 and 8 quantise with the least squared error (see `reference.quantise`); 16 keeps bf16, 32 keeps fp32.
    Raises ValueError for a shape or value that has no packed form.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"a weight must be a floating-point matrix, got {weight.dtype} {list(weight.shape)}")
    check_format(weight.shape[1], bits, group_size)
    if importance is not None and importance.shape != weight.shape[1:]:
        raise ValueError(f"importance must have one value per input, {weight.shape[1]}, got {list(importance.shape)}")
    if not weight.isfinite().all():
        raise DamagedWeight("a weight holds NaN or infinity")
    if bits > 8:
        return _pack_float(weight, bits, group_size)
    if weight.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError("weights beyond 65504 do not fit fp16 scales: keep this layer in bf16 (bits=16)")
    return pack_quantised(reference.quantise(weight, bits, group_size, zero_point=zero_point, importance=importance))


def _pad_rows(rows: Tensor) -> Tensor:
    missing = -len(rows) % _PANEL
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def pack_quantised(weight: QuantisedWeight) -> PackedWeight:
    """Orders codes and scales as csrc/layout.h says. Raises ValueError for what has no packed form."""
    out_features, in_features = weight.codes.shape
    if weight.scale.dtype not in (torch.float16, torch.float32):
        raise ValueError(f"scales must be fp16 or fp32, got {weight.scale.dtype}")
    if weight.minimum is not None and weight.minimum.dtype != weight.scale.dtype:
        raise ValueError(f"minima must have the scales' type {weight.scale.dtype}, got {weight.minimum.dtype}")
    check_format(in_features, weight.bits, weight.group_size)
    scales = [weight.scale] if weight.minimum is None else [weight.scale, weight.minimum]
    num_groups = in_features // weight.group_size
    code_bytes = _PANEL * weight.group_size * weight.bits // 8
    group_bytes = code_bytes + len(scales) * _PANEL * weight.scale.element_size()
    panels = torch.empty(-(-out_features // _PANEL), num_groups, group_bytes, dtype=torch.uint8)
    for begin in range(0, out_features, _ROWS_AT_ONCE):  # an LM head in one piece would need its size three times
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        part = panels[begin // _PANEL : (begin + _ROWS_AT_ONCE) // _PANEL]
        _order_codes(_pad_rows(weight.codes[rows]), weight.bits, part[:, :, :code_bytes])
        for kept, place in zip(scales, part[:, :, code_bytes:].chunk(len(scales), dim=2), strict=True):
            place.view(kept.dtype).copy_(_pad_rows(kept[rows]).reshape(-1, _PANEL, num_groups).transpose(1, 2))
    return PackedWeight(
        panels.flatten(), out_features, in_features, weight.bits, weight.group_size, weight.minimum is not None,
        weight.scale.dtype == torch.float32, weight.table,
    )  # fmt: skip


def _order_codes(codes: Tensor, bits: int, place: Tensor) -> None:
    """Codes [rows, in_features] of one byte each into ``place`` [panels, groups, bytes of a group's codes]."""
    quads = codes.contiguous().view(torch.int32)
    if bits == 4:
        pairs = quads.reshape(len(quads), -1, 2)
        quads = pairs[:, :, 0] | pairs[:, :, 1] << 4  # below 16 in each byte, so nothing crosses into the next
    ordered = quads.reshape(-1, _PANEL, place.shape[1], place.shape[2] // _PANEL // 4).permute(0, 2, 3, 1)
    place.view(torch.int32).view(ordered.shape).copy_(ordered)


def _pack_float(weight: Tensor, bits: int, group_size: int) -> PackedWeight:
    out_features, in_features = weight.shape
    columns_together = 32 // bits
    padded = torch.nn.functional.pad(_pad_rows(weight.detach().to(_FLOAT_DTYPES[bits])), (0, -in_features % _CHUNK))
    ordered = padded.reshape(-1, _PANEL, padded.shape[1] // columns_together, columns_together).transpose(1, 2)
    return PackedWeight(ordered.contiguous().view(torch.uint8).flatten(), out_features, in_features, bits, group_size)


def unpack(packed: PackedWeight) -> QuantisedWeight | Tensor:
    """The inverse of packing: codes and scales for 4 and 8 bits, the matrix for bf16 and fp32."""
    panels = -(-packed.out_features // _PANEL)
    if packed.bits > 8:
        together = 32 // packed.bits
        columns = -(-packed.in_features // _CHUNK) * _CHUNK
        values = packed.data.view(_FLOAT_DTYPES[packed.bits]).reshape(panels, columns // together, _PANEL, together)
        return (
            values.transpose(1, 2)
            .reshape(panels * _PANEL, columns)[: packed.out_features, : packed.in_features]
            .contiguous()
        )
    num_groups = packed.in_features // packed.group_size
    code_bytes = _PANEL * packed.group_size * packed.bits // 8
    groups = packed.data.reshape(panels, num_groups, -1)
    quads = groups[:, :, :code_bytes].reshape(panels, num_groups, -1, _PANEL, 4).permute(0, 3, 1, 2, 4)
    codes = quads.reshape(panels * _PANEL, -1, 4)
    if packed.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=2)
    codes = codes.reshape(panels * _PANEL, -1)[: packed.out_features]
    dtype = torch.float32 if packed.wide_scales else torch.float16
    scale_bytes = _PANEL * dtype.itemsize
    scales = [
        groups[:, :, start : start + scale_bytes].contiguous().view(dtype).transpose(1, 2).reshape(-1, num_groups)
        for start in range(code_bytes, groups.shape[2], scale_bytes)
    ]
    scales = [scale[: packed.out_features] for scale in scales]
    return QuantisedWeight(
        codes, scales[0], scales[1] if packed.zero_point else None, packed.bits, packed.group_size, packed.table
    )


def dequantise(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [out_features, in_features] that a packed weight stands for, on the device where its bytes lie.

    It is made piece by piece, so that beside it little more is held.
    """
    whole = torch.empty(packed.out_features, packed.in_features, dtype=dtype, device=packed.data.device)
    panel_bytes = packed.data.numel() // -(-packed.out_features // _PANEL)
    panels = max(_NUMBERS_AT_ONCE // packed.in_features // _PANEL, 1)
    for number, data in enumerate(torch.split(packed.data, panels * panel_bytes)):
        rows = whole[number * panels * _PANEL : (number + 1) * panels * _PANEL]
        kept = unpack(dataclasses.replace(packed, data=data, out_features=len(rows)))
        rows.copy_(kept.dequantise() if isinstance(kept, QuantisedWeight) else kept)
    return whole
