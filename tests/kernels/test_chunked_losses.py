"""Losses in chunks of positions: the same sum and gradient as at once, and never more than a chunk of logits."""

import pytest
import torch

from kernels.losses.chunks import sum_over_chunks


class HeadLoss:
    """A sum that needs logits; remembers how many rows it was given at a time."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.head = torch.randn(50, 8, generator=generator)
        self.seen: list[int] = []

    def __call__(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(features))
        losses = torch.logsumexp(features @ self.head.T, dim=-1)
        return torch.stack([(losses * mask).sum(), mask.sum()])


@pytest.mark.parametrize("rows", [1, 4, 13, 100])
def test_sum_and_gradient_are_those_of_the_whole(rows: int) -> None:
    features, mask = torch.randn(13, 8, requires_grad=True), (torch.rand(13) > 0.3).float()
    want = HeadLoss()(features, mask)
    (want_gradient,) = torch.autograd.grad(want[0], features)
    function = HeadLoss()
    got = sum_over_chunks(function, (features, mask), rows)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(got[0], features)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-6, atol=1e-6)
    assert max(function.seen) <= rows


def test_chunks_are_computed_again_in_the_backward_pass_and_a_single_one_is_not() -> None:
    features, mask = torch.randn(10, 8, requires_grad=True), torch.ones(10)
    chunked, whole = HeadLoss(), HeadLoss()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        sum_over_chunks(chunked, (features, mask), 4)[0].backward()
    assert chunked.seen == [4, 4, 2, 2, 4, 4]
    assert max(kept) <= 4 * 50
    sum_over_chunks(whole, (features, mask), 10)[0].backward()
    assert whole.seen == [10]
    with torch.no_grad():
        sum_over_chunks(whole, (features, mask), 5)
    assert whole.seen == [10, 5, 5]


def test_no_rows_are_one_empty_chunk() -> None:
    function = HeadLoss()
    assert sum_over_chunks(function, (torch.zeros(0, 8), torch.zeros(0)), 4).tolist() == [0.0, 0.0]
    assert function.seen == [0]
