"""A decoder layer of transformers, packed: four matrices, norms and biases, and the structure native code reads."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.linear_lowbit import PackedWeight, PackingError, dequantise, pack, packing_error
from kernels.native import PackedDescriptor

# Layers whose forward is exactly: norm, q/k/v (biases, q/k norms over the head), rope, attention, output, add, norm,
# SwiGLU, add. Others share these attribute names and mean something else, so names decide.
SUPPORTED_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


_MOST_PARTS = 3  # of a joined matrix: q, k, v


class UnsupportedLayer(ValueError):
    """The layer computes something that the native layer does not; run it with transformers' own code."""


class JoinedDescriptor(ctypes.Structure):
    """`struct Joined` of csrc/layer.h."""

    _fields_ = [("parts", PackedDescriptor * _MOST_PARTS), ("count", ctypes.c_int64)]

    @classmethod
    def of(cls, parts: tuple[PackedWeight, ...]) -> JoinedDescriptor:
        """Of matrices that share their input."""
        return cls((PackedDescriptor * _MOST_PARTS)(*(part.descriptor for part in parts)), len(parts))


class LayerDescriptor(ctypes.Structure):
    """`struct Layer` of csrc/layer.h."""

    _fields_ = [
        ("qkv", JoinedDescriptor), ("gate_up", JoinedDescriptor),
        ("output", PackedDescriptor), ("down", PackedDescriptor),
        ("input_norm", ctypes.c_void_p), ("post_norm", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p), ("key_norm", ctypes.c_void_p),
        ("qkv_bias", ctypes.c_void_p), ("output_bias", ctypes.c_void_p),
        ("gate_up_bias", ctypes.c_void_p), ("down_bias", ctypes.c_void_p),
        ("num_heads", ctypes.c_int32), ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32), ("rotary_dim", ctypes.c_int32),
        ("epsilon", ctypes.c_float), ("scale", ctypes.c_float),
    ]  # fmt: skip


