"""The Dovetail drafter as a network: fusion, then 1 to 6 Llama blocks. Storage of keys is the caller's affair.

Shapes: ... leading dimensions, n rows, H hidden size, D head size. Training hands in [B, T, H] and plain causal
attention; drafting hands in flattened rows [n, H] and attention over slots. Both run the same code.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from drafters.dgf import DynamicGatingFusion
from drafters.drafter import DrafterError
from drafters.linear_fusion import LinearFusion

MAX_BLOCKS = 6
FUSIONS = ("dgf", "linear")
FEATURES = ("last", "low+mid+high")

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(block, query [..., heads, n, D], key and value [..., kv heads, n, D]) -> [..., heads, n, D]."""


@dataclass(frozen=True)
class BlockConfig:
    """Shape of what every feature-level drafter is made of. ``hidden_size`` and ``vocab_size`` are the target's.

    draft_vocab_size: how many of the target's tokens can be drafted, None for all (FR-Spec, arXiv 2502.14856);
    qkv_bias: whether query, key and value have a bias, as in Qwen 2; target: which weights it was trained on (a
    fingerprint, for the reader and the server's log).
    """

    hidden_size: int
    vocab_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_blocks: int = 1
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    draft_vocab_size: int | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "vocab_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
        optional = () if self.draft_vocab_size is None else ("draft_vocab_size",)
        for name in (*sizes, "num_blocks", *optional):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
                raise DrafterError(f"{name} is {value!r}; it must be a whole number of at least 1 and below 2**31")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise DrafterError(f"{name} is {value!r}; it must be a number above 0")
        if self.num_blocks > MAX_BLOCKS:
            raise DrafterError(f"num_blocks is {self.num_blocks}; allowed are 1 to {MAX_BLOCKS}")
        if self.num_heads % self.num_kv_heads:
            raise DrafterError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                "every key head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise DrafterError(f"head_dim is {self.head_dim}; rotary positions need an even one")
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.vocab_size:
            raise DrafterError(
                f"draft_vocab_size is {self.draft_vocab_size}; allowed are 1 to the vocabulary, {self.vocab_size}"
            )


@dataclass(frozen=True)
class DovetailConfig(BlockConfig):
    """Shape of a Dovetail drafter.

    fusion: ``dgf``, the paper's, or ``linear``, EAGLE's; features: ``last``, the paper's, or ``low+mid+high``, three
    layers that a projection makes one vector (EAGLE-3); confidence: whether it also says how likely its first choice
    is accepted (DSpark).
    """

    fusion: str = "dgf"
    features: str = "last"
    confidence: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fusion not in FUSIONS:
            raise DrafterError(f"fusion is {self.fusion!r}; allowed are {', '.join(FUSIONS)}")
        if self.features not in FEATURES:
            raise DrafterError(f"features is {self.features!r}; allowed are {', '.join(FEATURES)}")

    @property
    def feature_layers(self) -> tuple[str, ...]:
        """The layers of the target that are read, in the order in which they stand side by side."""
        return tuple(self.features.split("+"))


class LlamaBlock(nn.Module):
    """One Llama decoder block: grouped-query attention with rotary positions, then SwiGLU, both residual.

    Block 0 has no norm before its attention, as in EAGLE. Query, key and value (gate and up) are one matrix each: one
    product instead of three (two) at every draft level. ``attention_width`` is what the attention reads where that is
    not the residual stream itself (EAGLE-3).
    """

    def __init__(self, config: BlockConfig, index: int, attention_width: int | None = None) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.index = index
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.attention_norm = nn.Identity() if index == 0 else nn.RMSNorm(hidden, eps=config.norm_eps)
        qkv_width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(attention_width or hidden, qkv_width, bias=config.qkv_bias)
        self.output_proj = nn.Linear(config.num_heads * config.head_dim, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, eps=config.norm_eps)
        self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        for linear in (self.qkv_proj, self.output_proj, self.gate_up_proj, self.down_proj):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(
        self,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        attend: Attention,
        attention_input: Tensor | None = None,
    ) -> Tensor:
        """``hidden`` [..., n, H] and (cos, sin) of its rows, each [n, D] -> [..., n, H].

        ``attention_input`` [..., n, attention width] replaces the normalised ``hidden`` before query, key and value.
        """
        num_heads, num_kv_heads = self.num_heads, self.num_kv_heads
        read = self.attention_norm(hidden) if attention_input is None else attention_input
        by_head = self.qkv_proj(read).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
        turned = rotate(by_head.narrow(-3, 0, num_heads + num_kv_heads), *angles)
        query, key = turned.narrow(-3, 0, num_heads), turned.narrow(-3, num_heads, num_kv_heads)
        value = by_head.narrow(-3, num_heads + num_kv_heads, num_kv_heads)
        attended = attend(self.index, query, key, value)
        hidden = hidden + self.output_proj(attended.transpose(-3, -2).flatten(-2))
        gate, up = self.gate_up_proj(self.mlp_norm(hidden)).chunk(2, dim=-1)
        output: Tensor = hidden + self.down_proj(functional.silu(gate) * up)
        return output


