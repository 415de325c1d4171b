"""Storage of keys and values: one row block per slot and layer in a fixed place, committed in place.

A slot's rows 0 .. length-1 are committed. A pass appends rows behind them; ``keep`` moves the accepted ones to the
front of that tail and drops the rest by setting the length. Nothing grows by concatenation.
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NO_RESERVE = 0x4000  # Linux' MAP_NORESERVE, which Python names from 3.13 on
KEPT_ROWS = 256  # of an empty slot: their memory stays, so that short texts find it there
SMALLEST_MAGNITUDE = 1e-30  # below it a row of int8 counts as zero: 127 / largest would overflow


class Storage:
    """One tensor whose memory the system gives as it is written, and takes back where ``discard`` is called.

    The tensor may be larger than the machine's memory, as long as what is written is not.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.memory: mmap.mmap | None = None
        num_bytes = math.prod(shape) * dtype.itemsize
        if device.type == "cpu" and hasattr(mmap, "MADV_DONTNEED"):
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
            self.memory = mmap.mmap(-1, max(num_bytes, 1), flags=flags)
            self.tensor = torch.frombuffer(self.memory, dtype=dtype, count=math.prod(shape)).view(*shape)
        else:
            self.tensor = torch.empty(*shape, dtype=dtype, device=device)

    def discard(self, view: Tensor) -> None:
        """Give back the memory behind a contiguous part of the tensor; it holds nothing that counts any more."""
        if self.memory is None:
            return
        start = view.storage_offset() * view.element_size()
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + view.numel() * view.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self.memory.madvise(mmap.MADV_DONTNEED, first, last - first)


@dataclass(frozen=True)
class SegmentViews:
    """Where a segment lives in the slots, for all layers: what it attends, and the part its new rows are stored in.

    For each layer [1, num_kv_heads, rows, head_dim]; the scales of int8 rows [1, num_kv_heads, rows, 1], else none.
    Made once a pass, because slicing anew in every layer costs as much as the attention itself at one row.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    new_keys: tuple[Tensor, ...]
    new_values: tuple[Tensor, ...]
    key_scales: tuple[Tensor, ...] = ()
    value_scales: tuple[Tensor, ...] = ()

    def attended(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """One layer's keys and values as numbers of `dtype`."""
        keys, values = self.keys[layer], self.values[layer]
        if self.key_scales:
            key_scale, value_scale = self.key_scales[layer], self.value_scales[layer]
            return (keys * key_scale).to(dtype), (values * value_scale).to(dtype)
        return keys.to(dtype), values.to(dtype)


class SlotError(ValueError):
    """A slot is asked for rows it does not have or cannot hold."""


