"""Losses in chunks of positions: the same sums and gradient as at once, and never more than a chunk of logits."""

import pytest
import torch

from kernels.losses.chunks import sum_over_chunks


class HeadLoss:
    """Sums that need logits; remembers how many rows it was given at a time."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.head = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        self.mask = mask
        self.seen: list[int] = []

    def __call__(self, rows: torch.Tensor, where: slice) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append(rows.shape[1])
        losses = torch.logsumexp(rows @ self.head.T, dim=-1) * self.mask[:, where]
        return losses.sum(dim=-1), losses


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_sums_and_gradient_are_those_of_the_whole(chunk: int) -> None:
    rows, mask = torch.randn(2, 13, 8, requires_grad=True), (torch.rand(2, 13) > 0.3).float()
    want, each = HeadLoss(mask)(rows, slice(None))
    weights = torch.tensor([1.0, 0.8])
    (want_gradient,) = torch.autograd.grad((weights * want).sum(), rows)
    function = HeadLoss(mask)
    got, losses = sum_over_chunks(function, rows, chunk)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses, each.detach(), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad((weights * got).sum(), rows)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-6, atol=1e-6)
    assert max(function.seen) <= chunk


def test_nothing_is_computed_twice_and_no_logits_are_kept() -> None:
    rows, function = torch.randn(1, 10, 8, requires_grad=True), HeadLoss(torch.ones(1, 10))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        sums, _ = sum_over_chunks(function, rows, 4)
    assert max(kept) < 10 * 50
    kept.clear()
    sums.sum().backward()
    assert function.seen == [4, 4, 2]
    with torch.no_grad():
        without, _ = sum_over_chunks(function, rows, 5)
    assert not without.requires_grad
    torch.testing.assert_close(without, sums.detach())


def test_no_rows_are_one_empty_chunk() -> None:
    function = HeadLoss(torch.zeros(1, 0))
    sums, losses = sum_over_chunks(function, torch.zeros(1, 0, 8), 4)
    assert (sums.tolist(), losses.shape, function.seen) == ([0.0], (1, 0), [0])