class FeatureNetwork(nn.Module, ABC):
    """A drafter that reads the target's features: what training and drafting ask of one.

    Subclasses give ``forward``; embedding and, unless they have their own, LM head are the target's and not part of
    the module. ``draft_ids`` [draft vocabulary] int64 names the tokens that can be drafted, in rising order.
    """

    config: BlockConfig
    feature_layers: tuple[str, ...]
    draft_ids: Tensor | None

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        size = config.draft_vocab_size
        self.register_buffer("draft_ids", None if size is None else torch.arange(size))

    @abstractmethod
    def forward(self, features: Tensor, embeddings: Tensor, angles: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        """Row i holds the feature of position i and the embedding of the token after it; all [..., n, H]."""

    def project(self, features: Tensor) -> Tensor:
        """The target's features [..., n, width of ``feature_layers``] -> [..., n, H], as ``forward`` takes them."""
        return features

    def select_head(self, lm_head: Tensor) -> Tensor:
        """The rows [draft vocabulary, H] of the target's LM head [V, H] that ``logits`` wants."""
        return lm_head if self.draft_ids is None else lm_head[self.draft_ids.to(lm_head.device)]

    def logits(self, outputs: Tensor, head: Tensor) -> Tensor:
        """Outputs [..., H] and what ``select_head`` gave -> [..., draft vocabulary]."""
        return functional.linear(outputs, head)

    def confidence(self, outputs: Tensor) -> Tensor | None:
        """Logits [...] of the acceptance of the first choice behind outputs [..., H]; None where it says nothing."""
        del outputs
        return None

    def forward_causal(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """Whole sequences [B, T, H] from position 0, as training sees them."""
        angles = rotary_table(self.config, features.shape[-2], torch.float32, features.device)
        output: Tensor = self(features, embeddings, angles, causal_attention)
        return output


class DovetailNetwork(FeatureNetwork):
    """Features and following tokens in, predicted next features out (Dovetail, arXiv 2412.18934).

    No norm follows the last block: the LM head of the target reads the output as it reads the target's own feature.
    With three feature layers a projection without bias makes them one vector; a drafted position reads the output of
    its parent as it is, as in EAGLE-3 (arXiv 2503.01840).
    """

    config: DovetailConfig

    def __init__(self, config: DovetailConfig) -> None:
        super().__init__(config)
        self.feature_layers = config.feature_layers
        self.feature_proj: nn.Linear | None = None
        if len(self.feature_layers) > 1:
            width = len(self.feature_layers) * config.hidden_size
            self.feature_proj = nn.Linear(width, config.hidden_size, bias=False)
            nn.init.xavier_uniform_(self.feature_proj.weight)
        if config.fusion == "dgf":
            self.fusion: nn.Module = DynamicGatingFusion(config.hidden_size, config.norm_eps)
        else:
            self.fusion = LinearFusion(config.hidden_size)
        self.blocks = nn.ModuleList(LlamaBlock(config, index) for index in range(config.num_blocks))
        self.confidence_proj: nn.Linear | None = None
        if config.confidence:
            self.confidence_proj = nn.Linear(config.hidden_size, 1)
            nn.init.zeros_(self.confidence_proj.weight)
            nn.init.zeros_(self.confidence_proj.bias)

    def forward(self, features: Tensor, embeddings: Tensor, angles: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        """Row i holds the feature of position i and the embedding of the token after it; all [..., n, H]."""
        hidden: Tensor = self.fusion(features, embeddings)
        for block in self.blocks:
            hidden = block(hidden, angles, attend)
        return hidden

    def confidence(self, outputs: Tensor) -> Tensor | None:
        """Logits [...] of the acceptance of the first choice behind each output [..., H]; None where not trained."""
        if self.confidence_proj is None:
            return None
        logits: Tensor = self.confidence_proj(outputs)
        return logits.squeeze(-1)

    def project(self, features: Tensor) -> Tensor:
        """``last`` [..., n, H] as it is; the three layers [..., n, 3 H] -> [..., n, H]."""
        if self.feature_proj is None:
            return features
        projected: Tensor = self.feature_proj(features)
        return projected


def causal_attention(block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Plain causal attention of whole sequences; nothing is stored, so ``block`` does not matter."""
    del block
    # Rotation in fp32 leaves query and key wider than value under autocast.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves paired as in Llama: ``vectors`` [..., heads, n, D], ``cos`` and ``sin`` [n, D].

    The sign of the half turn is folded into ``sin`` (see ``rotary_table``), which saves a negation and a copy.
    """
    return vectors * cos + vectors.roll(vectors.shape[-1] // 2, dims=-1) * sin


def rotary_table(
    config: BlockConfig, num_positions: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and signed sin of positions 0 .. num_positions - 1, each [num_positions, D]; computed in fp32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    positions = torch.arange(num_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, config.rope_theta**-exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
