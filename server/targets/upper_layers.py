"""The last decoder layers of a target, its final norm and its head on an accelerator, with their keys and values there.

transformers' own layers compute them, in fp16, bf16 or fp32, from the very numbers that the packed layers stand for, so
the model is the same one. Up go the hidden states of the rows, [rows, hidden] in the device's type, with a position and
a mask for each row; down come their features and greedy tokens. Nothing else crosses the bus in a pass.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.decoder_layer import unpack_decoder_layer
from kernels.linear_lowbit import dequantise
from kernels.tree_attention import KVSlots, Segment
from kernels.tree_attention.transformers_plugin import RowPass
from server.placement.devices import Placement
from server.targets.feature_tap import FeatureTap
from server.targets.packed_model import PackedModel


@dataclass(frozen=True)
class Split:
    """Where a target is cut: layers ``first`` .. L-1 lie at ``place``."""

    first: int
    place: Placement


@dataclass(frozen=True)
class UpperPass:
    """What a pass gives: last [rows, hidden] after the final norm, on the device; the same and the selected features
    [rows, feature width] in fp32 on the CPU."""

    last: Tensor
    here: Tensor
    features: Tensor


class Staging:
    """Page-locked memory that copies to and from a CUDA device go through, so that they need no copy in between.

    A pass waits for its results before it ends, so one buffer each way serves all of them. Other devices take plain
    memory. bytes_up and bytes_down: what has gone each way so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes_up = self.bytes_down = 0
        self.buffers: dict[tuple[bool, torch.dtype], Tensor] = {}

    def up(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the CPU, converted here, on the device; does not wait for them to arrive."""
        staged = self._buffer(True, rows.numel(), dtype).view(rows.shape).copy_(rows)
        self.bytes_up += staged.nbytes
        return staged.to(self.device, non_blocking=True)

    def down(self, rows: Tensor) -> Tensor:
        """Rows of the device on the CPU, once they are there."""
        self.bytes_down += rows.nbytes
        return self._buffer(False, rows.numel(), rows.dtype).view(rows.shape).copy_(rows)

    def _buffer(self, up: bool, size: int, dtype: torch.dtype) -> Tensor:
        buffer = self.buffers.get((up, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=dtype, pin_memory=self.device.type == "cuda")
            self.buffers[up, dtype] = buffer
        return buffer[:size]


class DeviceAngles:
    """A target's rotary angles on a device; a table of all positions is there already, where there is one."""

    def __init__(self, angles: Any, place: Placement) -> None:
        self.angles, self.place = angles, place
        table = angles.table
        self.table = None if table is None else tuple(part.to(place.device, place.dtype) for part in table)

    def __call__(self, positions: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Cosine and sine [1, rows, turned values] of each position, for each of the target's rotary tables."""
        cosine, sine, rows = self.angles(positions)
        if self.table is not None:
            cosine, sine = self.table
        index = torch.tensor(rows, device=self.place.device)
        turned = (part.to(self.place.device, self.place.dtype)[:, index][:, None] for part in (cosine, sine))
        return list(zip(*turned, strict=True))


class UpperLayers:
    """Layers on the device, filled one by one: beside what it keeps, the device holds nothing while it loads."""

    def __init__(
        self,
        packed: PackedModel,
        modules: Sequence[nn.Module],
        split: Split,
        angles: Any,
        num_slots: int,
        capacity: int,
    ) -> None:
        """``modules``: transformers' layers, without weights; ``angles``: the target's rotary angles by position.

        Errors: whatever the device raises where it is full or gone.
        """
        self.device, self.dtype, self.first = split.place.device, split.place.dtype, split.first
        self.angles = DeviceAngles(angles, split.place)
        self.staging = Staging(self.device)
        base = packed.model.base_model
        self.layers: list[Any] = []
        self.tables = [layer.form.angles or 0 for layer in packed.layers[split.first :]]
        for number, layer in enumerate(packed.layers[split.first :]):
            module: Any = copy.deepcopy(modules[split.first + number])
            module.self_attn.layer_idx = number
            unpack_decoder_layer(layer, module, self.dtype)
            self.layers.append(module.to(self.device))
        self.norm = copy.deepcopy(base.norm).to(self.device, self.dtype)
        self.head = dequantise(packed.head, self.dtype).to(self.device)
        one = packed.layers[0]
        self.slots = KVSlots(
            num_slots, capacity, len(self.layers), one.form.num_kv_heads, one.form.head_dim, self.dtype, self.device
        )

    def __call__(self, hidden: Tensor, segments: Sequence[Segment], positions: list[int], tap: FeatureTap) -> UpperPass:
        """Rows [rows, hidden] fp32 of the CPU through the layers and the norm."""
        crossed = self.staging.up(hidden, self.dtype)  # the crossing: the only line where hidden states go up
        row_pass = RowPass(self.slots, segments)
        turns = self.angles(positions)
        states = crossed[None]
        for number, layer in enumerate(self.layers):
            tap.record(self.first + number, states[0])
            states = layer(states, position_embeddings=turns[self.tables[number]], row_pass=row_pass)
        last = self.norm(states)[0]
        here = self.staging.down(last).to(torch.float32, copy=True)
        return UpperPass(last, here, tap.features(here))

    def greedy(self, last: Tensor) -> list[int]:
        """The head's choice for each row of a pass's ``last``."""
        token_ids: list[int] = functional.linear(last, self.head).argmax(dim=-1).tolist()
        return token_ids

    def logits(self, last: Tensor) -> Tensor:
        """The head's product [rows, vocabulary] fp32 on the CPU, of rows of a pass's ``last``."""
        return self.staging.down(functional.linear(last, self.head)).float()
