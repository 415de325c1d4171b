"""Calls of the native decoder layers: one `LayerPass` for each forward pass, one call for all of its layers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernels.decoder_layer.form import Norm
from kernels.decoder_layer.packed import LayerDescriptor, PackedDecoderLayer
from kernels.linear_lowbit import PackedWeight
from kernels.linear_lowbit import linear as packed_linear
from kernels.native import library
from kernels.tree_attention import KVSlots, Segment

_ROWS_TOGETHER = 64  # rows of a causal segment that attend together: bounds their scores, and gives threads pieces

CACHE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # `CacheFormat` of csrc/attention.h


class _SegmentDescriptor(ctypes.Structure):
    """`struct Segment` of csrc/layer.h."""

    _fields_ = [
        ("slot", ctypes.c_int32), ("prefix", ctypes.c_int32), ("num_rows", ctypes.c_int32), ("tail", ctypes.c_int32),
        ("mask", ctypes.c_void_p),
    ]  # fmt: skip


class _PassDescriptor(ctypes.Structure):
    """`struct Pass` of csrc/layer.h."""

    _fields_ = [
        ("segments", ctypes.POINTER(_SegmentDescriptor)),
        ("num_segments", ctypes.c_int32), ("num_rows", ctypes.c_int32),
        ("positions", ctypes.POINTER(ctypes.c_int32)), ("cosine", ctypes.c_void_p), ("sine", ctypes.c_void_p),
        ("rotary_dim", ctypes.c_int32), ("num_positions", ctypes.c_int32),
        ("capacity", ctypes.c_int64), ("format", ctypes.c_int32),
    ]  # fmt: skip


class SlotsDescriptor(ctypes.Structure):
    """`struct Slots` of csrc/layer.h."""

    _fields_ = [
        ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p), ("value_scales", ctypes.c_void_p),
        ("layer_bytes", ctypes.c_int64), ("layer_scales", ctypes.c_int64),
    ]  # fmt: skip

    @classmethod
    def of(cls, slots: KVSlots, first_layer: int = 0) -> SlotsDescriptor:
        """Where keys, values and scales lie, from one layer on."""
        stores = (slots.keys, slots.values, slots.key_scales, slots.value_scales)
        starts = [
            None if store is None else store.data_ptr() + first_layer * store.stride(0) * store.element_size()
            for store in stores
        ]
        scales = slots.key_scales
        return cls(*starts, slots.keys.stride(0) * slots.keys.element_size(), 0 if scales is None else scales.stride(0))


class LayerStack:
    """Packed layers that run behind one another. All have the same key heads; the rest of their forms may differ."""

    def __init__(self, layers: Sequence[PackedDecoderLayer]) -> None:
        shapes = {(layer.form.num_kv_heads, layer.form.head_dim, layer.qkv[0].in_features) for layer in layers}
        if len(shapes) != 1:
            raise ValueError(f"layers of one stack share (key heads, head size, hidden size), got {sorted(shapes)}")
        self.layers = tuple(layers)
        ((self.num_kv_heads, self.head_dim, self.hidden_size),) = shapes
        self.num_tables = 1 + max(-1 if layer.form.angles is None else layer.form.angles for layer in layers)
        self.descriptors = (LayerDescriptor * len(layers))(*(layer.descriptor for layer in layers))

    def __len__(self) -> int:
        return len(self.layers)


class LayerPass:
    """What all layers of one forward pass share: where its rows live, what they see, how they are rotated.

    The rows of `segments` lie behind one another. cosine and sine [n, d] are those of transformers' rotary embedding,
    which turns the first d values of each head, or [tables, n, d] of several that the layers' forms choose from;
    `positions` names the row of them that turns each row, None: they are given row by row. Raises ValueError for shapes
    or types that native code could not read.
    """

    def __init__(
        self,
        slots: KVSlots,
        segments: Sequence[Segment],
        cosine: Tensor,
        sine: Tensor,
        positions: Sequence[int] | None = None,
    ) -> None:
        self.num_rows = sum(segment.num_rows for segment in segments)
        for segment in segments:
            slots.check(segment)
        if slots.keys.dtype not in CACHE_FORMATS or slots.keys.device.type != "cpu":
            raise ValueError(
                f"KV slots must be fp32, bf16 or int8 on the CPU, got {slots.keys.dtype} on {slots.keys.device}"
            )
        head_dim = slots.keys.shape[-1]
        num_positions, rotary_dim = cosine.shape[-2:] if cosine.dim() in (2, 3) else (0, 0)
        if not 0 < rotary_dim <= head_dim or rotary_dim % 2 or sine.shape != cosine.shape:
            raise ValueError(
                f"cosine and sine must be [n, d] with an even d of at most {head_dim}, or several of them, "
                f"got {list(cosine.shape)} and {list(sine.shape)}"
            )
        positions = range(num_positions) if positions is None else positions
        if len(positions) != self.num_rows or not all(0 <= position < num_positions for position in positions):
            raise ValueError(
                f"{self.num_rows} rows want as many positions below {num_positions}, got {list(positions)}"
            )
        self.slots, self.segments = slots, segments
        self.num_tables = 1 if cosine.dim() == 2 else len(cosine)
        self._cosine, self._sine = cosine.float().contiguous(), sine.float().contiguous()
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
            (ctypes.c_int32 * self.num_rows)(*positions), self._cosine.data_ptr(), self._sine.data_ptr(),
            rotary_dim, num_positions, slots.capacity, CACHE_FORMATS[slots.keys.dtype],
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
    return None if segment.tail_mask is None else segment.tail_mask.cpu().contiguous().view(torch.uint8)


def decoder_layers(
    hidden: Tensor, stack: LayerStack, row_pass: LayerPass, layers: range | None = None, first_slot_layer: int = 0
) -> None:
    """Runs `layers` of a stack (None: all) on hidden [rows, hidden_size] fp32, in place, in one call.

    Layer i keeps the rows' keys and values in layer `first_slot_layer + i` of the slots. Bit-equal rows whatever stands
    beside them, whatever the tree, the chunking or the prefix. Raises RuntimeError where the native kernels are not
    built (the model's own code is the way then), ValueError for what does not fit.
    """
    native = library()
    if native is None:
        raise RuntimeError("the native decoder layers are not built; run the layers with transformers' own code")
    layers = range(len(stack)) if layers is None else layers
    _check_fit(hidden, stack, row_pass, range(first_slot_layer + layers.start, first_slot_layer + layers.stop))
    described = SlotsDescriptor.of(row_pass.slots, first_slot_layer + layers.start)
    first = ctypes.byref(stack.descriptors, layers.start * ctypes.sizeof(LayerDescriptor))
    native.dovetail_decoder_layers(
        first, len(layers), ctypes.byref(row_pass.descriptor), ctypes.byref(described), hidden.data_ptr()
    )


def _check_fit(hidden: Tensor, stack: LayerStack, row_pass: LayerPass, slot_layers: range) -> None:
    """Refuses what native code could not read."""
    if hidden.shape != (row_pass.num_rows, stack.hidden_size) or hidden.dtype != torch.float32:
        raise ValueError(
            f"hidden must be fp32 [{row_pass.num_rows}, {stack.hidden_size}], got {hidden.dtype} {list(hidden.shape)}"
        )
    if not hidden.is_contiguous() or hidden.device.type != "cpu":
        raise ValueError("hidden must be contiguous and on the CPU: it is replaced in place")
    if row_pass.num_tables < stack.num_tables:
        raise ValueError(f"the layers choose from {stack.num_tables} rotary tables, the pass has {row_pass.num_tables}")
    num_layers, _, num_kv_heads, _, head_dim = row_pass.slots.keys.shape
    if (num_kv_heads, head_dim) != (stack.num_kv_heads, stack.head_dim):
        raise ValueError(
            f"the layers have {stack.num_kv_heads} key heads of {stack.head_dim}, the slots hold {num_kv_heads} of "
            f"{head_dim}"
        )
    if slot_layers.start < 0 or slot_layers.stop > num_layers:
        raise ValueError(f"layers {slot_layers.start} to {slot_layers.stop - 1}: the slots hold {num_layers} layers")


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """The norm of x [rows, width] fp32; a row does not depend on those beside it."""
    native = library()
    weight, bias = norm.weight, norm.bias
    if native is None:
        if norm.centred:
            return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, norm.epsilon)
        return torch.nn.functional.rms_norm(x, weight.shape, weight, norm.epsilon)
    if x.dim() != 2 or x.shape[1:] != weight.shape or not x.is_contiguous() or x.dtype != torch.float32:
        raise ValueError(f"x must be contiguous fp32 [rows, {len(weight)}], got {x.dtype} {list(x.shape)}")
    out = torch.empty_like(x)
    native.dovetail_normalise(
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), norm.centred, norm.epsilon,
        len(x), len(weight), out.data_ptr(),
    )  # fmt: skip
    return out


def head_argmax(features: Tensor, head: PackedWeight) -> tuple[Tensor, Tensor]:
    """The greedy token after each row: features [rows, hidden] -> ids int64 [rows], their logits fp32 [rows].

    Ties go to the smallest id and NaN wins, as in torch.argmax; the logits of other tokens are never stored.
    """
    native = library()
    if native is None:
        logits, ids = packed_linear(features.float(), head).max(dim=-1)
        return ids, logits
    rows = _head_input(features, head)
    ids, logits = torch.empty(len(rows), dtype=torch.int64), torch.empty(len(rows))
    native.dovetail_argmax(ctypes.byref(head.descriptor), rows.data_ptr(), len(rows), ids.data_ptr(), logits.data_ptr())
    return ids, logits


def head_top_k(features: Tensor, head: PackedWeight, top_k: int) -> tuple[Tensor, Tensor]:
    """The best next tokens after each row: features [rows, hidden] -> ids int64 and log-probabilities fp32, [rows, k].

    Best first, the smaller id among equals; k is top_k, or the vocabulary where that is smaller. log_probs are those of
    the softmax over the whole vocabulary at temperature 1.
    """
    native = library()
    num_best = min(top_k, head.out_features)
    if native is None:
        log_probs, ids = torch.log_softmax(packed_linear(features.float(), head), dim=-1).topk(num_best)
        return ids, log_probs
    rows = _head_input(features, head)
    ids, log_probs = torch.empty(len(rows), num_best, dtype=torch.int64), torch.empty(len(rows), num_best)
    native.dovetail_top_k(
        ctypes.byref(head.descriptor), rows.data_ptr(), len(rows), num_best, ids.data_ptr(), log_probs.data_ptr()
    )
    return ids, log_probs


def _head_input(features: Tensor, head: PackedWeight) -> Tensor:
    if features.dim() != 2 or features.shape[1] != head.in_features:
        raise ValueError(f"features must be [rows, {head.in_features}], got {list(features.shape)}")
    return features.detach().to("cpu", torch.float32).contiguous()