@dataclass(frozen=True)
class PackedDecoderLayer:
    """One layer. q, k and v are joined, and gate and up: one matrix, whose input is encoded once, or several in order
    where their formats differ."""

    qkv: tuple[PackedWeight, ...]  # together [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
    output: PackedWeight  # [hidden, num_heads * head_dim]
    gate_up: tuple[PackedWeight, ...]  # together [2 * intermediate, hidden]
    down: PackedWeight  # [hidden, intermediate]
    input_norm: Tensor | None  # fp32, as all vectors here; None: attention reads the residual stream as it is
    post_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    qkv_bias: Tensor | None
    output_bias: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    epsilon: float
    scale: float

    def __post_init__(self) -> None:
        wanted = {
            "qkv": (self.qkv, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim),
            "gate_up": (self.gate_up, 2 * self.down.in_features),
        }
        for name, (parts, out_features) in wanted.items():
            shapes = [[part.out_features, part.in_features] for part in parts]
            if not 1 <= len(parts) <= _MOST_PARTS or len({width for _, width in shapes}) != 1:
                raise ValueError(f"{name} must be 1 to {_MOST_PARTS} matrices of the same inputs, got {shapes}")
            if (total := sum(part.out_features for part in parts)) != out_features:
                raise ValueError(f"the matrices of {name} must have {out_features} outputs together, got {total}")

    @property
    def matrices(self) -> tuple[PackedWeight, ...]:
        """All packed matrices in the order of their use."""
        return (*self.qkv, self.output, *self.gate_up, self.down)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed matrices."""
        return sum(weight.data.numel() for weight in self.matrices)

    @functools.cached_property
    def descriptor(self) -> LayerDescriptor:
        """What native code is handed; valid as long as this object lives."""
        vectors = (
            self.input_norm, self.post_norm, self.query_norm, self.key_norm,
            self.qkv_bias, self.output_bias, self.gate_up_bias, self.down_bias,
        )  # fmt: skip
        return LayerDescriptor(
            JoinedDescriptor.of(self.qkv), JoinedDescriptor.of(self.gate_up),
            self.output.descriptor, self.down.descriptor,
            *(None if vector is None else vector.data_ptr() for vector in vectors),
            self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim, self.epsilon, self.scale,
        )  # fmt: skip


def check_layer(layer: nn.Module) -> None:
    """Raises UnsupportedLayer, saying why, for a layer that `pack_decoder_layer` cannot take over."""
    kind = type(layer).__name__
    if kind not in SUPPORTED_LAYERS:
        raise UnsupportedLayer(f"{kind} is not one of {', '.join(SUPPORTED_LAYERS)}")
    attention: Any = layer.self_attn
    config = attention.config
    if config.hidden_act != "silu":
        raise UnsupportedLayer(f"{kind} with activation {config.hidden_act!r}; the native layer computes silu")
    window = getattr(attention, "sliding_window", None)
    if kind == "MistralDecoderLayer":
        window = getattr(config, "sliding_window", None)
    if window is not None:
        raise UnsupportedLayer(f"{kind} with a sliding window of {window}; the native layer attends to all keys")
    if attention.head_dim % 16:
        raise UnsupportedLayer(f"{kind} with heads of {attention.head_dim}; the native layer takes multiples of 16")
    if getattr(config, "partial_rotary_factor", None) not in (None, 1.0):
        raise UnsupportedLayer(f"{kind} that rotates only part of each head ({config.partial_rotary_factor})")


def _joined_weight(*projections: Any) -> Tensor:
    return torch.cat([projection.weight.detach() for projection in projections])


def _vector(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().float().contiguous().clone()


def _joined_bias(*projections: Any) -> Tensor | None:
    if all(projection.bias is None for projection in projections):
        return None
    parts = [
        torch.zeros(projection.out_features) if projection.bias is None else projection.bias.detach().float()
        for projection in projections
    ]
    return _vector(torch.cat(parts))


def pack_decoder_layer(layer: nn.Module, bits: int, group_size: int = 32) -> PackedDecoderLayer:
    """Packs one decoder layer of a transformers model to 4, 8, 16 (bf16) or 32 bits. The module is left as it is.

    Pack layer by layer and drop each module, and the peak is the packed weights and two layers. Raises UnsupportedLayer
    for an architecture that the native layer does not compute, ValueError for weights that have no packed form. A
    matrix whose inputs do not divide into groups stays in bf16.
    """

    def packed(names: Sequence[str]) -> tuple[PackedWeight, ...]:
        joined = _joined_weight(*(layer.get_submodule(name) for name in names))
        fits = bits > 8 or joined.shape[1] % group_size == 0
        return (pack(joined, bits if fits else 16, group_size),)

    return assemble_decoder_layer(layer, packed)


def assemble_decoder_layer(
    layer: nn.Module, matrices: Callable[[Sequence[str]], tuple[PackedWeight, ...]]
) -> PackedDecoderLayer:
    """A layer from packed matrices that lie elsewhere; only norms and biases are read from the module.

    ``matrices`` gives one packed matrix for the names of the projections that read the same input, such as
    ``("mlp.gate_proj", "mlp.up_proj")``, or one for each where their formats differ.
    Raises UnsupportedLayer as ``pack_decoder_layer`` does.
    """
    check_layer(layer)
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    norms: Any = (layer.input_layernorm, layer.post_attention_layernorm)
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    input_norm, post_norm = (_vector(norm.weight) for norm in norms)
    assert input_norm is not None and post_norm is not None
    return PackedDecoderLayer(
        qkv=matrices(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        output=matrices(("self_attn.o_proj",))[0],
        gate_up=matrices(("mlp.gate_proj", "mlp.up_proj")),
        down=matrices(("mlp.down_proj",))[0],
        input_norm=input_norm,
        post_norm=post_norm,
        query_norm=None if query_norm is None else _vector(query_norm.weight),
        key_norm=None if key_norm is None else _vector(key_norm.weight),
        qkv_bias=_joined_bias(attention.q_proj, attention.k_proj, attention.v_proj),
        output_bias=_joined_bias(attention.o_proj),
        gate_up_bias=_joined_bias(mlp.gate_proj, mlp.up_proj),
        down_bias=_joined_bias(mlp.down_proj),
        **_numbers(attention, norms[0]),
    )


def packing_errors(layer: nn.Module, packed: PackedDecoderLayer) -> dict[str, PackingError]:
    """Each packed matrix of the layer against the module's weights; joined ones as one."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    originals = {
        "qkv": (_joined_weight(attention.q_proj, attention.k_proj, attention.v_proj), packed.qkv),
        "output": (attention.o_proj.weight, (packed.output,)),
        "gate_up": (_joined_weight(mlp.gate_proj, mlp.up_proj), packed.gate_up),
        "down": (mlp.down_proj.weight, (packed.down,)),
    }
    return {name: packing_error(original, *parts) for name, (original, parts) in originals.items()}


