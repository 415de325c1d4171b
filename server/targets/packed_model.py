"""Models packed layer by layer: from a folder of safetensors, into a packed folder, and back from it.

The model is made without weights; one layer at a time is filled from the files (by memory map), packed and emptied
again. So the peak is the packed weights and two layers, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from kernels.decoder_layer import (
    PackedDecoderLayer,
    UnsupportedLayer,
    layer_form,
    layer_from_tensors,
    layer_parts,
    layer_tensors,
    pack_decoder_layer,
)
from kernels.linear_lowbit import DamagedWeight, PackedFormatError, PackedWeight, load_packed, pack, save_packed
from kernels.tree_attention.transformers_plugin import ATTENTION_NAME
from server.targets.checkpoint import HEAD, MALFORMED, ModelFiles, read_config, reason_of
from server.targets.rope import check_frequencies
from server.targets.target import TargetError

PACKED_FILE = "packed.safetensors"
BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
HEAD_BITS = 8  # an int4 head costs more accuracy than the bytes it saves (ours); it is read once a pass
GROUP_SIZE = 32
OWN_TENSORS = {"embedding": "embed_tokens.weight", "norm": "norm.weight", "norm_bias": "norm.bias"}
BASE_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")

LayerStep = Callable[[int, nn.Module], None]
PackedStep = Callable[[int, nn.Module, PackedDecoderLayer], None]


class WeightFiles(Protocol):
    """Weights by transformers' names, read when asked. Errors: TargetError for what is missing or does not fit."""

    def __contains__(self, name: str) -> bool:
        """Whether this tensor is stored."""
        ...

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype | None = None) -> None:
        """Give ``module``, which the whole model knows as ``prefix``, its weights: in ``dtype``, or as they are."""
        ...

    def read(self, name: str, shape: torch.Size | None = None) -> Tensor:
        """One tensor, which must have this shape."""
        ...

    def tell_unused(self) -> None:
        """Name in the log what nothing read."""
        ...


@dataclass(frozen=True)
class PackedModel:
    """``model``: transformers' model with embedding, rotary angles and final norm; its layers hold no weights.

    tied: the head is the embedding; a folder that stores a head of its own has it untied, whatever its config says.
    """

    model: Any
    layers: list[PackedDecoderLayer]
    head: PackedWeight
    weights: str
    tied: bool

    @property
    def packed_bytes(self) -> int:
        """Bytes of all packed matrices, the head included."""
        return sum(layer.packed_bytes for layer in self.layers) + self.head.data.numel()


def is_packed(folder: Path) -> bool:
    """Whether ``dovetail convert --weights`` made this folder."""
    return (folder / PACKED_FILE).is_file()


def empty_model(folder: Path) -> Any:
    """The model that config.json describes, with our attention and without weights (on the meta device).

    Errors: TargetError for a config that is no causal language model or whose weights are quantised already.
    """
    config = read_config(folder)
    return model_of(config, folder)


def model_of(config: Any, source: Path) -> Any:
    """The model of a configuration, without weights. Errors: TargetError, naming ``source``, for no language model."""
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=ATTENTION_NAME, trust_remote_code=False
            ).eval()
    except MALFORMED as error:
        raise TargetError(f"{source} cannot be loaded as a causal language model: {reason_of(error)}") from error
    check_frequencies(model, source)
    return model


def check_model(model: Any) -> None:
    """Raises UnsupportedLayer, saying why, for a model that cannot be packed whole."""
    if missing := [part for part in BASE_PARTS if not hasattr(model.base_model, part)]:
        raise UnsupportedLayer(f"{type(model).__name__} is put together in another way: it has no {missing[0]}")
    for layer in model.base_model.layers:
        layer_form(layer)


def embedding_factor(model: Any) -> float:
    """What the rows of the embedding are multiplied by (Gemma, Granite), in the precision of its weights."""
    table = model.get_input_embeddings()
    scale: Tensor | None = getattr(table, "embed_scale", None)
    if scale is not None:
        return float(scale.to(table.weight.dtype))
    return float(getattr(model.config, "embedding_multiplier", 1.0))


def pack_model(
    folder: Path,
    weights: str,
    group_size: int = GROUP_SIZE,
    prepare: LayerStep | None = None,
    inspect: PackedStep | None = None,
) -> PackedModel:
    """Pack a folder of safetensors to ``fp32``, ``bf16``, ``int8`` or ``int4``.

    ``prepare`` may change each filled layer before it is packed (activation-aware scaling); ``inspect`` sees each with
    its packed form. Errors: TargetError naming file or weight, UnsupportedLayer, ValueError for shapes without groups.
    """
    model = empty_model(folder)
    check_model(model)
    return pack_from(model, ModelFiles(folder, model.base_model_prefix), weights, group_size, prepare, inspect)


