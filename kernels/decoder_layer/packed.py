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

from kernels.decoder_layer.form import (
    GELU_TANH,
    SILU,
    LayerForm,
    LayerParts,
    Norm,
    layer_form,
    layer_parts,
    model_type,
    row_order,
    vector,
)
from kernels.linear_lowbit import PackedWeight, PackingError, dequantise, pack, packing_error
from kernels.native import PackedDescriptor

_MOST_PARTS = 3  # of a joined matrix: q, k, v
_VECTORS = (
    "input_norm", "post_norm", "attention_out_norm", "mlp_out_norm", "input_norm_bias", "post_norm_bias",
    "query_norm", "key_norm", "qkv_bias", "output_bias", "gate_up_bias", "down_bias",
)  # fmt: skip
_ACTIVATIONS = {SILU: 0, GELU_TANH: 1}  # `Activation` of csrc/layer.h


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
        *((name, ctypes.c_void_p) for name in _VECTORS),
        ("num_heads", ctypes.c_int32), ("num_kv_heads", ctypes.c_int32), ("head_dim", ctypes.c_int32),
        ("window", ctypes.c_int32), ("angles", ctypes.c_int32), ("activation", ctypes.c_int32),
        ("whole_norms", ctypes.c_int32), ("centred", ctypes.c_int32),
        ("epsilon", ctypes.c_float), ("scale", ctypes.c_float),
        ("score_cap", ctypes.c_float), ("residual_scale", ctypes.c_float),
    ]  # fmt: skip