_JOINED = ("qkv", "gate_up")
_EVERY_LAYER_HAS = (*_JOINED, "output", "down", "input_norm", "post_norm")  # of transformers' layers


def layer_tensors(layer: PackedDecoderLayer, prefix: str) -> dict[str, PackedWeight | Tensor]:
    """What `save_packed` stores of a layer; its numbers come from the model's config again.

    Named `prefix.field`, the further parts of a joined matrix `prefix.field.1` and `.2`.
    """
    found: dict[str, PackedWeight | Tensor] = {}
    for field in dataclasses.fields(layer):
        value = getattr(layer, field.name)
        if isinstance(value, PackedWeight | Tensor):
            found[f"{prefix}.{field.name}"] = value
        elif field.name in _JOINED:
            found |= {f"{prefix}.{_part_name(field.name, i)}": part for i, part in enumerate(value)}
    return found


def _part_name(field: str, part: int) -> str:
    return field if part == 0 else f"{field}.{part}"


def _is_there(value: PackedWeight | Tensor | tuple[PackedWeight, ...] | None) -> bool:
    return len(value) > 0 if isinstance(value, tuple) else value is not None


def layer_from_tensors(
    weights: Mapping[str, PackedWeight | Tensor], prefix: str, module: nn.Module
) -> PackedDecoderLayer:
    """The inverse of `layer_tensors`. `module` is the layer of a model made from the config, on the meta device say."""
    check_layer(module)
    attention: Any = module.self_attn
    norm: Any = module.input_layernorm
    tensors: dict[str, Any] = {}
    for field in dataclasses.fields(PackedDecoderLayer):
        if field.name in _JOINED:
            names = [f"{prefix}.{_part_name(field.name, i)}" for i in range(_MOST_PARTS)]
            tensors[field.name] = tuple(weights[name] for name in names if name in weights)
        elif field.type in ("PackedWeight", "Tensor", "Tensor | None"):
            tensors[field.name] = weights.get(f"{prefix}.{field.name}")
        if field.name in _EVERY_LAYER_HAS and not _is_there(tensors[field.name]):
            raise ValueError(f"the packed checkpoint holds no {prefix}.{field.name}")
    return PackedDecoderLayer(**tensors, **_numbers(attention, norm))


def _numbers(attention: Any, norm: Any) -> dict[str, Any]:
    return {
        "num_heads": attention.q_proj.out_features // attention.head_dim,
        "num_kv_heads": attention.k_proj.out_features // attention.head_dim,
        "head_dim": attention.head_dim,
        "epsilon": norm.variance_epsilon,
        "scale": attention.scaling,
    }


def unpack_decoder_layer(packed: PackedDecoderLayer, module: nn.Module, dtype: torch.dtype) -> None:
    """Gives a layer of transformers, on the meta device say, the weights that the packed layer stands for.

    They lie where the packed layer's bytes lie, and are no part of those.
    """
    attention: Any = module.self_attn
    mlp: Any = module.mlp
    norms: Any = (module.input_layernorm, module.post_attention_layernorm)
    for projections, parts, bias in (
        ((attention.q_proj, attention.k_proj, attention.v_proj), packed.qkv, packed.qkv_bias),
        ((attention.o_proj,), (packed.output,), packed.output_bias),
        ((mlp.gate_proj, mlp.up_proj), packed.gate_up, packed.gate_up_bias),
        ((mlp.down_proj,), (packed.down,), packed.down_bias),
    ):
        matrices = [dequantise(part, dtype) for part in parts]
        whole = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        sizes = [projection.out_features for projection in projections]
        for projection, part in zip(projections, torch.split(whole, sizes), strict=True):
            projection.weight = nn.Parameter(part, requires_grad=False)
        if bias is not None:
            for projection, vector in zip(projections, torch.split(bias, sizes), strict=True):
                if projection.bias is not None:
                    projection.bias = nn.Parameter(vector.to(dtype, copy=True), requires_grad=False)
    assert packed.input_norm is not None, "every layer of transformers has one"
    for norm, values in zip(norms, (packed.input_norm, packed.post_norm), strict=True):
        norm.weight = nn.Parameter(values.to(dtype, copy=True), requires_grad=False)
    if packed.query_norm is not None and packed.key_norm is not None:
        attention.q_norm.weight = nn.Parameter(packed.query_norm.to(dtype, copy=True), requires_grad=False)
        attention.k_norm.weight = nn.Parameter(packed.key_norm.to(dtype, copy=True), requires_grad=False)
