"""EAGLE-3's network: three feature layers, attention over token and feature side by side, an own head.

Source: EAGLE-3 (arXiv 2503.01840) and the shapes of its published checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from drafters.drafter import DrafterError
from drafters.network import Attention, BlockConfig, FeatureNetwork, LlamaBlock


@dataclass(frozen=True)
class EagleConfig(BlockConfig):
    """Shape of an EAGLE-3 drafter; it has one block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_blocks != 1:
            raise DrafterError(f"num_blocks is {self.num_blocks}; an EAGLE-3 drafter has one")


class EagleNetwork(FeatureNetwork):
    """One Llama block whose attention reads ``[norm(embedding); norm(hidden)]``, then a norm and an LM head of its own.

    The three features of a position are projected to one vector, which begins the residual stream; a drafted position
    begins it with the block's output of its parent, before the last norm.
    """

    config: EagleConfig
    feature_layers = ("low", "mid", "high")

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        hidden, eps = config.hidden_size, config.norm_eps
        self.feature_proj = nn.Linear(len(self.feature_layers) * hidden, hidden, bias=False)
        self.embedding_norm = nn.RMSNorm(hidden, eps=eps)
        self.hidden_norm = nn.RMSNorm(hidden, eps=eps)
        self.block = LlamaBlock(config, 0, attention_width=2 * hidden)
        self.output_norm = nn.RMSNorm(hidden, eps=eps)
        self.head = nn.Linear(hidden, config.draft_vocab_size or config.vocab_size, bias=False)

    def forward(self, features: Tensor, embeddings: Tensor, angles: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        """Row i holds the projected features of position i and the embedding of the token after it; all [..., n, H]."""
        attention_input = torch.cat((self.embedding_norm(embeddings), self.hidden_norm(features)), dim=-1)
        output: Tensor = self.block(features, angles, attend, attention_input)
        return output

    def project(self, features: Tensor) -> Tensor:
        """Low, middle and high feature side by side, [..., n, 3 H] -> [..., n, H]."""
        projected: Tensor = self.feature_proj(features)
        return projected

    def select_head(self, lm_head: Tensor) -> Tensor:
        """Its own head [draft vocabulary, H], whatever the target's is."""
        del lm_head
        return self.head.weight

    def logits(self, outputs: Tensor, head: Tensor) -> Tensor:
        """Outputs [..., H] -> [..., draft vocabulary], behind the last norm."""
        return functional.linear(self.output_norm(outputs), head)
