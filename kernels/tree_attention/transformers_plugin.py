"""Row attention inside any decoder-only transformers model, without a line of its code changed.

transformers asks its attention-function registry for the function named in a model's config; the one registered here
stores the new rows' keys and values in slots and attends them there. The rows of all requests lie behind one another in
one flattened pass; each has its own position, slot and ancestors. Import this module, create the model with
``attn_implementation=ATTENTION_NAME``, and hand a ``RowPass`` to every forward call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kernels.tree_attention.attention import tree_attention
from kernels.tree_attention.slots import KVSlots, Segment

ATTENTION_NAME = "dovetail_rows"


class UnsupportedArchitecture(ValueError):
    """A model attends in a way that flattened rows over slots cannot do; the message says which."""


@dataclass
class RowPass:
    """One flattened forward pass: where its rows live. ``num_calls`` counts the layers that attended."""

    slots: KVSlots
    segments: Sequence[Segment]
    num_calls: int = field(default=0)

    def check(self, architecture: str) -> None:
        """After the pass: refuse a model that attended in some of its layers by other means."""
        num_layers = self.slots.keys.shape[0]
        if self.num_calls != num_layers:
            raise UnsupportedArchitecture(
                f"{architecture} attends in {self.num_calls} of {num_layers} layers through transformers' attention "
                "registry; models with other kinds of layers cannot be run row by row"
            )


def create_slots(
    model: Any, num_slots: int, capacity: int, device: torch.device, dtype: torch.dtype | None = None
) -> KVSlots:
    """Slots of the model's own shape, and of its own type if none is given; ``capacity`` counts rows of a slot."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dtype = dtype or next(model.parameters()).dtype
    return KVSlots(num_slots, capacity, config.num_hidden_layers, kv_heads, head_dim, dtype, device)


def attend_slots(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the registry passes it by position
    *,
    row_pass: RowPass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query, key, value [1, heads, rows, head_dim] -> [1, rows, heads, head_dim].

    The mask is ours (transformers builds none for a name it does not know). Attention sinks are refused.
    """
    if s_aux is not None:
        raise UnsupportedArchitecture("this architecture uses attention sinks, which the row attention does not know")
    layer: int = module.layer_idx  # type: ignore[assignment]
    if len(row_pass.segments) == 1:
        row_pass.slots.write(layer, row_pass.segments[0], key, value)
    else:
        start = 0
        for segment in row_pass.segments:
            rows = slice(start, start + segment.num_rows)
            row_pass.slots.write(layer, segment, key[:, :, rows], value[:, :, rows])
            start += segment.num_rows
    row_pass.num_calls += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = tree_attention(query, row_pass.slots, layer, row_pass.segments, scale, sliding_window, softcap)
    return output.transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, attend_slots)
