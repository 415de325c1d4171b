"""Training-time test: unroll the drafter on its own predictions, with the keys it will see when it drafts.

At step 0 every position reads true features. At step s position i reads the feature that step s - 1 predicted for it,
and its attention sees what a draft of depth s sees: true keys up to position i - s, then one key of each of the steps 1
to s on the way to i. Source: EAGLE-3 (arXiv 2503.01840), the training-time test, here with the paper's fusion and any
number of blocks.

Shapes: B sequences, T positions, H hidden size, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from drafters.network import DovetailNetwork, rotary_table


class UnrolledAttention:
    """Attention of one step after another; remembers the keys and values of the earlier steps, per block."""

    def __init__(self) -> None:
        self.step = 0
        self.keys: dict[int, list[Tensor]] = {}
        self.values: dict[int, list[Tensor]] = {}

    def __call__(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``query`` [B, heads, T, D], ``key`` and ``value`` [B, kv heads, T, D] of the current step."""
        group = query.shape[-3] // key.shape[-3]
        keys, values = self.keys.setdefault(block, []), self.values.setdefault(block, [])
        keys.append(key.to(value.dtype).repeat_interleave(group, dim=-3))
        values.append(value.repeat_interleave(group, dim=-3))
        query = query.to(value.dtype) * query.shape[-1] ** -0.5
        length = query.shape[-2]
        past = query @ keys[0].transpose(-2, -1)
        hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1 - self.step)
        scores = [past.masked_fill(hidden, float("-inf"))]
        # Step j's key for a draft that ends at i stands s - j positions before i: a product along the diagonal.
        own = [(shifted(keys[j], self.step - j), shifted(values[j], self.step - j)) for j in range(1, self.step + 1)]
        scores += [(query * own_key).sum(dim=-1, keepdim=True) for own_key, _ in own]
        weights = torch.softmax(torch.cat(scores, dim=-1), dim=-1, dtype=torch.float32).to(value.dtype)
        output = weights[..., :length] @ values[0]
        for j, (_, own_value) in enumerate(own):
            output = output + weights[..., length + j, None] * own_value
        return output


def shifted(rows: Tensor, count: int) -> Tensor:
    """``rows`` [..., T, D] moved ``count`` positions later; zeros come in, the last ones drop out."""
    return functional.pad(rows[..., : rows.shape[-2] - count, :], (0, 0, count, 0))


def unrolled_predictions(
    network: DovetailNetwork, features: Tensor, embeddings: Tensor, num_steps: int
) -> list[Tensor]:
    """Predicted next features [B, T, H] of every step, the first being the teacher-forced one.

    At step s the first s positions have no draft that long behind them: what stands there means nothing.
    """
    angles = rotary_table(network.config, features.shape[-2], torch.float32, features.device)
    attention = UnrolledAttention()
    outputs: list[Tensor] = []
    for step in range(num_steps):
        attention.step = step
        outputs.append(network(features, embeddings, angles, attention))
        features = shifted(outputs[-1], 1)
    return outputs
