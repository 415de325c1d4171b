"""A GGUF file as a target: on the native layers with the file's own codes, else dequantised on transformers' layers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels import native
from kernels.decoder_layer import PackedDecoderLayer, UnsupportedLayer, assemble_decoder_layer, pack_decoder_layer
from kernels.linear_lowbit import PackedWeight, pack
from kernels.tree_attention.transformers_plugin import UnsupportedArchitecture
from server.targets.gguf.configuration import read_configuration
from server.targets.gguf.header import open_gguf
from server.targets.gguf.weights import GGUFWeights, file_weights, joined
from server.targets.native_target import NativeTarget
from server.targets.packed_model import BITS, GROUP_SIZE, HEAD_BITS, PackedModel, check_model, model_of
from server.targets.target import TargetError
from server.targets.torch_target import WEIGHTS, TorchTarget

logger = logging.getLogger(__name__)


def load_gguf_target(
    path: Path, weights: str | None, num_slots: int, capacity: int, kv_cache: str | None = None
) -> TorchTarget:
    """``weights`` None: the file's own; bf16, int8 and int4 repack them, fp32 runs transformers' layers.

    Errors: TargetError naming the file and what in it is wrong or not read.
    """
    file = open_gguf(path)
    name = path.name.removesuffix(".gguf")
    model = model_of(read_configuration(file), path)
    source = GGUFWeights(file, model.config)
    reason = why_not_native(model, weights)
    if reason is None:
        return NativeTarget(pack_gguf(model, source, weights), name, num_slots, capacity, kv_cache or "bf16")
    if weights not in (None, *WEIGHTS):
        raise TargetError(f"{path} cannot be run with --weights {weights}: {reason}")
    if weights is None:
        logger.warning("%s is dequantised to fp32 and runs on transformers' own layers: %s", path.name, reason)
    target = TorchTarget(
        dequantised_model(model, source, WEIGHTS[weights or "fp32"]),
        name,
        weights or "fp32",
        num_slots,
        capacity,
        kv_cache,
    )
    try:
        target.self_check()
    except UnsupportedArchitecture as error:
        raise TargetError(f"{path} cannot be a target: {error}") from error
    return target


def why_not_native(model: Any, weights: str | None) -> str | None:
    """None where the native layers can run this model, else what stands in their way."""
    if weights == "fp32":
        return "fp32 is asked for"
    if native.library() is None:
        return "the native layers are not built"
    try:
        check_model(model)
    except UnsupportedLayer as error:
        return str(error)
    return None


def pack_gguf(model: Any, source: GGUFWeights, weights: str | None) -> PackedModel:
    """Fill a model without weights, layer by layer; its matrices as stored, or repacked to ``weights``."""
    base, prefix = model.base_model, model.base_model_prefix
    for name in ("embed_tokens", "norm"):
        source.fill(getattr(base, name), f"{prefix}.{name}", torch.float32)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = base.embed_tokens.weight
    scale_frequencies(base.rotary_emb, source)
    layers = [pack_layer(source, layer, f"{prefix}.layers.{index}", weights) for index, layer in enumerate(base.layers)]
    head = f"{prefix}.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    packed = (
        joined([source.matrix(head)]) if weights is None else repacked(source, [head], max(BITS[weights], HEAD_BITS))
    )
    if (packed.out_features, packed.in_features) != tuple(base.embed_tokens.weight.shape):
        raise TargetError(f"{source.file.path}: the tensor {source.stored(head).name} does not fit the embedding")
    return PackedModel(model, layers, packed, weights or file_weights(source.file), model.config.tie_word_embeddings)


def pack_layer(source: GGUFWeights, layer: nn.Module, prefix: str, weights: str | None) -> PackedDecoderLayer:
    """One layer; the module holds nothing afterwards."""
    fill_vectors(source, layer, prefix)

    def matrices(projections: Sequence[str]) -> tuple[PackedWeight, ...]:
        names = [f"{prefix}.{projection}.weight" for projection in projections]
        for name, projection in zip(names, projections, strict=True):
            source.check_shape(name, layer.get_parameter(f"{projection}.weight"))
        return (joined([source.matrix(name) for name in names]),)

    if weights is None:
        packed = assemble_decoder_layer(layer, matrices)
    else:
        source.fill(layer, prefix)
        packed = pack_decoder_layer(layer, BITS[weights], GROUP_SIZE)
    layer.to("meta")
    return packed


def fill_vectors(source: GGUFWeights, layer: nn.Module, prefix: str) -> None:
    """Norms and biases, fp32."""
    for name, parameter in list(layer.named_parameters()):
        if parameter.ndim == 1:
            owner, _, last = name.rpartition(".")
            source.check_shape(f"{prefix}.{name}", parameter)
            values = source.read(f"{prefix}.{name}").float()
            setattr(layer.get_submodule(owner), last, nn.Parameter(values, requires_grad=False))


def repacked(source: GGUFWeights, names: Sequence[str], bits: int) -> PackedWeight:
    """Matrices in another precision than the file's."""
    return pack(torch.cat([source.read(name) for name in names]), bits, GROUP_SIZE)


def dequantised_model(model: Any, source: GGUFWeights, dtype: torch.dtype) -> Any:
    """transformers' model with every weight of the file in ``dtype``."""
    base, prefix = model.base_model, model.base_model_prefix
    source.fill(base, prefix, dtype)
    scale_frequencies(base.rotary_emb, source)
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