def pack_from(
    model: Any,
    files: WeightFiles,
    weights: str,
    group_size: int = GROUP_SIZE,
    prepare: LayerStep | None = None,
    inspect: PackedStep | None = None,
) -> PackedModel:
    """Fill a model without weights from its files, whatever they are, and pack it; see ``pack_model``."""
    base, prefix = model.base_model, model.base_model_prefix
    for name in ("embed_tokens", "norm"):
        files.fill(getattr(base, name), f"{prefix}.{name}", torch.float32 if weights == "fp32" else torch.bfloat16)
    layers = []
    for index, layer in enumerate(base.layers):
        files.fill(layer, f"{prefix}.layers.{index}")
        if prepare is not None:
            prepare(index, layer)
        with named_damage(f"layer {index}"):
            layers.append(pack_decoder_layer(layer, BITS[weights], group_size))
        if inspect is not None:
            inspect(index, layer, layers[-1])
        layer.to("meta")
    tied = model.config.tie_word_embeddings and HEAD not in files
    head = base.embed_tokens.weight if tied else files.read(HEAD, base.embed_tokens.weight.shape)
    if tied:
        model.lm_head.weight = base.embed_tokens.weight
    files.tell_unused()
    bits = max(BITS[weights], HEAD_BITS)
    with named_damage("the head"):
        packed_head = pack(head, bits if bits > 8 or head.shape[1] % group_size == 0 else 16, group_size)
    return PackedModel(model, layers, packed_head, weights, tied)


@contextlib.contextmanager
def named_damage(part: str) -> Iterator[None]:
    """Errors: TargetError that names the part of the model where a weight is damaged."""
    try:
        yield
    except DamagedWeight as error:
        raise TargetError(f"{part} of the model: {error}; the files are damaged, fetch them again") from error


def save_packed_model(packed: PackedModel, folder: Path) -> None:
    """Write the packed weights into ``folder``; config and tokenizer are the caller's business."""
    base = packed.model.base_model
    tensors: dict[str, PackedWeight | Tensor] = {name: values.detach() for name, values in _own_tensors(base).items()}
    tensors["head"] = packed.head
    for index, layer in enumerate(packed.layers):
        tensors |= layer_tensors(layer, f"layers.{index}")
    partial = folder / f"{PACKED_FILE}.partial"
    save_packed(partial, tensors)
    partial.replace(folder / PACKED_FILE)


def _own_tensors(base: Any) -> dict[str, Tensor]:
    """What a base model holds beside its layers, by the names of a packed folder."""
    parameters = dict(base.named_parameters())
    return {name: parameters[place] for name, place in OWN_TENSORS.items() if place in parameters}


def load_packed_model(folder: Path) -> PackedModel:
    """Read a packed folder by memory map: pages come from the disk when first used.

    Errors: PackedFormatError for a file of another version or one that does not fit config.json.
    """
    file = folder / PACKED_FILE
    stored = load_packed(file)
    model = empty_model(folder)
    check_model(model)
    base = model.base_model
    for name, wanted in _own_tensors(base).items():
        tensor = stored.get(name)
        if not isinstance(tensor, Tensor) or tensor.shape != wanted.shape:
            raise PackedFormatError(f"{file} does not fit config.json: {name} should be {list(wanted.shape)}")
        module, _, part = OWN_TENSORS[name].partition(".")
        setattr(getattr(base, module), part, nn.Parameter(tensor, requires_grad=False))
    try:
        layers = [layer_from_tensors(stored, f"layers.{index}", layer) for index, layer in enumerate(base.layers)]
    except ValueError as error:
        raise PackedFormatError(f"{file} does not fit config.json: {error}") from error
    head = stored.get("head")
    for index, (layer, packed) in enumerate(zip(base.layers, layers, strict=True)):
        if _shapes(packed) != _wanted_shapes(layer):
            raise PackedFormatError(f"{file} does not fit config.json: layer {index} has other shapes")
    if not isinstance(head, PackedWeight) or (head.out_features, head.in_features) != base.embed_tokens.weight.shape:
        raise PackedFormatError(f"{file} does not fit config.json: the head is missing or has another shape")
    if model.config.tie_word_embeddings:
        model.lm_head.weight = base.embed_tokens.weight
    names = {bits: name for name, bits in BITS.items()}
    return PackedModel(model, layers, head, names[layers[0].qkv[0].bits], model.config.tie_word_embeddings)


Shapes = dict[str, tuple[int, ...]]  # matrices [out, in] and vectors, by field


def _shapes(packed: PackedDecoderLayer) -> Shapes:
    shapes: Shapes = {}
    for field in dataclasses.fields(packed):
        value = getattr(packed, field.name)
        if isinstance(value, Tensor):
            shapes[field.name] = tuple(value.shape)
        elif isinstance(value, PackedWeight | tuple):
            parts = packed.parts_of(field.name)
            shapes[field.name] = (sum(part.out_features for part in parts), parts[0].in_features)
    return shapes


def _wanted_shapes(layer: Any) -> Shapes:
    parts = layer_parts(layer)
    shapes: Shapes = {}
    for field, names in parts.matrices.items():
        projections = [layer.get_submodule(name) for name in names]
        shapes[field] = (sum(part.out_features for part in projections), projections[0].in_features)
        if any(part.bias is not None for part in projections):
            shapes[f"{field}_bias"] = shapes[field][:1]
    for field, name in parts.norms.items():
        norm = layer.get_submodule(name)
        shapes[field] = tuple(norm.weight.shape)
        if getattr(norm, "bias", None) is not None:
            shapes[f"{field}_bias"] = shapes[field]
    return shapes
