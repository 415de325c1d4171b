"""What a decoder layer of transformers computes, read off its configuration, and where it keeps its weights.

The configuration tells activation, windows, caps, factors and rotary tables; the modules that are there tell where
norms stand and what is joined. A row of `MODEL_TYPES` holds what neither says. Whatever else a layer has is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SILU, GELU_TANH = "silu", "gelu_tanh"
ACTIVATIONS = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU_TANH}  # by transformers' names


class UnsupportedLayer(ValueError):
    """The layer computes something that the native layer does not; run it with transformers' own code."""


@dataclass(frozen=True)
class LayerForm:
    """What a layer computes beyond its weights.

    epsilon: of its norms; centred: those of the residual stream take off the mean (LayerNorm); whole_norms: those of
    queries and keys are over all heads together. scale: of the scores, which score_cap bounds, cap * tanh(s / cap).
    window: each row sees so many positions, its own the last; None: all before it. angles: which of a pass's tables
    turns queries and keys; None: none does. residual_scale: of what is added to the stream.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    epsilon: float
    scale: float
    activation: str = SILU
    window: int | None = None
    angles: int | None = 0
    score_cap: float | None = None
    residual_scale: float = 1.0
    whole_norms: bool = False
    centred: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"a row sees at least its own position; a window of {self.window} has none")
        if self.score_cap is not None and not self.score_cap > 0:
            raise ValueError(f"a cap of scores is positive, not {self.score_cap}")


@dataclass(frozen=True)
class ModelType:
    """What a configuration's ``model_type`` means beyond its other entries.

    norm_offset: added to every norm's weight. window_everywhere: ``sliding_window`` holds for every layer. capped:
    ``attn_logit_softcapping`` is heeded. side_by_side: the two values of a rotary pair are neighbours. hands_on:
    transformers' layers hand what they are called with on to their attention, so that they too can run row by row.
    """

    norm_offset: float = 0.0
    window_everywhere: bool = False
    capped: bool = False
    side_by_side: bool = False
    hands_on: bool = True


# Every one is compared with transformers' own layer in the tests.
MODEL_TYPES = {
    "llama": ModelType(),
    "mistral": ModelType(window_everywhere=True),
    "qwen2": ModelType(),
    "qwen3": ModelType(),
    "gemma2": ModelType(norm_offset=1.0, capped=True),
    "gemma3_text": ModelType(norm_offset=1.0),
    "phi3": ModelType(window_everywhere=True),
    "granite": ModelType(),
    "smollm3": ModelType(),
    "olmo2": ModelType(),
    "glm4": ModelType(side_by_side=True),
    "stablelm": ModelType(hands_on=False),
}


def model_type(config: Any) -> ModelType:
    """The table's row. Raises UnsupportedLayer for a type that is not in it."""
    kind = config.model_type
    if kind not in MODEL_TYPES:
        raise UnsupportedLayer(f"layers of {kind} models are not native; those of {', '.join(MODEL_TYPES)} are")
    return MODEL_TYPES[kind]


def rotary_kinds(config: Any) -> tuple[str | None, ...]:
    """Names of the rotary tables that layers choose from; one without a name where all share it."""
    parameters: Mapping[str, Any] = config.rope_parameters
    return (None,) if "rope_type" in parameters else tuple(sorted(set(config.layer_types)))


@dataclass(frozen=True)
class Norm:
    """RMSNorm of rows, or LayerNorm where ``centred``: weight and bias [width] fp32."""

    weight: Tensor
    epsilon: float
    bias: Tensor | None = None
    centred: bool = False

    @classmethod
    def of(cls, module: Any, offset: float) -> Norm:
        """A norm of transformers, on the CPU, whose weights lack ``offset``."""
        bias = getattr(module, "bias", None)
        return cls(
            vector(module.weight) + offset, epsilon(module), None if bias is None else vector(bias), centred(module)
        )


def vector(values: Tensor) -> Tensor:
    """fp32, on its own."""
    return values.detach().float().contiguous().clone()


def epsilon(norm: Any) -> float:
    """By either of the names that transformers' norms give it."""
    value: float = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return value


def centred(norm: nn.Module) -> bool:
    """Whether it takes off the mean."""
    return isinstance(norm, nn.LayerNorm)


