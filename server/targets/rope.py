"""Rotary angles that depend on a row's own position and nothing else.

transformers chooses the frequencies of ``longrope`` and ``dynamic`` by the largest position of a whole pass, so a row
would change with its neighbours, with drafted rows and with the size of prefill chunks. Here the length that decides is
the row's own position + 1. Texts within the original length are transformers' own; in a longer one the rows before
that length keep the short frequencies, where transformers reads the whole prompt again with the long ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from server.targets.target import TargetError

LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")


class PositionRope(nn.Module):
    """Stands in a model's place of ``rotary_embedding``; its rows are independent of one another."""

    def __init__(self, rotary_embedding: Any) -> None:
        super().__init__()
        self.inner = rotary_embedding
        self.rope_type: str = rotary_embedding.rope_type
        parameters = rotary_embedding.config.rope_parameters
        self.original_length: int = (
            parameters["original_max_position_embeddings"]
            if self.rope_type == "longrope"
            else rotary_embedding.original_max_seq_len
        )

    def forward(self, like: Tensor, position_ids: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        """Cosine and sine [1, n, rotated size] of positions [1, n], in the type of ``like``."""
        lengths = (position_ids[0] + 1).clamp(min=self.original_length)
        if self.rope_type == "longrope":  # beyond the original length there is one set of frequencies
            lengths = lengths.clamp(max=self.original_length + 1)
        cosine = sine = torch.empty(0)
        for length in sorted(set(lengths.tolist())):
            rows = (lengths == length).nonzero()[:, 0]
            if (
                self.rope_type == "dynamic"
            ):  # it keeps the last pass's frequencies where it sees no reason to change them
                self.inner.inv_freq = self.inner.original_inv_freq.to(self.inner.inv_freq.device)
                self.inner.max_seq_len_cached = self.original_length
            parts = self.inner(like, position_ids[:, rows], **given)
            if cosine.numel() == 0:
                cosine, sine = (part.new_empty(1, len(lengths), part.shape[-1]) for part in parts)
            cosine[:, rows], sine[:, rows] = parts
        return cosine, sine


def by_position(base_model: Any) -> str | None:
    """Put a ``PositionRope`` into a base model that needs one; what a user should know of it, or None."""
    rotary = getattr(base_model, "rotary_emb", None)
    if getattr(rotary, "rope_type", None) not in LENGTH_DEPENDENT_ROPES:
        return None
    base_model.rotary_emb = rope = PositionRope(rotary)
    return (
        f"its {rope.rope_type} rotary embedding changes at {rope.original_length} positions: each row is turned by its "
        "own position, so texts do not depend on neighbours or drafts; longer texts differ from transformers', which "
        "reads the whole prompt again there"
    )


def check_frequencies(model: nn.Module, source: object) -> None:
    """Errors: TargetError where a configuration's rotary frequencies are no numbers: every text would be nonsense."""
    for name, buffer in model.named_buffers():
        if not name.endswith("inv_freq") or buffer.is_meta:
            continue
        wrong = buffer[~(buffer.isfinite() & (buffer >= 0))]
        if len(wrong):
            raise TargetError(
                f"{source}: the rope_parameters of config.json (rope_theta, factor) give the rotary frequency "
                f"{float(wrong[0]):g}; frequencies are finite and not negative"
            )
    for module in model.modules():
        scaling = getattr(module, "attention_scaling", 1.0)
        if not 0 < scaling < math.inf:
            raise TargetError(
                f"{source}: the rope_parameters of config.json (factor, attention_factor) scale cosines and sines by "
                f"{scaling:g}; that must be a finite number above 0"
            )
