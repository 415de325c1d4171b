"""Dynamic Gating Fusion: how the drafter mixes a feature of the target with the token that follows it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class DynamicGatingFusion(nn.Module):
    """A gate per channel between the projected feature and the projected, normalised embedding.

    With ``e`` = RMSNorm(embedding): ``h1 = f W1``, ``h2 = SiLU(e W2)``, ``z = sigmoid([h1; h2] Wz)``, and the result is
    ``z * h1 + (1 - z) * h2``. 4 H^2 + H parameters. Source: Dovetail (arXiv 2412.18934), the DGF section; the RMSNorm
    on the embedding and the missing activation on ``h1`` follow the authors' code.
    """

    def __init__(self, hidden_size: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.embedding_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.feature_proj = nn.Linear(hidden_size, hidden_size, bias=False)  # W1
        self.embedding_proj = nn.Linear(hidden_size, hidden_size, bias=False)  # W2
        self.gate_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)  # Wz
        for linear in (self.feature_proj, self.embedding_proj, self.gate_proj):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """``features`` and ``embeddings`` [..., H] -> [..., H]; the features are used as they are, not normalised."""
        feature_branch = self.feature_proj(features)
        token_branch = functional.silu(self.embedding_proj(self.embedding_norm(embeddings)))
        gate = torch.sigmoid(self.gate_proj(torch.cat((feature_branch, token_branch), dim=-1)))
        return torch.lerp(token_branch, feature_branch, gate)
