"""Losses over a wide vocabulary, a few positions at a time, so that the logits of all of them never exist at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def sum_over_chunks(function: Callable[..., Tensor], tensors: Sequence[Tensor], rows: int) -> Tensor:
    """Sum of ``function(*chunk)`` over consecutive chunks of ``rows`` rows of ``tensors``, each [n, ...].

    What ``function`` computes inside is dropped after each chunk and computed again in the backward pass, which costs
    one more forward pass; a single chunk keeps it and costs nothing. ``function`` must give a sum over its rows, not
    their mean, and draw no random numbers. No rows are one empty chunk.
    """
    num_rows = len(tensors[0])
    if num_rows <= rows:
        return function(*tensors)
    total: Tensor | None = None
    for start in range(0, num_rows, rows):
        chunk = [tensor[start : start + rows] for tensor in tensors]
        if torch.is_grad_enabled():
            part: Tensor = checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False)
        else:
            part = function(*chunk)
        total = part if total is None else total + part
    assert total is not None
    return total
