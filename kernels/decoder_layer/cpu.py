"""Calls of the native decoder layer: one `LayerPass` for each forward pass, one call for each layer."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernels.decoder_layer.packed import PackedDecoderLayer
from kernels.linear_lowbit import PackedWeight
from kernels.linear_lowbit import linear as packed_linear
from kernels.native import library
from kernels.tree_attention import KVSlots, Segment

_ROWS_TOGETHER = 64  # rows of a causal segment that attend together: bounds their scores, and gives threads pieces

_CACHE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # `CacheFormat` of csrc/attention.h


class _SegmentDescriptor(ctypes.Structure):
    """`struct Segment` of csrc/layer.cpp."""

    _fields_ = [
        ("slot", ctypes.c_int32), ("prefix", ctypes.c_int32), ("num_rows", ctypes.c_int32), ("tail", ctypes.c_int32),
        ("mask", ctypes.c_void_p),
    ]  # fmt: skip


class _PassDescriptor(ctypes.Structure):
    """`struct Pass` of csrc/layer.cpp."""

    _fields_ = [
        ("segments", ctypes.POINTER(_SegmentDescriptor)),
        ("num_segments", ctypes.c_int32), ("num_rows", ctypes.c_int32),
        ("cosine", ctypes.c_void_p), ("sine", ctypes.c_void_p),
        ("capacity", ctypes.c_int64), ("format", ctypes.c_int32),
    ]  # fmt: skip


class _SlotsDescriptor(ctypes.Structure):
    """`struct LayerSlots` of csrc/layer.cpp."""

    _fields_ = [
        ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p), ("value_scales", ctypes.c_void_p),
    ]  # fmt: skip


def _layer_slots(slots: KVSlots) -> list[_SlotsDescriptor]:
    """Where each layer's keys, values and scales lie."""
    stores = (slots.keys, slots.values, slots.key_scales, slots.value_scales)
    starts = [None if store is None else store.data_ptr() for store in stores]
    steps = [0 if store is None else store.stride(0) * store.element_size() for store in stores]
    return [
        _SlotsDescriptor(*(None if at is None else at + layer * step for at, step in zip(starts, steps, strict=True)))
        for layer in range(slots.keys.shape[0])
    ]


class LayerPass:
    """What all layers of one forward pass share: where its rows live, what they see, how they are rotated.

    The rows of `segments` lie behind one another. cosine and sine [rows, head_dim] are those of transformers' rotary
    embedding at the rows' positions. Raises ValueError for shapes or types that native code could not read.
    """

    def __init__(self, slots: KVSlots, segments: Sequence[Segment], cosine: Tensor, sine: Tensor) -> None:
        self.num_rows = sum(segment.num_rows for segment in segments)
        for segment in segments:
            slots.check(segment)
        if slots.keys.dtype not in _CACHE_FORMATS or slots.keys.device.type != "cpu":
            raise ValueError(
                f"KV slots must be fp32, bf16 or int8 on the CPU, got {slots.keys.dtype} on {slots.keys.device}"
            )
        head_dim = slots.keys.shape[-1]
        if cosine.shape != (self.num_rows, head_dim) or sine.shape != cosine.shape:
            raise ValueError(
                f"cosine and sine must be [{self.num_rows}, {head_dim}] for these rows, "
                f"got {list(cosine.shape)} and {list(sine.shape)}"
            )
        self.slots = slots
        self.layer_slots = _layer_slots(slots)
        self._cosine, self._sine = (table.detach().float().contiguous() for table in (cosine, sine))
        pieces = [piece for segment in segments for piece in _pieces(segment)]
        self._masks = [_mask_bytes(piece) for piece in pieces]
        described = [
            _SegmentDescriptor(
                piece.slot, piece.prefix, piece.num_rows, piece.num_keys - piece.prefix,
                None if mask is None else mask.data_ptr(),
            )
            for piece, mask in zip(pieces, self._masks, strict=True)
        ]  # fmt: skip
        self.descriptor = _PassDescriptor(
            (_SegmentDescriptor * len(described))(*described), len(described), self.num_rows,
            self._cosine.data_ptr(), self._sine.data_ptr(), slots.capacity, _CACHE_FORMATS[slots.keys.dtype],
        )  # fmt: skip


def _pieces(segment: Segment) -> Iterator[Segment]:
    """A causal segment in pieces: the earlier rows count as prefix, since all keys are written before any is read."""
    if segment.tail_mask is not None or segment.num_rows <= _ROWS_TOGETHER:
        yield segment
        return
    for first in range(0, segment.num_rows, _ROWS_TOGETHER):
        num_rows = min(_ROWS_TOGETHER, segment.num_rows - first)
        yield Segment(segment.slot, segment.prefix + first, num_rows)


def _mask_bytes(segment: Segment) -> Tensor | None:
    return None if segment.tail_mask is None else segment.tail_mask.to("cpu", torch.uint8).contiguous()


def decoder_layer(hidden: Tensor, layer: PackedDecoderLayer, layer_index: int, row_pass: LayerPass) -> None:
    """Runs one layer on hidden [rows, hidden_size] fp32, in place; the rows' keys and values go to layer `layer_index`.

    Bit-equal rows whatever stands beside them, whatever the tree, the chunking or the prefix. Raises RuntimeError where
    the native kernels are not built (the model's own code is the way then), ValueError for what does not fit.
    """
    native = library()
    if native is None:
        raise RuntimeError("the native decoder layer is not built; run the layer with transformers' own code")
    if hidden.shape != (row_pass.num_rows, layer.qkv.in_features) or hidden.dtype != torch.float32:
        raise ValueError(
            f"hidden must be fp32 [{row_pass.num_rows}, {layer.qkv.in_features}], "
            f"got {hidden.dtype} {list(hidden.shape)}"
        )
    if not hidden.is_contiguous() or hidden.device.type != "cpu":
        raise ValueError("hidden must be contiguous and on the CPU: it is replaced in place")
    slots = row_pass.slots
    if slots.keys.shape[2] != layer.num_kv_heads or slots.keys.shape[4] != layer.head_dim:
        raise ValueError(
            f"the layer has {layer.num_kv_heads} key heads of {layer.head_dim}, the slots hold {slots.keys.shape[2]} "
            f"of {slots.keys.shape[4]}"
        )
    native.dovetail_decoder_layer(
        ctypes.byref(layer.descriptor), ctypes.byref(row_pass.descriptor),
        ctypes.byref(row_pass.layer_slots[layer_index]), hidden.data_ptr(),
    )  # fmt: skip


def head_argmax(features: Tensor, head: PackedWeight) -> tuple[Tensor, Tensor]:
    """The greedy token after each row: features [rows, hidden] -> ids int64 [rows], their logits fp32 [rows].

    Ties go to the smallest id and NaN wins, as in torch.argmax; the logits of other tokens are never stored.
    """
    native = library()
    if native is None:
        logits, ids = packed_linear(features.float(), head).max(dim=-1)
        return ids, logits
    if features.dim() != 2 or features.shape[1] != head.in_features:
        raise ValueError(f"features must be [rows, {head.in_features}], got {list(features.shape)}")
    rows = features.detach().to("cpu", torch.float32).contiguous()
    ids, logits = torch.empty(len(rows), dtype=torch.int64), torch.empty(len(rows))
    native.dovetail_argmax(ctypes.byref(head.descriptor), rows.data_ptr(), len(rows), ids.data_ptr(), logits.data_ptr())
    return ids, logits