@dataclass(frozen=True)
class PackedDecoderLayer:
    """One layer. q, k and v are joined, and gate and up: one matrix, whose input is encoded once, or several in order
    where their formats differ."""

    qkv: tuple[PackedWeight, ...]  # together [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
    output: PackedWeight  # [hidden, num_heads * head_dim]
    gate_up: tuple[PackedWeight, ...]  # together [2 * intermediate, hidden]
    down: PackedWeight  # [hidden, intermediate]
    form: LayerForm
    input_norm: Tensor | None = None  # fp32, as all vectors here; None: attention reads the residual stream as it is
    post_norm: Tensor | None = None  # the same of the feed-forward
    attention_out_norm: Tensor | None = None  # of what attention gives, before it is added to the stream
    mlp_out_norm: Tensor | None = None
    input_norm_bias: Tensor | None = None
    post_norm_bias: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __post_init__(self) -> None:
        wanted = {
            "qkv": (self.qkv, (self.form.num_heads + 2 * self.form.num_kv_heads) * self.form.head_dim),
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

    def parts_of(self, field: str) -> tuple[PackedWeight, ...]:
        """A field that holds a matrix, or several that share their input."""
        value: PackedWeight | tuple[PackedWeight, ...] = getattr(self, field)
        return value if isinstance(value, tuple) else (value,)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed matrices."""
        return sum(weight.data.numel() for weight in self.matrices)

    @functools.cached_property
    def descriptor(self) -> LayerDescriptor:
        """What native code is handed; valid as long as this object lives."""
        vectors = (getattr(self, name) for name in _VECTORS)
        form = self.form
        return LayerDescriptor(
            JoinedDescriptor.of(self.qkv), JoinedDescriptor.of(self.gate_up),
            self.output.descriptor, self.down.descriptor,
            *(None if vector is None else vector.data_ptr() for vector in vectors),
            form.num_heads, form.num_kv_heads, form.head_dim,
            form.window or 0, -1 if form.angles is None else form.angles, _ACTIVATIONS[form.activation],
            form.whole_norms, form.centred, form.epsilon, form.scale, form.score_cap or 0.0, form.residual_scale,
        )  # fmt: skip


def pack_decoder_layer(layer: nn.Module, bits: int, group_size: int = 32) -> PackedDecoderLayer:
    """Packs one decoder layer of a transformers model to 4, 8, 16 (bf16) or 32 bits. The module is left as it is.

    Pack layer by layer and drop each module, and the peak is the packed weights and two layers. Raises UnsupportedLayer
    for an architecture that the native layer does not compute, ValueError for weights that have no packed form. A
    matrix whose inputs do not divide into groups stays in bf16.
    """
    order = row_order(layer, layer_form(layer))

    def packed(names: Sequence[str]) -> tuple[PackedWeight, ...]:
        joined = _joined_weight(layer, names, order)
        fits = bits > 8 or joined.shape[1] % group_size == 0
        return (pack(joined, bits if fits else 16, group_size),)

    return assemble_decoder_layer(layer, packed)


def assemble_decoder_layer(
    layer: nn.Module, matrices: Callable[[Sequence[str]], tuple[PackedWeight, ...]]
) -> PackedDecoderLayer:
    """A layer from packed matrices that lie elsewhere; only norms and biases are read from the module.

    ``matrices`` gives one packed matrix for the names of the projections that read the same input, such as
    ``("mlp.gate_proj", "mlp.up_proj")``, or one for each where their formats differ; the rows of qkv in the order of
    ``row_order``. Raises UnsupportedLayer as ``pack_decoder_layer`` does.
    """
    form, parts = layer_form(layer), layer_parts(layer)
    qkv, output, gate_up, down = map(matrices, parts.matrices.values())
    return PackedDecoderLayer(qkv, output[0], gate_up, down[0], form, **_vectors(layer, form, parts))


def _vectors(layer: nn.Module, form: LayerForm, parts: LayerParts) -> dict[str, Tensor]:
    """Norms, whole, and biases, by field; a field without one is left out."""
    attention: Any = layer.self_attn
    offset, order = model_type(attention.config).norm_offset, row_order(layer, form)
    found: dict[str, Tensor] = {}
    for field, name in parts.norms.items():
        norm = Norm.of(layer.get_submodule(name), offset)
        found[field] = norm.weight
        if norm.bias is not None:
            found[f"{field}_bias"] = norm.bias
    for field, names in parts.matrices.items():
        bias = _joined_bias(layer, names, order)
        if bias is not None:
            found[f"{field}_bias"] = bias
    return found


def _joined_weight(layer: nn.Module, names: Sequence[str], order: Tensor | None) -> Tensor:
    """The rows of these projections behind one another; those of q, k and v in ``order``."""
    return _ordered(torch.cat([layer.get_parameter(f"{name}.weight").detach() for name in names]), names, order)


def _ordered(rows: Tensor, names: Sequence[str], order: Tensor | None) -> Tensor:
    """The rows of these projections, in ``order`` where they are q, k and v."""
    return rows[order] if order is not None and _is_qkv(names) else rows


def _is_qkv(names: Sequence[str]) -> bool:
    return names[0] in ("self_attn.q_proj", "self_attn.qkv_proj")


def _joined_bias(layer: nn.Module, names: Sequence[str], order: Tensor | None) -> Tensor | None:
    projections: list[Any] = [layer.get_submodule(name) for name in names]
    if all(projection.bias is None for projection in projections):
        return None
    parts = [
        torch.zeros(projection.out_features) if projection.bias is None else vector(projection.bias)
        for projection in projections
    ]
    return _ordered(torch.cat(parts), names, order)


def packing_errors(layer: nn.Module, packed: PackedDecoderLayer) -> dict[str, PackingError]:
    """Each packed matrix of the layer against the module's weights; joined ones as one."""
    order = row_order(layer, packed.form)
    return {
        field: packing_error(_joined_weight(layer, names, order), *packed.parts_of(field))
        for field, names in layer_parts(layer).matrices.items()
    }


_JOINED = ("qkv", "gate_up")


def layer_tensors(layer: PackedDecoderLayer, prefix: str) -> dict[str, PackedWeight | Tensor]:
    """What `save_packed` stores of a layer; its form comes from the model's config again.

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


def layer_from_tensors(
    weights: Mapping[str, PackedWeight | Tensor], prefix: str, module: nn.Module
) -> PackedDecoderLayer:
    """The inverse of `layer_tensors`. `module` is the layer of a model made from the config, on the meta device say."""
    form, parts = layer_form(module), layer_parts(module)
    for name in (*parts.matrices, *parts.norms):
        if f"{prefix}.{name}" not in weights:
            raise ValueError(f"the packed checkpoint holds no {prefix}.{name}")
    tensors: dict[str, Any] = {
        name: weights[f"{prefix}.{name}"] for name in ("output", "down", *_VECTORS) if f"{prefix}.{name}" in weights
    }
    for field in _JOINED:
        names = [f"{prefix}.{_part_name(field, i)}" for i in range(_MOST_PARTS)]
        tensors[field] = tuple(weights[name] for name in names if name in weights)
    return PackedDecoderLayer(**tensors, form=form)


def unpack_decoder_layer(packed: PackedDecoderLayer, module: nn.Module, dtype: torch.dtype) -> None:
    """Gives a layer of transformers, on the meta device say, the weights that the packed layer stands for.

    They lie where the packed layer's bytes lie, and are no part of those.
    """
    attention: Any = module.self_attn
    offset, order = model_type(attention.config).norm_offset, row_order(module, packed.form)
    parts = layer_parts(module)
    for field, names in parts.matrices.items():
        rows = order if _is_qkv(names) else None
        whole = _given_back(torch.cat([dequantise(part, dtype) for part in packed.parts_of(field)]), rows)
        projections: list[Any] = [module.get_submodule(name) for name in names]
        sizes = [projection.out_features for projection in projections]
        for projection, part in zip(projections, torch.split(whole, sizes), strict=True):
            projection.weight = nn.Parameter(part, requires_grad=False)
        bias = getattr(packed, f"{field}_bias")
        if bias is not None:
            for projection, values in zip(projections, torch.split(_given_back(bias, rows), sizes), strict=True):
                if projection.bias is not None:
                    projection.bias = nn.Parameter(values.to(dtype, copy=True), requires_grad=False)
    for field, name in parts.norms.items():
        norm: Any = module.get_submodule(name)
        norm.weight = nn.Parameter((getattr(packed, field) - offset).to(dtype), requires_grad=False)
        if getattr(norm, "bias", None) is not None:
            norm.bias = nn.Parameter(getattr(packed, f"{field}_bias").to(dtype, copy=True), requires_grad=False)


def _given_back(rows: Tensor, order: Tensor | None) -> Tensor:
    """The rows that were taken in this order, in their own."""
    return rows if order is None else rows[order.argsort().to(rows.device)]
