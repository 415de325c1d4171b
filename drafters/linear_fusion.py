"""EAGLE's fusion of feature and token: one linear map. The paper's ablation, and what EAGLE-1/2 checkpoints hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearFusion(nn.Module):
    """``[embedding; feature] W + b``, the embedding as it is, not normalised: 2 H^2 + H parameters.

    Source: EAGLE (arXiv 2401.15077), the order of the two as in its code.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(2 * hidden_size, hidden_size)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """``features`` and ``embeddings`` [..., H] -> [..., H]."""
        fused: Tensor = self.proj(torch.cat((embeddings, features), dim=-1))
        return fused.to(features.dtype)  # under autocast the product is narrower than the residual stream it begins
