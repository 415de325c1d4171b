"""Storage of keys and values: one preallocated row block per slot and layer, committed in place.

A slot's rows 0 .. length-1 are committed. A pass appends rows behind them; ``keep`` moves the accepted ones to the
front of that tail and drops the rest by setting the length. Nothing grows by concatenation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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

    @cached_property
    def hidden_tail(self) -> Tensor | None:
        """bool [n, t], True where a row must not look behind the prefix; None when it may look everywhere.

        Kept, because every layer of a pass asks for it.
        """
        if self.num_keys == self.prefix + 1:
            return None
        if self.tail_mask is None:
            return torch.ones(self.num_rows, self.num_rows, dtype=torch.bool).triu_(1)
        return ~self.tail_mask

    @property
    def num_keys(self) -> int:
        """Keys the segment attends: prefix and tail."""
        return self.prefix + (self.num_rows if self.tail_mask is None else self.tail_mask.shape[1])


def causal_segment(slot: int, prefix: int, num_rows: int) -> Segment:
    """Consecutive tokens: each row sees the prefix, the rows before it and itself."""
    return Segment(slot, prefix, num_rows)


def tree_segment(slot: int, prefix: int, row_parents: Sequence[int], device: torch.device) -> Segment:
    """Rows of a tree; ``row_parents[i]`` is the row of i's parent, or -1 for a row that hangs below the prefix."""
    mask = torch.eye(len(row_parents), dtype=torch.bool)
    for row, parent in enumerate(row_parents):
        if parent >= row:
            raise SlotError(f"row {row} has parent {parent}; a parent must come before its children")
        if parent >= 0:
            mask[row] |= mask[parent]
    return Segment(slot, prefix, len(row_parents), mask.to(device))


class KVSlots:
    """Keys and values [num_layers, num_slots, num_kv_heads, capacity, head_dim], and every slot's length.

    One tensor for all layers, so that keeping a path is one gather instead of one for each layer.
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
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * num_slots

    def check(self, segment: Segment) -> None:
        """Refuse a segment that does not fit its slot."""
        if not 0 <= segment.slot < self.num_slots:
            raise SlotError(f"slot {segment.slot} does not exist; there are {self.num_slots}")
        if segment.num_keys > self.capacity:
            raise SlotError(f"slot {segment.slot} holds {self.capacity} rows; {segment.num_keys} are asked for")

    def write(self, layer: int, segment: Segment, keys: Tensor, values: Tensor) -> None:
        """Store the new rows' keys and values [num_kv_heads, n, head_dim] at the end of the segment's tail."""
        end = segment.num_keys
        place = slice(end - segment.num_rows, end)
        self.keys[layer, segment.slot, :, place] = keys
        self.values[layer, segment.slot, :, place] = values

    def keep(self, slot: int, rows: Sequence[int]) -> None:
        """Commit these rows of the tail, in order, and drop the others."""
        length = self.lengths[slot]
        if any(later <= earlier for earlier, later in itertools.pairwise(rows)):
            raise SlotError(f"rows {list(rows)} of slot {slot} are not in rising order, as rows of a path are")
        if list(rows) != list(range(len(rows))):
            source = torch.tensor(rows, device=self.keys.device) + length
            for store in (self.keys, self.values):
                store[:, slot, :, length : length + len(rows)] = store[:, slot].index_select(2, source)
        self.lengths[slot] = length + len(rows)

    def fork(self, source: int, slot: int, length: int) -> None:
        """Copy the first ``length`` committed rows of ``source`` into ``slot``."""
        if length > self.lengths[source]:
            raise SlotError(f"slot {source} has {self.lengths[source]} committed rows; {length} are asked for")
        for store in (self.keys, self.values):
            store[:, slot, :, :length] = store[:, source, :, :length]
        self.lengths[slot] = length

    def release(self, slot: int) -> None:
        """Empty a slot; its memory stays."""
        self.lengths[slot] = 0
