"""int8 and int4 targets without native kernels: transformers' own layers, their products on torch's low-bit operators.

Slower than the native layers and without their promise of bit-equal rows, but on any machine and any architecture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kernels.decoder_layer import unpack_decoder_layer
from kernels.linear_lowbit import dequantise
from kernels.linear_lowbit.stock import replace_linears
from server.targets.packed_model import BITS, PackedModel
from server.targets.torch_target import TorchTarget


def stock_target(
    model: Any, name: str, weights: str, num_slots: int, capacity: int, kv_cache: str | None = None
) -> TorchTarget:
    """A model in bf16 becomes a target in ``weights``.

    Every linear layer of the base model is quantised, one after the other. The head stays in bf16, because drafters
    and tied embeddings share it. Errors: TargetError for an architecture that cannot be a target.
    """
    if BITS[weights] <= 8:
        replace_linears(model.base_model, BITS[weights])
    return TorchTarget.checked(model, name, weights, num_slots, capacity, kv_cache)


def unpacked_model(packed: PackedModel) -> Any:
    """transformers' model with what the packed weights stand for, in bf16."""
    model = packed.model
    for index, layer in enumerate(packed.layers):
        unpack_decoder_layer(layer, model.base_model.layers[index], torch.bfloat16)
    head = model.base_model.embed_tokens.weight
    if not packed.tied:
        head = nn.Parameter(dequantise(packed.head).to(torch.bfloat16), requires_grad=False)
    model.lm_head.weight = head
    return model
