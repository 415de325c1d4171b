"""Llama-like models packed layer by layer: from a folder of safetensors, into a packed folder, and back from it.

The model is made without weights; one layer at a time is filled from the files (by memory map), packed and emptied
again. So the peak is the packed weights and two layers, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
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
    check_layer,
    layer_from_tensors,
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
# Models that are: embedding, decoder layers, norm, head, with nothing between. Names decide, as for the layers.
SUPPORTED_MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

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
    if type(model).__name__ not in SUPPORTED_MODELS:
        raise UnsupportedLayer(f"{type(model).__name__} is not one of {', '.join(SUPPORTED_MODELS)}")
    for layer in model.base_model.layers:
        check_layer(layer)


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
    tensors: dict[str, PackedWeight | Tensor] = {
        "embedding": base.embed_tokens.weight.detach(),
        "norm": base.norm.weight.detach(),
        "head": packed.head,
    }
    for index, layer in enumerate(packed.layers):
        tensors |= layer_tensors(layer, f"layers.{index}")
    partial = folder / f"{PACKED_FILE}.partial"
    save_packed(partial, tensors)
    partial.replace(folder / PACKED_FILE)


def load_packed_model(folder: Path) -> PackedModel:
    """Read a packed folder by memory map: pages come from the disk when first used.

    Errors: PackedFormatError for a file of another version or one that does not fit config.json.
    """
    file = folder / PACKED_FILE
    stored = load_packed(file)
    model = empty_model(folder)
    check_model(model)
    base = model.base_model
    for module, name in ((base.embed_tokens, "embedding"), (base.norm, "norm")):
        tensor = stored.get(name)
        if not isinstance(tensor, Tensor) or tensor.shape != module.weight.shape:
            raise PackedFormatError(f"{file} does not fit config.json: {name} should be {list(module.weight.shape)}")
        module.weight = nn.Parameter(tensor, requires_grad=False)
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


Shapes = list[tuple[int, ...] | None]  # matrices [out, in], then vectors, None where there is none


def _shapes(packed: PackedDecoderLayer) -> Shapes:
    joined = (packed.qkv, (packed.output,), packed.gate_up, (packed.down,))
    vectors = (
        packed.qkv_bias, packed.output_bias, packed.gate_up_bias, packed.down_bias,
        packed.input_norm, packed.post_norm, packed.query_norm, packed.key_norm,
    )  # fmt: skip
    matrices: Shapes = [(sum(part.out_features for part in parts), parts[0].in_features) for parts in joined]
    return matrices + [None if vector is None else tuple(vector.shape) for vector in vectors]


def _wanted_shapes(layer: Any) -> Shapes:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    joined: list[tuple[Any, ...]] = [qkv, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)]
    outputs = [sum(part.out_features for part in parts) for parts in joined]
    matrices: Shapes = [(out, parts[0].in_features) for out, parts in zip(outputs, joined, strict=True)]
    has_bias = [any(part.bias is not None for part in parts) for parts in joined]
    biases: Shapes = [(out,) if given else None for out, given in zip(outputs, has_bias, strict=True)]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return matrices + biases + [None if norm is None else tuple(norm.weight.shape) for norm in norms]
