"""The slow, obvious twin of ``attention.tree_attention``: one row at a time, key heads expanded, softmax in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.tree_attention.slots import KVSlots, Segment


def tree_attention_reference(
    query: Tensor, slots: KVSlots, layer: int, segments: Sequence[Segment], scale: float, window: int | None = None
) -> Tensor:
    """query [num_heads, rows, head_dim] -> [num_heads, rows, head_dim]; keys of the pass are stored already.

    window: each row sees so many positions of its own path, its own the last; None: all.
    """
    output = torch.empty_like(query)
    group = query.shape[0] // slots.keys.shape[2]
    row = 0
    for segment in segments:
        attended = slots.views(segment).attended(layer, torch.float64)
        keys, values = (part[0].repeat_interleave(group, dim=0) for part in attended)
        for i in range(segment.num_rows):
            seen = torch.ones(segment.num_keys, dtype=torch.bool, device=query.device)
            if segment.tail_mask is None:
                seen[segment.prefix + i + 1 :] = False
            else:
                seen[segment.prefix :] = segment.tail_mask[i]
            if window is not None:
                seen[seen.nonzero()[:-window, 0]] = False
            for head in range(query.shape[0]):
                scores = (keys[head, seen] @ query[head, row].double()) * scale
                output[head, row] = (scores.softmax(0) @ values[head, seen]).to(query.dtype)
            row += 1
    return output
