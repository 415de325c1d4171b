"""Unrolled steps against drafts made one by one from scratch."""

import pytest
import torch

from drafters.network import DovetailConfig, DovetailNetwork
from drafters.train.unrolled import shifted, unrolled_predictions


def create(num_blocks: int) -> tuple[DovetailNetwork, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    network = DovetailNetwork(DovetailConfig(16, 20, 24, 4, 2, 4, num_blocks=num_blocks))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2.0)
    return network, torch.randn(2, 7, 16), torch.randn(2, 7, 16)


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_every_step_equals_a_draft_of_that_depth(num_blocks: int) -> None:
    network, features, embeddings = create(num_blocks)
    steps = unrolled_predictions(network, features, embeddings, 4)
    for step in range(4):
        for last in range(step, 7):
            drafted = features[:, : last - step + 1]
            for _ in range(step):
                output = network.forward_causal(drafted, embeddings[:, : drafted.shape[1]])[:, -1:]
                drafted = torch.cat((drafted, output), dim=1)
            want = network.forward_causal(drafted, embeddings[:, : last + 1])[:, -1]
            torch.testing.assert_close(steps[step][:, last], want, atol=1e-5, rtol=1e-4)


def test_later_steps_teach_the_earlier_ones() -> None:
    network, features, embeddings = create(2)
    features.requires_grad_()
    unrolled_predictions(network, features, embeddings, 3)[2][:, 5].sum().backward()
    assert features.grad is not None
    reached = features.grad.abs().sum(dim=(0, 2)) > 0
    assert reached.tolist() == [True] * 4 + [False] * 3
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


def test_shifting() -> None:
    rows = torch.arange(1.0, 4.0)[:, None]
    assert shifted(rows, 0).tolist() == rows.tolist()
    assert shifted(rows, 2).squeeze(1).tolist() == [0.0, 0.0, 1.0]
