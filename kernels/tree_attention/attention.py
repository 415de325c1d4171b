"""Attention of flattened rows over KV slots in plain torch: one pass over each sequence's keys for all its rows.

Heads that share a key head are folded into the row dimension instead of expanding the keys:
[num_heads, n, d] becomes [num_kv_heads, group * n, d] (measured on two cores, context 1024: 0.14 against 0.24 ms at one
row).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.tree_attention.slots import KVSlots, Segment


def tree_attention(
    query: Tensor,
    slots: KVSlots,
    layer: int,
    segments: Sequence[Segment],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend the slots' keys, the pass's own rows included (they must be stored already).

    query [num_heads, rows, head_dim] in segment order -> the same shape. ``window`` limits a row to the last that many
    positions (causal segments and trees alike, counted in depth); ``softcap`` squashes scores as Gemma 2 does.
    """
    output = torch.empty_like(query)
    start = 0
    for segment in segments:
        rows = slice(start, start + segment.num_rows)
        output[:, rows] = attend(query[:, rows], slots, layer, segment, scale, window, softcap)
        start += segment.num_rows
    return output


def attend(
    query: Tensor,
    slots: KVSlots,
    layer: int,
    segment: Segment,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One segment of ``tree_attention``."""
    keys = slots.keys[layer, segment.slot, :, : segment.num_keys]
    values = slots.values[layer, segment.slot, :, : segment.num_keys]
    num_kv_heads, num_keys, head_dim = keys.shape
    folded = query.reshape(num_kv_heads, -1, head_dim)  # the group's heads lie side by side, n rows each
    scores = torch.matmul(folded * scale, keys.transpose(1, 2).to(query.dtype))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = segment.hidden_tail if window is None or num_keys <= window else hidden_by_window(segment, window)
    if hidden is not None:
        by_row = scores.view(num_kv_heads, -1, segment.num_rows, num_keys)
        by_row[..., -hidden.shape[1] :].masked_fill_(hidden.to(scores.device), float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, values.to(query.dtype)).view(query.shape)


def hidden_by_window(segment: Segment, window: int) -> Tensor:
    """bool [n, keys], True where a row must not look when it sees only the last ``window`` positions of its path."""
    seen = torch.ones(segment.num_rows, segment.num_keys, dtype=torch.bool)
    if segment.hidden_tail is not None:
        seen[:, segment.prefix :] = ~segment.hidden_tail.cpu()
    rank_from_end = seen.flip(1).cumsum(1).flip(1)  # 1 for the row itself, 2 for its parent, ...
    return ~(seen & (rank_from_end <= window))
