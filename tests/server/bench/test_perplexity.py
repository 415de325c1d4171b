import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from doubles import tiny_llama
from server.bench.perplexity import Windows, compare_weights, perplexity
from server.targets.target import TargetError
from server.targets.torch_target import TorchTarget


@pytest.mark.parametrize(("length", "stride"), [(8, 7), (8, 3), (64, 16), (2, 1)])
@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 40])
def test_every_token_but_the_first_is_scored_once(length: int, stride: int, num_tokens: int) -> None:
    scored = []
    for begin, end, first in Windows(length, stride).spans(num_tokens):
        assert end - begin <= length and first > begin
        scored += range(first, end)
    assert scored == list(range(1, num_tokens))


def test_windows_that_skip_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="0 < stride < length"):
        Windows(8, 8)


def test_perplexity_is_that_of_the_models_own_loss(save_model: Callable[..., Path]) -> None:
    model = tiny_llama()
    folder = save_model(model, "perplexity")
    token_ids = torch.randint(0, 60, (30,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(input_ids=token_ids[None], labels=token_ids[None]).loss
    target = TorchTarget.load(folder, "fp32", 1, 64)
    found = perplexity(target, "fp32", token_ids.tolist(), Windows(64, 32))
    assert found.num_tokens == 29 and math.isclose(found.perplexity, math.exp(loss), rel_tol=1e-4)
    both = compare_weights(
        token_ids.tolist(), ("fp32", "bf16"), Windows(16, 8), lambda weights, n: TorchTarget.load(folder, weights, 1, n)
    )
    assert [each.held for each in both] == [each.weights for each in both] == ["fp32", "bf16"]
    assert both[0].perplexity == pytest.approx(both[1].perplexity, rel=0.05)
    with pytest.raises(TargetError, match="at least 2 tokens"):
        perplexity(target, "fp32", [1], Windows())