@dataclass(frozen=True)
class LayerParts:
    """Names of the layer's modules. norms: by the packed layer's field."""

    qkv: tuple[str, ...]
    gate_up: tuple[str, ...]
    norms: dict[str, str]
    output: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"

    @property
    def matrices(self) -> dict[str, tuple[str, ...]]:
        """By the packed layer's field, in the order of their use; those of a field read the same input."""
        return {"qkv": self.qkv, "output": (self.output,), "gate_up": self.gate_up, "down": (self.down,)}

    @property
    def all(self) -> set[str]:
        """Every module named here."""
        return {name for names in self.matrices.values() for name in names} | set(self.norms.values())


# Where norms stand, by the names of transformers' modules: the first row whose modules are all there.
_NORM_PLACES = (
    {
        "input_norm": "input_layernorm", "attention_out_norm": "post_attention_layernorm",
        "post_norm": "pre_feedforward_layernorm", "mlp_out_norm": "post_feedforward_layernorm",
    },
    {
        "input_norm": "input_layernorm", "attention_out_norm": "post_self_attn_layernorm",
        "post_norm": "post_attention_layernorm", "mlp_out_norm": "post_mlp_layernorm",
    },
    {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"},
    {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"},
)  # fmt: skip
_HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}


def layer_parts(layer: nn.Module) -> LayerParts:
    """Where the layer's weights are. Raises UnsupportedLayer for modules that are not there or not known."""
    modules = {name for name, module in layer.named_modules() if list(module.parameters(recurse=False))}
    qkv: tuple[str, ...] = ("self_attn.qkv_proj",)
    if not modules.issuperset(qkv):
        qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up: tuple[str, ...] = ("mlp.gate_up_proj",)
    if not modules.issuperset(gate_up):
        gate_up = ("mlp.gate_proj", "mlp.up_proj")
    places = next((row for row in _NORM_PLACES if modules.issuperset(row.values())), {})
    heads = _HEAD_NORMS if modules.issuperset(_HEAD_NORMS.values()) else {}
    parts = LayerParts(qkv, gate_up, places | heads)
    if not places or parts.all != modules:
        odd = ", ".join(sorted(parts.all ^ modules)) or "no norms"
        raise UnsupportedLayer(f"{type(layer).__name__} is put together in another way ({odd})")
    return parts


def layer_form(layer: nn.Module) -> LayerForm:
    """What the layer computes. Raises UnsupportedLayer, saying why, where the native layer does not compute that."""
    attention: Any = layer.self_attn
    config = attention.config
    kind, parts, name = model_type(config), layer_parts(layer), type(layer).__name__
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        raise UnsupportedLayer(f"{name} with activation {activation!r}; native are {', '.join(ACTIVATIONS)}")
    if attention.head_dim % 16:
        raise UnsupportedLayer(f"{name} with heads of {attention.head_dim}; the native layer takes multiples of 16")
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedLayer(f"{name} that looks ahead (use_bidirectional_attention)")
    tables = rotary_kinds(config)
    table = 0 if len(tables) == 1 else tables.index(attention.layer_type)
    query_norm = parts.norms.get("query_norm")
    width = attention.head_dim if query_norm is None else layer.get_parameter(f"{query_norm}.weight").numel()
    first = layer.get_submodule(next(iter(parts.norms.values())))
    return LayerForm(
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=attention.head_dim,
        epsilon=epsilon(first),
        scale=attention.scaling,
        activation=ACTIVATIONS[activation],
        window=config.sliding_window if kind.window_everywhere else getattr(attention, "sliding_window", None),
        angles=table if getattr(attention, "use_rope", True) else None,
        score_cap=attention.attn_logit_softcapping if kind.capped else None,
        residual_scale=getattr(layer, "residual_multiplier", 1.0),
        whole_norms=width != attention.head_dim,
        centred=centred(first),
    )


def row_order(layer: nn.Module, form: LayerForm) -> Tensor | None:
    """Where the rows of the native qkv lie in transformers'; None: they are the same.

    Neighbours of a rotary pair come apart: the first of each into one half of the turned values, the second into the
    other. Scores do not change by it.
    """
    attention: Any = layer.self_attn
    if not model_type(attention.config).side_by_side:
        return None
    rotary_dim = int(form.head_dim * attention.config.rope_parameters.get("partial_rotary_factor", 1.0))
    turned = torch.arange(rotary_dim).reshape(-1, 2).T.flatten()
    head = torch.cat((turned, torch.arange(rotary_dim, form.head_dim)))
    turned_heads = form.num_heads + form.num_kv_heads
    starts = torch.arange(turned_heads)[:, None] * form.head_dim
    rest = torch.arange(turned_heads * form.head_dim, (turned_heads + form.num_kv_heads) * form.head_dim)
    return torch.cat(((starts + head).flatten(), rest))
