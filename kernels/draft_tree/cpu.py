"""Calls of a native drafter: `observe` for committed positions, `grow` for trees."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.decoder_layer import LayerStack
from kernels.decoder_layer.cpu import CACHE_FORMATS, SlotsDescriptor
from kernels.draft_tree.fusion import FusionDescriptor, PackedFusion
from kernels.linear_lowbit import PackedWeight
from kernels.native import PackedDescriptor, library
from kernels.tree_attention import KVSlots


class _ModelDescriptor(ctypes.Structure):
    """`struct DraftModel` of csrc/draft.cpp."""

    _fields_ = [
        ("fusion", FusionDescriptor), ("head", PackedDescriptor),
        ("layers", ctypes.c_void_p), ("num_layers", ctypes.c_int64),
        ("embedding", ctypes.c_void_p), ("draft_ids", ctypes.c_void_p), ("confidence", ctypes.c_void_p),
        ("cosine", ctypes.c_void_p), ("sine", ctypes.c_void_p), ("capacity", ctypes.c_int64),
        ("embedding_bf16", ctypes.c_int32), ("slots_format", ctypes.c_int32),
        ("slots", SlotsDescriptor),
    ]  # fmt: skip


class _Root(ctypes.Structure):
    """`struct Root` of csrc/draft.cpp."""

    _fields_ = [("output", ctypes.c_void_p), ("slot", ctypes.c_int32), ("length", ctypes.c_int32)]


class _Budget(ctypes.Structure):
    """`struct Budget` of csrc/growth.h."""

    _fields_ = [("rows", ctypes.c_int32), ("top_k", ctypes.c_int32), ("depth", ctypes.c_int32)]


class GrownTree(NamedTuple):
    """The nodes of one tree in level order; a parent is -1 for children of the root."""

    token_ids: list[int]
    parents: list[int]
    log_probs: list[float]


_FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class DraftModel:
    """Everything a native drafter reads: fusion, blocks, head, the target's embedding, angles, slots.

    head [draft vocabulary, H]; embedding [V, H] fp32 or bf16; draft_ids int64 [draft vocabulary], the token of each row
    of the head, or None for all tokens in order; confidence fp32 [H + 1], weights and bias of the logit of the first
    child's acceptance, or None to rank by probability; cosine and sine [capacity, head size] fp32, of positions from 0
    on, as transformers' rotary embedding gives them. Raises ValueError for what does not fit together.
    """

    fusion: PackedFusion
    stack: LayerStack
    head: PackedWeight
    embedding: Tensor
    draft_ids: Tensor | None
    confidence: Tensor | None
    cosine: Tensor
    sine: Tensor
    slots: KVSlots

    def __post_init__(self) -> None:
        hidden_size, slots = self.stack.hidden_size, self.slots
        widths = (self.fusion.hidden_size, self.head.in_features, self.embedding.shape[1])
        if widths != (hidden_size,) * 3:
            raise ValueError(f"blocks of width {hidden_size} with fusion, head and embedding of widths {widths}")
        if slots.keys.shape[::2] != (len(self.stack), self.stack.num_kv_heads, self.stack.head_dim):
            raise ValueError(f"slots {list(slots.keys.shape)} do not hold {len(self.stack)} blocks of these heads")
        for name in ("cosine", "sine"):
            table = getattr(self, name)
            if table.shape != (slots.capacity, self.stack.head_dim) or table.dtype != torch.float32:
                raise ValueError(f"{name} must be fp32 [{slots.capacity}, {self.stack.head_dim}]")
        if self.draft_ids is not None and self.draft_ids.shape != (self.head.out_features,):
            raise ValueError(f"{len(self.draft_ids)} draft ids for a head of {self.head.out_features} rows")
        if self.confidence is not None and (
            self.confidence.shape != (hidden_size + 1,) or self.confidence.dtype != torch.float32
        ):
            raise ValueError(f"confidence must be fp32 [{hidden_size + 1}], got {list(self.confidence.shape)}")
        parts = [self.embedding, self.cosine, self.sine, *slots.stores]
        parts += [part for part in (self.draft_ids, self.confidence) if part is not None]
        if not all(part.is_contiguous() and part.device.type == "cpu" for part in parts):
            raise ValueError("embedding, angles, draft ids and slots must be contiguous and on the CPU")
        if self.embedding.dtype not in _FLOATS or slots.keys.dtype not in _FLOATS:
            raise ValueError(f"embedding and slots must be fp32 or bf16: {self.embedding.dtype}, {slots.keys.dtype}")

    @functools.cached_property
    def descriptor(self) -> _ModelDescriptor:
        """What native code is handed; valid as long as this object lives."""
        return _ModelDescriptor(
            self.fusion.descriptor, self.head.descriptor, ctypes.addressof(self.stack.descriptors), len(self.stack),
            self.embedding.data_ptr(), None if self.draft_ids is None else self.draft_ids.data_ptr(),
            None if self.confidence is None else self.confidence.data_ptr(),
            self.cosine.data_ptr(), self.sine.data_ptr(), self.slots.capacity,
            int(self.embedding.dtype == torch.bfloat16), CACHE_FORMATS[self.slots.keys.dtype],
            SlotsDescriptor.of(self.slots),
        )  # fmt: skip

    def observe(
        self, slots: Sequence[int], num_rows: Sequence[int], token_ids: Sequence[int], features: Tensor, outputs: Tensor
    ) -> None:
        """Stores rows behind the committed ones of each slot; the slots' lengths stay as they are.

        Row by row: the target's `features` [rows, H] fp32 and the tokens that FOLLOW them, `num_rows` for each slot in
        order. `outputs` [num_slots, H] fp32 gets, at each slot, the prediction behind its last row.
        """
        native = _library()
        self._check_outputs(outputs)
        total, lengths = sum(num_rows), [self.slots.lengths[slot] for slot in slots]
        if features.shape != (total, self.stack.hidden_size) or features.dtype != torch.float32:
            raise ValueError(f"features must be fp32 [{total}, {self.stack.hidden_size}], got {list(features.shape)}")
        if len(token_ids) != total or not 0 <= min(token_ids) <= max(token_ids) < len(self.embedding):
            raise ValueError(f"{total} tokens of at most {len(self.embedding) - 1} are wanted, got {list(token_ids)}")
        if any(length + count > self.slots.capacity for length, count in zip(lengths, num_rows, strict=True)):
            raise ValueError(f"slots hold {self.slots.capacity} rows; {num_rows} more than {lengths} do not fit")
        features, count = features.contiguous(), len(slots)
        ints = ctypes.c_int32 * count
        native.dovetail_draft_observe(
            ctypes.byref(self.descriptor), ints(*slots), ints(*lengths), ints(*num_rows), count,
            (ctypes.c_int64 * total)(*token_ids), features.data_ptr(),
            (ctypes.c_void_p * count)(*(_row(outputs, slot) for slot in slots)),
        )  # fmt: skip

    def grow(self, slots: Sequence[int], outputs: Tensor, rows: int, top_k: int, depth: int) -> list[GrownTree]:
        """One tree for each slot from its row of `outputs` [num_slots, H] fp32, grown level by level for all together.

        rows, top_k and depth mean what they do in EAGLE-2's dynamic tree: the best `rows - 1` nodes are kept, up to
        `top_k` nodes are expanded in a level and have as many children, `depth` levels follow the first. Rows that are
        drafted lie behind the committed ones until something else is stored there.
        """
        native = _library()
        self._check_outputs(outputs)
        if rows < 1 or top_k < 1 or depth < 0:
            raise ValueError(f"rows {rows} and top_k {top_k} must be at least 1, depth {depth} at least 0")
        roots = (_Root * len(slots))(*(_Root(_row(outputs, slot), slot, self.slots.lengths[slot]) for slot in slots))
        room = len(slots) * (rows - 1)
        token_ids, parents = (ctypes.c_int64 * room)(), (ctypes.c_int32 * room)()
        log_probs, counts = (ctypes.c_float * room)(), (ctypes.c_int32 * len(slots))()
        native.dovetail_draft_trees(
            ctypes.byref(self.descriptor), roots, len(slots), ctypes.byref(_Budget(rows, top_k, depth)),
            token_ids, parents, log_probs, counts,
        )  # fmt: skip
        firsts = (i * (rows - 1) for i in range(len(slots)))
        places = [slice(first, first + count) for first, count in zip(firsts, counts, strict=True)]
        return [GrownTree(token_ids[place], parents[place], log_probs[place]) for place in places]

    def _check_outputs(self, outputs: Tensor) -> None:
        wanted = (self.slots.num_slots, self.stack.hidden_size)
        if outputs.shape != wanted or outputs.dtype != torch.float32 or not outputs.is_contiguous():
            raise ValueError(
                f"outputs must be contiguous fp32 {list(wanted)}, got {outputs.dtype} {list(outputs.shape)}"
            )


def _library() -> ctypes.CDLL:
    native = library()
    if native is None:
        raise RuntimeError("the native drafter is not built; draft with the torch network")
    return native


def _row(outputs: Tensor, slot: int) -> int:
    """Address of a slot's row."""
    if not 0 <= slot < len(outputs):
        raise ValueError(f"slot {slot} does not exist; there are {len(outputs)}")
    return outputs.data_ptr() + slot * outputs.stride(0) * outputs.element_size()
