"""Targets on the project's own CPU kernels: all decoder layers are one native call over packed weights.

transformers still gives the model (config, embedding, rotary angles, final norm); its decoder layers are packed one by
one to fp32, bf16, int8 or int4 and dropped. Rows come out bit-equal whatever their number and neighbours,
so drafted greedy text equals plain text exactly. transformers' own layers are the slow twin, in the tests.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels import native
from kernels.decoder_layer import (
    LayerPass,
    LayerStack,
    Norm,
    UnsupportedLayer,
    decoder_layers,
    head_argmax,
    model_type,
    normalise,
    rotary_kinds,
)
from kernels.linear_lowbit import PackedWeight, dequantise, linear
from kernels.tree_attention import Segment
from server.targets.checkpoint import check_files, stored_weights
from server.targets.layer_stream import LayerStream, PromptStream, Stream
from server.targets.packed_model import (
    BITS,
    PackedModel,
    check_model,
    embedding_factor,
    empty_model,
    is_packed,
    load_packed_model,
    pack_model,
)
from server.targets.stock_target import stock_target, unpacked_model
from server.targets.target import TargetError
from server.targets.torch_target import WEIGHTS, LogitsHead, TorchTarget, load_transformers_model

logger = logging.getLogger(__name__)


class NativeHead(LogitsHead):
    """The LM head, packed; the arg-max alone needs no logits matrix."""

    def __init__(self, model: Any, packed: PackedWeight) -> None:
        super().__init__(model)
        self.packed = packed
        if self.factor <= 0:
            raise UnsupportedLayer(f"logits times {self.factor:g}, which turns their order around")

    def __call__(self, features: Tensor) -> Tensor:
        """features [rows, hidden] -> logits [rows, vocabulary] in fp32."""
        return self.finished(linear(features, self.packed))

    def argmax(self, features: Tensor) -> list[int]:
        """The greedy token after each row: of the product, whose order a factor and a cap leave as it is."""
        token_ids: list[int] = head_argmax(features, self.packed)[0].tolist()
        return token_ids


class RotaryAngles:
    """Cosines and sines by position, from tables; angles that depend on more than that are computed when asked."""

    def __init__(self, rotary_embedding: Any, kinds: Sequence[str | None], capacity: int) -> None:
        """``kinds``: one table for each; see ``rotary_kinds``."""
        self.rotary_embedding, self.kinds = rotary_embedding, kinds
        self.table: tuple[Tensor, Tensor] | None = None
        if rotary_embedding.rope_type != "dynamic":  # its every length has frequencies of its own
            self.table = self.compute(torch.arange(capacity))

    def __call__(self, positions: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Cosine and sine [kinds, n, turned values] fp32 and, for each row, which of the n turns it."""
        if self.table is None:
            return *self.compute(torch.tensor(positions)), list(range(len(positions)))
        return *self.table, positions

    @torch.inference_mode()
    def compute(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """By the model's own code."""
        like = torch.empty(1, 1, 1)  # tells the embedding type and device
        given = [{} if kind is None else {"layer_type": kind} for kind in self.kinds]
        cosines, sines = zip(*(self.rotary_embedding(like, positions[None], **which) for which in given), strict=True)
        return torch.cat(cosines), torch.cat(sines)


class NativeTarget(TorchTarget):
    """A ``TorchTarget`` whose decoder layers and head run natively. Hidden states are fp32 between the layers."""

    def __init__(
        self, packed: PackedModel, name: str, num_slots: int, capacity: int, kv_cache: str | None = None,
        stream: Stream | None = None,
    ) -> None:  # fmt: skip
        """``stream``: where blocks of prompts are read instead of here, which changes their last bits."""
        super().__init__(packed.model, name, packed.weights, num_slots, capacity, kv_cache)
        self.head = NativeHead(packed.model, packed.head)
        self.packed_head = packed.head
        self.tied = packed.tied
        base = packed.model.base_model
        layers: nn.ModuleList = base.layers
        modules = list(layers)
        for index in range(len(layers)):
            layers[index] = nn.Identity()
        self.stack = LayerStack(packed.layers)
        self.norm = Norm.of(base.norm, model_type(packed.model.config).norm_offset)
        self.factor = embedding_factor(packed.model)
        self.angles = RotaryAngles(base.rotary_emb, rotary_kinds(packed.model.config), capacity)
        self.info = dataclasses.replace(self.info, exact_rows=self.angles.table is not None)
        self.prompts: PromptStream | None = None
        if stream is not None:
            place = stream.place
            self.prompts = PromptStream(
                lambda: LayerStream(self.stack.layers, modules, place, self.angles, capacity), stream
            )
            self.info = dataclasses.replace(self.info, stream_block=self.prompts.block)

    @classmethod
    def load(
        cls, folder: Path, weights: str, num_slots: int, capacity: int, kv_cache: str | None = None
    ) -> NativeTarget:
        """Load a folder of safetensors and pack it. Errors: TargetError naming file or setting, UnsupportedLayer."""
        if weights not in BITS:
            raise TargetError(f"weights {weights!r} have no native form; allowed are {', '.join(BITS)}")
        if native.library() is None:
            raise TargetError("the native layers are not built; `load_target` finds another way")
        return cls(pack_model(folder, weights), folder.name, num_slots, capacity, kv_cache)

    def lm_head(self) -> Tensor:
        """[vocabulary, hidden]; where it is not the embedding, what the packed head stands for.

        That is made anew at every call and kept by the caller alone: a drafter packs its own and needs it no longer.
        """
        return self.embedding() if self.tied else dequantise(self.packed_head).to(self.embedding().dtype)

    @torch.inference_mode()
    def _forward(self, segments: Sequence[Segment], token_ids: list[int], positions: list[int]) -> Tensor:
        """Features [rows, hidden] after the final norm, fp32."""
        hidden, row_pass = self._begin(segments, token_ids, positions)
        self._run(hidden, row_pass, range(len(self.stack)))
        return normalise(hidden, self.norm)

    def _begin(
        self, segments: Sequence[Segment], token_ids: list[int], positions: list[int]
    ) -> tuple[Tensor, LayerPass]:
        """The rows' embeddings [rows, hidden] fp32, and the pass that they go on."""
        for segment in segments:
            self.slots.check(segment)
        hidden = functional.embedding(torch.tensor(token_ids), self.embedding()).float()
        if self.factor != 1.0:
            hidden *= self.factor
        return hidden, LayerPass(self.slots, segments, *self.angles(positions))

    def _run(self, hidden: Tensor, row_pass: LayerPass, layers: range) -> None:
        """Rows through these layers, in place; wanted inputs of layers are kept."""
        if self.prompts is not None and layers.start == 0:
            was_read = self.prompts.read(hidden, row_pass, layers, self.tap)
            self.info = dataclasses.replace(self.info, stream_block=self.prompts.block)
            if was_read:
                return
        done = layers.start
        for index in sorted(self.tap.wanted.keys() & set(layers)):
            decoder_layers(hidden, self.stack, row_pass, range(done, index))
            self.tap.record(index, hidden)
            done = index
        decoder_layers(hidden, self.stack, row_pass, range(done, layers.stop))


CreateNative = Callable[[PackedModel, str, int, int, str | None], NativeTarget]
"""From a packed model, a name, slots, capacity and the cache's type to a target on the native layers."""


def load_target(
    folder: Path, weights: str | None, num_slots: int, capacity: int, kv_cache: str | None = None,
    create: CreateNative = NativeTarget,
) -> TorchTarget:  # fmt: skip
    """The one way from a folder to a target: slots, a backbone (native where the kernels compute it) and a head.

    ``weights`` None: as stored. Where the native layers do not compute the architecture, or are not built,
    transformers' own layers run, on torch's products; that is said once, with its cost. Errors: TargetError,
    PackedFormatError.
    """
    if is_packed(folder):
        return load_packed_target(folder, weights, num_slots, capacity, kv_cache, create)
    check_files(folder)
    weights = weights or stored_weights(folder)
    if weights not in BITS:
        raise TargetError(f"weights {weights!r} are not available; allowed are {', '.join(BITS)}")
    reason = why_not_native(folder)
    if reason is None:
        return create(pack_model(folder, weights), folder.name, num_slots, capacity, kv_cache)
    logger.warning(
        "%s runs on transformers' own layers and torch's products, several times slower than the native layers at "
        "several rows, and its rows are not bit-equal: %s", folder.name, reason,
    )  # fmt: skip
    if weights in WEIGHTS:
        return TorchTarget.load(folder, weights, num_slots, capacity, kv_cache)
    model = load_transformers_model(folder, torch.bfloat16)
    return stock_target(model, folder.name, weights, num_slots, capacity, kv_cache)


def load_packed_target(
    folder: Path, weights: str | None, num_slots: int, capacity: int, kv_cache: str | None, create: CreateNative
) -> TorchTarget:
    """A folder that ``dovetail convert --weights`` wrote. Errors: TargetError where other weights are asked for."""
    packed = load_packed_model(folder)
    if weights not in (None, packed.weights):
        raise TargetError(
            f"{folder} is packed in {packed.weights}; --weights {weights} needs the original folder of safetensors"
        )
    if native.library() is None:
        return stock_target(unpacked_model(packed), folder.name, packed.weights, num_slots, capacity, kv_cache)
    return create(packed, folder.name, num_slots, capacity, kv_cache)


def why_not_native(folder: Path) -> str | None:
    """None where the native layers can run this model, else what stands in their way."""
    if native.library() is None:
        return "the native layers are not built"
    try:
        check_model(empty_model(folder))
    except UnsupportedLayer as error:
        return str(error)
    return None
