"""A GGUF file as a target: on the native layers with the file's own codes, else dequantised on transformers' layers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels import native
from kernels.decoder_layer import PackedDecoderLayer, UnsupportedLayer, assemble_decoder_layer
from kernels.linear_lowbit import PackedWeight
from server.targets.checkpoint import HEAD
from server.targets.gguf.configuration import read_configuration
from server.targets.gguf.header import open_gguf
from server.targets.gguf.weights import GGUFWeights, file_weights, pack_parts, set_parameter
from server.targets.native_target import CreateNative, NativeTarget
from server.targets.packed_model import PackedModel, check_model, model_of, pack_from
from server.targets.target import TargetError
from server.targets.torch_target import WEIGHTS, TorchTarget

logger = logging.getLogger(__name__)


def load_gguf_target(
    path: Path, weights: str | None, num_slots: int, capacity: int, kv_cache: str | None = None,
    create: CreateNative = NativeTarget,
) -> TorchTarget:  # fmt: skip
    """``weights`` None: the file's own codes; fp32 and bf16 dequantise them, int8 and int4 repack.

    Errors: TargetError naming the file and what in it is wrong or not read.
    """
    name = path.name.removesuffix(".gguf")
    model, source = open_model(path)
    reason = why_not_native(model)
    if reason is None:
        packed = pack_stored(model, source) if weights is None else pack_from(model, source, weights)
        # The embedding of a file as stored is held in fp32; keys and values need not be for that.
        return create(packed, name, num_slots, capacity, kv_cache or ("bf16" if weights is None else None))
    if weights not in (None, *WEIGHTS):
        raise TargetError(f"{path} cannot be run with --weights {weights}: {reason}")
    if weights is None:
        logger.warning("%s is dequantised to fp32 and runs on transformers' own layers: %s", path.name, reason)
    weights = weights or "fp32"
    model = dequantised_model(model, source, WEIGHTS[weights])
    return TorchTarget.checked(model, name, weights, num_slots, capacity, kv_cache)


def load_dequantised(path: Path, dtype: torch.dtype) -> Any:
    """transformers' model with every weight of the file in ``dtype``. Errors: TargetError."""
    return dequantised_model(*open_model(path), dtype)


def open_model(path: Path) -> tuple[Any, GGUFWeights]:
    """transformers' model without weights, and where they come from. Errors: TargetError."""
    file = open_gguf(path)
    model = model_of(read_configuration(file), path)
    source = GGUFWeights(file, model.config)
    scale_frequencies(model.base_model.rotary_emb, source)
    return model, source


def why_not_native(model: Any) -> str | None:
    """None where the native layers can run this model, else what stands in their way."""
    if native.library() is None:
        return "the native layers are not built"
    try:
        check_model(model)
    except UnsupportedLayer as error:
        return str(error)
    return None


def pack_stored(model: Any, source: GGUFWeights) -> PackedModel:
    """Fill a model without weights, layer by layer, with the file's own codes."""
    base, prefix = model.base_model, model.base_model_prefix
    for name in ("embed_tokens", "norm"):
        source.fill(getattr(base, name), f"{prefix}.{name}", torch.float32)
    tied = HEAD not in source
    if tied:
        model.lm_head.weight = base.embed_tokens.weight
    layers = [pack_layer(source, layer, f"{prefix}.layers.{index}") for index, layer in enumerate(base.layers)]
    head = source.matrix(f"{prefix}.embed_tokens.weight" if tied else HEAD, base.embed_tokens.weight.shape)
    source.tell_unused()
    return PackedModel(model, layers, pack_parts([head])[0], file_weights(source.file), tied)


def pack_layer(source: GGUFWeights, layer: nn.Module, prefix: str) -> PackedDecoderLayer:
    """One layer; the module holds nothing afterwards."""
    for name, parameter in list(layer.named_parameters()):
        if parameter.ndim == 1:  # norms and biases
            set_parameter(layer, name, source.read(f"{prefix}.{name}", parameter.shape).float())

    def matrices(projections: Sequence[str]) -> tuple[PackedWeight, ...]:
        names = [f"{projection}.weight" for projection in projections]
        return pack_parts([source.matrix(f"{prefix}.{name}", layer.get_parameter(name).shape) for name in names])

    packed = assemble_decoder_layer(layer, matrices)
    source.file.forget_pages()
    layer.to("meta")
    return packed


def dequantised_model(model: Any, source: GGUFWeights, dtype: torch.dtype) -> Any:
    """transformers' model with every weight of the file in ``dtype``."""
    base, prefix = model.base_model, model.base_model_prefix
    source.fill(base, prefix, dtype)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = base.embed_tokens.weight
    else:
        source.fill(model.lm_head, "lm_head", dtype)
    return model


def scale_frequencies(rotary_embedding: Any, source: GGUFWeights) -> None:
    """Divide the rotary frequencies by the file's factors."""
    factors = source.rope_factors()
    if factors is None:
        return
    if factors.shape != rotary_embedding.inv_freq.shape:
        raise TargetError(
            f"{source.file.path}: rope_freqs.weight is {list(factors.shape)}, which does not fit the heads"
        )
    rotary_embedding.inv_freq = rotary_embedding.inv_freq / factors
