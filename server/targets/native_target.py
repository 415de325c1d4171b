"""Llama-like targets on the project's own CPU kernels: every decoder layer is one native call over packed weights.

transformers still gives the model (config, embedding, rotary angles, final norm); its decoder layers are packed one by
one to bf16, int8 or int4 and dropped. Rows come out bit-equal whatever their number and whatever stands beside them,
so drafted greedy text equals plain text exactly. transformers' own layers are the slow twin, in the tests.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels import native
from kernels.decoder_layer import LayerPass, UnsupportedLayer, decoder_layer, head_argmax
from kernels.linear_lowbit import PackedWeight, dequantise, linear
from kernels.tree_attention import Segment
from server.targets.packed_model import (
    BITS,
    PackedModel,
    check_model,
    empty_model,
    is_packed,
    load_packed_model,
    pack_model,
)
from server.targets.stock_target import stock_target, unpacked_model
from server.targets.target import TargetError
from server.targets.torch_target import LogitsHead, TorchTarget, load_transformers_model

logger = logging.getLogger(__name__)

DEFAULT_WEIGHTS = "fp32"


class NativeHead(LogitsHead):
    """The LM head, packed; the arg-max alone needs no logits matrix."""

    def __init__(self, model: Any, packed: PackedWeight) -> None:
        super().__init__(model)
        self.packed = packed
        if self.factor != 1.0 or self.cap is not None:
            raise UnsupportedLayer("logits that are scaled or capped")

    def __call__(self, features: Tensor) -> Tensor:
        """features [rows, hidden] -> logits [rows, vocabulary] in fp32."""
        return linear(features, self.packed)

    def argmax(self, features: Tensor) -> list[int]:
        """The greedy token after each row."""
        token_ids: list[int] = head_argmax(features, self.packed)[0].tolist()
        return token_ids


class NativeTarget(TorchTarget):
    """A ``TorchTarget`` whose decoder layers and head run natively. Hidden states are fp32 between the layers."""

    def __init__(self, packed: PackedModel, name: str, num_slots: int, capacity: int) -> None:
        super().__init__(packed.model, name, packed.weights, num_slots, capacity)
        self.head = NativeHead(packed.model, packed.head)
        self.packed_head = packed.head
        self.layers = packed.layers
        layers: nn.ModuleList = packed.model.base_model.layers
        for index in range(len(layers)):
            layers[index] = nn.Identity()

    @classmethod
    def load(cls, folder: Path, weights: str, num_slots: int, capacity: int) -> NativeTarget:
        """Load a folder of safetensors and pack it. Errors: TargetError naming file or setting, UnsupportedLayer."""
        if weights not in BITS:
            raise TargetError(f"weights {weights!r} have no native form; allowed are {', '.join(BITS)}")
        if native.library() is None:
            raise TargetError("the native layers are not built; `load_target` finds another way")
        return cls(pack_model(folder, weights), folder.name, num_slots, capacity)

    @functools.cached_property
    def _untied_head(self) -> Tensor:
        return dequantise(self.packed_head).to(self.embedding().dtype)

    def lm_head(self) -> Tensor:
        """[vocabulary, hidden]; where it is not the embedding, what the packed head stands for, made when asked."""
        return self.embedding() if self.model.config.tie_word_embeddings else self._untied_head

    @torch.inference_mode()
    def _forward(self, segments: Sequence[Segment], token_ids: list[int], positions: list[int]) -> Tensor:
        """Features [rows, hidden] after the final norm, fp32."""
        for segment in segments:
            self.slots.check(segment)
        base = self.model.base_model
        hidden = functional.embedding(torch.tensor(token_ids), self.embedding()).float()
        cosine, sine = base.rotary_emb(hidden[None], torch.tensor([positions]))
        row_pass = LayerPass(self.slots, segments, cosine[0], sine[0])
        for index, layer in enumerate(self.layers):
            self.tap.record(index, hidden)
            decoder_layer(hidden, layer, index, row_pass)
        features: Tensor = base.norm(hidden)
        return features


def load_target(folder: Path, weights: str | None, num_slots: int, capacity: int) -> TorchTarget:
    """The fastest target that serves ``weights``: native where kernels and architecture allow, else torch's products.

    ``weights`` None: as a packed folder was made, else fp32, which always runs transformers' own layers: it is what
    everything else is compared with. Errors: TargetError, PackedFormatError.
    """
    if is_packed(folder):
        return load_packed_target(folder, weights, num_slots, capacity)
    if weights is None or weights not in BITS:
        return TorchTarget.load(folder, weights or DEFAULT_WEIGHTS, num_slots, capacity)
    if native.library() is not None:
        reason = why_not_native(folder)
        if reason is None:
            return NativeTarget.load(folder, weights, num_slots, capacity)
        logger.warning("%s runs on transformers' own layers and torch's products: %s", folder.name, reason)
    if weights == "bf16":
        return TorchTarget.load(folder, weights, num_slots, capacity)
    return stock_target(load_transformers_model(folder, torch.bfloat16), folder.name, weights, num_slots, capacity)


def load_packed_target(folder: Path, weights: str | None, num_slots: int, capacity: int) -> TorchTarget:
    """A folder that ``dovetail convert --weights`` wrote. Errors: TargetError where other weights are asked for."""
    packed = load_packed_model(folder)
    if weights not in (None, packed.weights):
        raise TargetError(
            f"{folder} is packed in {packed.weights}; --weights {weights} needs the original folder of safetensors"
        )
    if native.library() is None:
        return stock_target(unpacked_model(packed), folder.name, packed.weights, num_slots, capacity)
    return NativeTarget(packed, folder.name, num_slots, capacity)


def why_not_native(folder: Path) -> str | None:
    """None where the native layers can run this model, else what stands in their way."""
    try:
        check_model(empty_model(folder))
    except UnsupportedLayer as error:
        return str(error)
    return None