@dataclass(frozen=True)
class Segment:
    """The rows of one slot in a pass.

    prefix: rows every row of the segment sees (the committed ones); num_rows: new rows n; tail_mask: bool [n, t], what
    each new row sees of the t rows behind the prefix, whose last n are the new rows themselves (t > n when earlier
    passes left uncommitted rows, as a drafter's levels do); None means causal with t = n.
    """

    slot: int
    prefix: int
    num_rows: int
    tail_mask: Tensor | None = None
    biases: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict, compare=False, repr=False)
    views: dict[int, SegmentViews] = field(default_factory=dict, compare=False, repr=False)

    def bias(self, group: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """[group * n, keys]: 0 where a row looks, -inf where it must not; None when every row looks everywhere.

        The rows are repeated for each head of a group. Kept, because every layer of a pass asks for it.
        """
        if window is not None and self.num_keys <= window:
            window = None
        if window is None and self.num_keys == self.prefix + 1:
            return None
        key = (group, window, dtype)
        if key not in self.biases:
            hidden = torch.zeros(self.num_rows, self.num_keys, dtype=dtype, device=device)
            hidden.masked_fill_(~self.seen(window, device), float("-inf"))
            self.biases[key] = hidden.repeat(group, 1)
        return self.biases[key]

    def seen(self, window: int | None, device: torch.device) -> Tensor:
        """bool [n, keys], True where a row looks: prefix, its own path, and of those the last ``window`` positions.

        It is made on ``device``: of all that it holds, only the tail may have to be moved there.
        """
        seen = torch.ones(self.num_rows, self.num_keys, dtype=torch.bool, device=device)
        if self.tail_mask is None:
            seen.tril_(self.prefix)
        else:
            seen[:, self.prefix :] = self.tail_mask.to(device)
        if window is None:
            return seen
        # 1 for the row itself, 2 for its parent, ...: in a tree, positions are counted along the path.
        rank_from_end = seen.flip(1).cumsum(1).flip(1)
        return seen & (rank_from_end <= window)

    @property
    def num_keys(self) -> int:
        """Keys the segment attends: prefix and tail."""
        return self.prefix + (self.num_rows if self.tail_mask is None else self.tail_mask.shape[1])


def causal_segment(slot: int, prefix: int, num_rows: int) -> Segment:
    """Consecutive tokens: each row sees the prefix, the rows before it and itself."""
    return Segment(slot, prefix, num_rows)


def tree_segment(slot: int, prefix: int, row_parents: Sequence[int], device: torch.device) -> Segment:
    """Rows of a tree; ``row_parents[i]`` is the row of i's parent, or -1 for a row that hangs below the prefix."""
    if len(row_parents) == 1 and row_parents[0] < 0:
        return causal_segment(slot, prefix, 1)
    width = len(row_parents)
    mask = bytearray(width * width)  # filled as bytes: a torch call for each row costs more than a small verify pass
    for row, parent in enumerate(row_parents):
        if parent >= row:
            raise SlotError(f"row {row} has parent {parent}; a parent must come before its children")
        start = row * width
        if parent >= 0:
            mask[start : start + width] = mask[parent * width : (parent + 1) * width]
        mask[start + row] = True
    seen = torch.frombuffer(mask, dtype=torch.bool).view(width, width)
    return Segment(slot, prefix, width, seen.to(device))


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., head_dim] as signed bytes of the same shape and one fp32 scale each [...]: row = bytes * scale.

    The scale takes the row's largest magnitude to 127. A row that is not finite gets the scale NaN, one that is nearly
    zero the scale 0.
    """
    rows = rows.float()
    largest = rows.abs().amax(dim=-1)
    finite, counts = largest.isfinite(), largest > SMALLEST_MAGNITUDE
    inverse = torch.where(finite & counts, 127.0 / largest, 0.0)
    scale = torch.where(finite, torch.where(counts, largest / 127.0, 0.0), torch.nan)
    scaled = (rows * inverse[..., None]).round()
    return torch.where(finite[..., None], scaled, 0.0).to(torch.int8), scale


class KVSlots:
    """Keys and values [num_layers, num_slots, num_kv_heads, capacity, head_dim], and every slot's length.

    One tensor for all layers, so that keeping a path is one gather instead of one for each layer. With `dtype` int8 a
    row of a head is `quantise_rows` of it, with its scales in key_scales and value_scales [num_layers, num_slots,
    num_kv_heads, capacity]; else those are None. Nothing is written in advance: the system gives memory page by page as
    rows come, and gets back what a released slot held beyond its first ``KEPT_ROWS``.
    """

    def __init__(
        self,
        num_slots: int,
        capacity: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_slots, num_kv_heads, capacity, head_dim)
        self.capacity = capacity
        self.num_slots = num_slots
        kinds = [(shape, dtype)] * 2 + [(shape[:-1], torch.float32)] * 2 * (dtype == torch.int8)
        self.storages = [Storage(size, kind, device) for size, kind in kinds]
        self.keys, self.values, *scales = (storage.tensor for storage in self.storages)
        self.key_scales: Tensor | None = scales[0] if scales else None
        self.value_scales: Tensor | None = scales[1] if scales else None
        self.by_slot = [[store.select(1, slot) for store in self.stores] for slot in range(num_slots)]
        self.lengths = [0] * num_slots
        self.written = [0] * num_slots

    @property
    def stores(self) -> list[Tensor]:
        """All tensors; rows are their fourth dimension."""
        return [storage.tensor for storage in self.storages]

    @property
    def bytes_per_position(self) -> int:
        """Memory that one position of one slot takes, over all layers."""
        return sum(store[:, 0, :, 0].numel() * store.element_size() for store in self.stores)

    def check(self, segment: Segment) -> None:
        """Refuse a segment that does not fit its slot."""
        if not 0 <= segment.slot < self.num_slots:
            raise SlotError(f"slot {segment.slot} does not exist; there are {self.num_slots}")
        if segment.num_keys > self.capacity:
            raise SlotError(f"slot {segment.slot} holds {self.capacity} rows; {segment.num_keys} are asked for")
        self.written[segment.slot] = max(self.written[segment.slot], segment.num_keys)

    def views(self, segment: Segment) -> SegmentViews:
        """The segment's keys and values in all layers."""
        found = segment.views.get(id(self))
        if found is None:
            slot, end = slice(segment.slot, segment.slot + 1), segment.num_keys
            keys, values = self.keys[:, slot, :, :end], self.values[:, slot, :, :end]
            tail = slice(end - segment.num_rows, end)
            parts = (keys, values, keys[:, :, :, tail], values[:, :, :, tail])
            scales = [
                s[:, slot, :, :end, None].unbind(0) for s in (self.key_scales, self.value_scales) if s is not None
            ]
            found = segment.views[id(self)] = SegmentViews(*(part.unbind(0) for part in parts), *scales)
        return found

    def write(self, layer: int, segment: Segment, keys: Tensor, values: Tensor) -> None:
        """Store the new rows' keys and values [..., num_kv_heads, n, head_dim] at the end of the segment's tail."""
        if self.key_scales is not None and self.value_scales is not None:
            tail = slice(segment.num_keys - segment.num_rows, segment.num_keys)
            for store, scales, rows in ((self.keys, self.key_scales, keys), (self.values, self.value_scales, values)):
                store[layer, segment.slot, :, tail], scales[layer, segment.slot, :, tail] = quantise_rows(rows)
            return
        views = self.views(segment)
        views.new_keys[layer].copy_(keys)
        views.new_values[layer].copy_(values)

    def keep(self, slot: int, rows: Sequence[int]) -> None:
        """Commit these rows of the tail, in order, and drop the others."""
        length = self.lengths[slot]
        if any(later <= earlier for earlier, later in itertools.pairwise(rows)):
            raise SlotError(f"rows {list(rows)} of slot {slot} are not in rising order, as rows of a path are")
        moved = [(place, row) for place, row in enumerate(rows) if place != row]  # once one moves, all after it do
        if moved:
            source = torch.tensor([length + row for _, row in moved], device=self.keys.device)
            for store in self.by_slot[slot]:
                store.narrow(2, length + moved[0][0], len(moved)).copy_(store.index_select(2, source))
        self.lengths[slot] = length + len(rows)

    def read_rows(self, slot: int, start: int, stop: int) -> tuple[Tensor, ...]:
        """Copies of committed rows start .. stop-1, one tensor for each of ``stores``."""
        if not 0 <= start < stop <= self.lengths[slot]:
            raise SlotError(f"slot {slot} has {self.lengths[slot]} committed rows; {start} to {stop - 1} are asked for")
        return tuple(store[:, slot, :, start:stop].clone() for store in self.stores)

    def write_rows(self, slot: int, rows: Sequence[Tensor]) -> None:
        """Commit rows that ``read_rows`` gave, behind those the slot has."""
        start = self.lengths[slot]
        stop = start + rows[0].shape[2]
        if stop > self.capacity:
            raise SlotError(f"slot {slot} holds {self.capacity} rows; {stop} are asked for")
        for store, part in zip(self.stores, rows, strict=True):
            store[:, slot, :, start:stop] = part
        self.lengths[slot] = stop
        self.written[slot] = max(self.written[slot], stop)

    def release(self, slot: int) -> None:
        """Empty a slot; memory of a long text goes back to the system."""
        self.lengths[slot] = 0
        if self.written[slot] <= KEPT_ROWS:
            return
        for storage in self.storages:
            for layer in storage.tensor.select(1, slot):
                for head in layer:
                    storage.discard(head[KEPT_ROWS : self.written[slot]])
        self.written[slot] = KEPT_ROWS
