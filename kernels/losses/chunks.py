"""Losses over a wide vocabulary, a few positions at a time, so that the logits of all of them never exist at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Part = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(rows [S, r, H], which they are) -> (sums [S] to be minimised, whatever else is wanted of the rows [..., r])."""


class GivenGradient(torch.autograd.Function):
    """``sums`` [S] as a function of ``rows`` [S, n, H] whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, rows: Tensor, gradient: Tensor) -> Tensor:
        """The sums as they are."""
        del rows
        ctx.save_for_backward(gradient)
        return sums.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, None]:
        """Each step's gradient times what its sum is multiplied by."""
        (gradient,) = ctx.saved_tensors
        factors: Tensor = grad_outputs[0]
        return None, gradient * factors[:, None, None].to(gradient.dtype), None


def sum_over_chunks(part: Part, rows: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The sums [S] of ``part`` over consecutive chunks of ``rows`` [S, n, H], and its other results side by side.

    The gradient in the rows is computed with the sums, chunk by chunk, and only it is kept: nothing is computed again
    in the backward pass. No gradient reaches anything else that ``part`` reads. Entry s of its sums must depend on
    ``rows[s]`` alone, and be a sum over its rows, not their mean. No rows are one empty chunk. Source: the fused
    cross-entropy of Liger (arXiv 2410.10989), section 3.2.
    """
    gradient = torch.empty_like(rows) if torch.is_grad_enabled() and rows.requires_grad else None
    total: Tensor | None = None
    others: list[Tensor] = []
    for start in range(0, max(rows.shape[1], 1), chunk):
        where = slice(start, start + chunk)
        piece = rows[:, where].detach().requires_grad_(gradient is not None)
        sums, other = part(piece, where)
        if gradient is not None:
            (gradient[:, where],) = torch.autograd.grad(sums.sum(), piece)
        total = sums.detach() if total is None else total + sums.detach()
        others.append(other.detach())
    assert total is not None
    if gradient is not None:
        total = GivenGradient.apply(total, rows, gradient)  # type: ignore[no-untyped-call]
        assert total is not None
    return total, torch.cat(others, dim=-1)
