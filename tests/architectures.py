"""Tiny models of every architecture whose layers are native, with random weights that make each of its parts matter."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

SIZES: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
WIDE = {"head_dim": 32}
GEMMA = SIZES | WIDE | {"query_pre_attn_scalar": 20, "final_logit_softcapping": 6.0, "sliding_window": 24}
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "factor": 2.0,
    "original_max_position_embeddings": 256, "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SIZES | WIDE, sliding_window=70),
    "qwen2": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=41, max_window_layers=2),
    "qwen3": lambda: Qwen3Config(**SIZES | WIDE),
    "gemma2": lambda: Gemma2Config(**GEMMA, attn_logit_softcapping=3.0),
    "gemma3_text": lambda: Gemma3TextConfig(
        **GEMMA, rope_parameters=GEMMA3_ROPE, layer_types=["sliding_attention"] * 3 + ["full_attention"]
    ),
    "phi3": lambda: Phi3Config(**SIZES, rope_parameters=LONG_ROPE, sliding_window=33),
    "granite": lambda: GraniteConfig(
        **SIZES, embedding_multiplier=3.0, attention_multiplier=0.4, residual_multiplier=0.7, logits_scaling=2.0
    ),
    "smollm3": lambda: SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 0]),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "glm4": lambda: Glm4Config(**SIZES | WIDE, attention_bias=True),
    "stablelm": lambda: StableLmConfig(**SIZES, use_qkv_bias=True),
}


def tiny_model(name: str, **changes: Any) -> Any:
    """transformers' model in fp32, with its own attention."""
    config = ARCHITECTURES[name]()
    for setting, value in changes.items():
        setattr(config, setting, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        is_norm = "norm" in parameter_name and "weight" in parameter_name
        deviation = 0.5 if "embed" in parameter_name else 0.3 if parameter.ndim == 1 else 0.15
        parameter.copy_(torch.randn_like(parameter) * deviation + (is_norm and "gemma" not in name))
    return model
