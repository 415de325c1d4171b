"""Llama-like targets on the project's own CPU kernels: all decoder layers are one native call over packed weights.

transformers still gives the model (config, embedding, rotary angles, final norm); its decoder layers are packed one by
one to bf16, int8 or int4 and dropped. Rows come out bit-equal whatever their number and whatever stands beside them,
so drafted greedy text equals plain text exactly. transformers' own layers are the slow twin, in the tests.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels import native
from kernels.decoder_layer import (
    LayerPass,
    LayerStack,
    UnsupportedLayer,
    check_layer,
    decoder_layers,
    head_argmax,
    pack_decoder_layer,
    rms_norm,
)
from kernels.linear_lowbit import PackedWeight, linear, pack
from kernels.tree_attention import Segment
from server.targets.target import TargetError
from server.targets.torch_target import LogitsHead, TorchTarget, load_transformers_model

logger = logging.getLogger(__name__)

BITS = {"bf16": 16, "int8": 8, "int4": 4}
LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")  # their frequencies change with the longest position of a pass
HEAD_BITS = 8  # an int4 head costs more accuracy than the bytes it saves (ours); it is read once a pass


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


class RotaryAngles:
    """Cosines and sines by position: read from a table, where the model's rotary embedding depends on nothing else."""

    def __init__(self, rotary_embedding: Any, capacity: int) -> None:
        self.rotary_embedding = rotary_embedding
        self.table: tuple[Tensor, Tensor] | None = None
        if rotary_embedding.rope_type not in LENGTH_DEPENDENT_ROPES:
            self.table = self.compute(torch.arange(capacity))

    def __call__(self, positions: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Cosine and sine [n, head size] fp32 and, for each row, which of them turns it."""
        if self.table is None:
            return *self.compute(torch.tensor(positions)), list(range(len(positions)))
        return *self.table, positions

    @torch.inference_mode()
    def compute(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """By the model's own code."""
        like = torch.empty(1, 1, 1)  # tells the embedding type and device
        cosine, sine = self.rotary_embedding(like, positions[None])
        return cosine[0], sine[0]


class NativeTarget(TorchTarget):
    """A ``TorchTarget`` whose decoder layers and head run natively. Hidden states are fp32 between the layers."""

    def __init__(self, model: Any, name: str, weights: str, num_slots: int, capacity: int) -> None:
        super().__init__(model, name, weights, num_slots, capacity)
        bits = BITS[weights]
        self.head = NativeHead(model, pack(self.lm_head(), max(bits, HEAD_BITS)))
        packed = []
        layers: nn.ModuleList = model.base_model.layers
        for index, layer in enumerate(layers):
            packed.append(pack_decoder_layer(layer, bits))
            layers[index] = nn.Identity()
        self.stack = LayerStack(packed)
        norm = model.base_model.norm
        self.norm_weight, self.norm_epsilon = norm.weight.detach().float().clone(), norm.variance_epsilon
        self.angles = RotaryAngles(model.base_model.rotary_emb, capacity)

    @classmethod
    def load(cls, folder: Path, weights: str, num_slots: int, capacity: int) -> NativeTarget:
        """Load a folder of safetensors and pack it. Errors: TargetError naming file or setting, UnsupportedLayer."""
        if weights not in BITS:
            raise TargetError(f"weights {weights!r} have no native form; allowed are {', '.join(BITS)}")
        if native.library() is None:
            raise TargetError(
                f"weights {weights} need the native kernels, which are not built here: with a C++20 compiler at hand, "
                "`pip install --editable .` builds them; or use --weights fp32"
            )
        model = load_transformers_model(folder, torch.bfloat16)
        for layer in model.base_model.layers:
            check_layer(layer)
        reference = TorchTarget(model, folder.name, "bf16", 1, 4)
        reference.self_check()
        return cls(model, folder.name, weights, num_slots, capacity)

    @torch.inference_mode()
    def _forward(self, segments: Sequence[Segment], token_ids: list[int], positions: list[int]) -> Tensor:
        """Features [rows, hidden] after the final norm, fp32."""
        for segment in segments:
            self.slots.check(segment)
        hidden = functional.embedding(torch.tensor(token_ids), self.embedding()).float()
        row_pass = LayerPass(self.slots, segments, *self.angles(positions))
        done = 0
        for index in sorted(self.tap.wanted):
            decoder_layers(hidden, self.stack, row_pass, range(done, index))
            self.tap.record(index, hidden)
            done = index
        decoder_layers(hidden, self.stack, row_pass, range(done, len(self.stack)))
        return rms_norm(hidden, self.norm_weight, self.norm_epsilon)


def load_target(folder: Path, weights: str, num_slots: int, capacity: int) -> TorchTarget:
    """The fastest target that serves ``weights``: native where kernels and architecture allow, else transformers'.

    fp32 always runs transformers' own layers: it is what everything else is compared with.
    """
    if weights in BITS and (native.library() is not None or weights != "bf16"):
        try:
            return NativeTarget.load(folder, weights, num_slots, capacity)
        except UnsupportedLayer as error:
            if weights != "bf16":
                raise TargetError(f"{folder} cannot be served in {weights}: {error}; use bf16 or fp32") from error
            logger.info("%s runs on transformers' own layers: %s", folder.name, error)
    return TorchTarget.load(folder, weights, num_slots, capacity)
