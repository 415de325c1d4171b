"""Long prompts read by an accelerator that has no room for the layers: they pass through it, one behind the other.

For a block of a prompt each layer's packed weights are copied up, unpacked and run there by transformers' own layer,
with the keys and values of the positions before; the block's own come down into the slots. While a layer computes, the
next is on its way. The device's numbers are not the CPU's to the last bit, so what is read this way may depend on
nothing but the prompt itself: whole blocks at multiples of their size, from the beginning on, or none. Source: weight
streaming for large batches is llama.cpp's (pull request 6083); the rule of fixed blocks is ours.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.decoder_layer import LayerPass, PackedDecoderLayer, unpack_decoder_layer
from kernels.linear_lowbit import PackedWeight
from kernels.tree_attention import KVSlots, Segment, causal_segment
from kernels.tree_attention.transformers_plugin import RowPass
from server.placement.devices import Placement, is_device_failure
from server.placement.recovery import Recovery
from server.targets.feature_tap import FeatureTap
from server.targets.upper_layers import DeviceAngles, Staging

logger = logging.getLogger(__name__)

ALIGNED = 64  # bytes, at which every tensor of a layer begins


@dataclass(frozen=True)
class Stream:
    """Prompts are read at ``place``, in whole blocks of ``block`` positions."""

    place: Placement
    block: int


class WeightBuffer:
    """A layer's packed weights on the way up: page-locked memory here, as much on the device, a queue of its own."""

    def __init__(self, size: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.device = device
        self.here = torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda)
        self.there = torch.empty(size, dtype=torch.uint8, device=device)
        cuda: Any = torch.cuda  # whose constructors have no types
        self.queue = cuda.Stream(device) if is_cuda else None
        self.arrived = cuda.Event() if is_cuda else None
        self.unpacked = cuda.Event() if is_cuda else None
        self.layer: PackedDecoderLayer | None = None

    def send(self, layer: PackedDecoderLayer) -> int:
        """Begin to copy a layer up, once what the buffer held before is of no more use; the bytes that go."""
        if self.arrived is not None:
            self.arrived.synchronize()
        stop = 0

        def place(kept: Tensor) -> Tensor:
            nonlocal stop
            start, stop = stop, stop + -(-kept.nbytes // ALIGNED) * ALIGNED
            self.here[start : start + kept.nbytes].copy_(kept.view(torch.uint8).flatten())
            return self.there[start : start + kept.nbytes].view(kept.dtype).view(kept.shape)

        self.layer = with_tensors(layer, place)
        if self.queue is None or self.arrived is None or self.unpacked is None:
            self.there[:stop].copy_(self.here[:stop])
            return stop
        with torch.cuda.stream(self.queue):
            self.unpacked.wait(self.queue)
            self.there[:stop].copy_(self.here[:stop], non_blocking=True)
            self.arrived.record(self.queue)
        return stop

    def unpack(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Give a layer of transformers the weights that were sent."""
        assert self.layer is not None
        if self.arrived is not None:
            self.arrived.wait(torch.cuda.current_stream(self.device))
        unpack_decoder_layer(self.layer, module, dtype)
        if self.unpacked is not None:
            self.unpacked.record(torch.cuda.current_stream(self.device))


def with_tensors(layer: PackedDecoderLayer, place: Callable[[Tensor], Tensor]) -> PackedDecoderLayer:
    """The same layer with every tensor replaced by what ``place`` gives for it."""

    def placed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return place(value)
        if isinstance(value, PackedWeight):
            return dataclasses.replace(value, data=place(value.data))
        return tuple(map(placed, value)) if isinstance(value, tuple) else value

    return dataclasses.replace(layer, **{f.name: placed(getattr(layer, f.name)) for f in dataclasses.fields(layer)})


def buffer_bytes(layer: PackedDecoderLayer) -> int:
    """What a layer takes in a ``WeightBuffer``."""
    total = 0

    def count(kept: Tensor) -> Tensor:
        nonlocal total
        total += -(-kept.nbytes // ALIGNED) * ALIGNED
        return kept

    with_tensors(layer, count)
    return total


class LayerStream:
    """Two buffers of weights, one layer's keys and values, and what carries rows to the device and back."""

    def __init__(
        self, layers: Sequence[PackedDecoderLayer], modules: Sequence[nn.Module], place: Placement, angles: Any,
        capacity: int,
    ) -> None:  # fmt: skip
        """``modules``: transformers' layers, without weights. Errors: whatever the device raises where it is full."""
        self.device, self.dtype = place.device, place.dtype
        self.layers, self.modules = layers, modules
        self.angles = DeviceAngles(angles, place)
        one = layers[0]
        self.slots = KVSlots(1, capacity, 1, one.form.num_kv_heads, one.form.head_dim, self.dtype, self.device)
        size = max(map(buffer_bytes, layers))
        self.buffers = [WeightBuffer(size, self.device) for _ in range(2)]
        self.rows, self.kept = Staging(self.device), Staging(self.device)
        self.weight_bytes = 0

    @property
    def bus_bytes(self) -> dict[str, int]:
        """What went up and came down so far."""
        up = self.weight_bytes + self.rows.bytes_up + self.kept.bytes_up
        return {"up": up, "down": self.rows.bytes_down + self.kept.bytes_down}

    def __call__(self, hidden: Tensor, segment: Segment, slots: KVSlots, layers: range, tap: FeatureTap) -> Tensor:
        """Rows [rows, hidden] fp32 of the CPU through these layers, as [rows, hidden] fp32; ``hidden`` stays as it is.

        ``slots`` hold the keys and values of the CPU's layers; those of the rows are written there.
        """
        states = self.rows.up(hidden, self.dtype)[None]
        turns = self.angles(list(range(segment.prefix, segment.num_keys)))
        own = causal_segment(0, segment.prefix, segment.num_rows)
        self._send(layers.start)
        for index in layers:
            tap.record(index, states[0])
            module: Any = copy.deepcopy(self.modules[index])
            module.self_attn.layer_idx = 0
            self.buffers[index % 2].unpack(module, self.dtype)
            self._attend_before(slots, index, segment)
            turned = turns[self.layers[index].form.angles or 0]
            states = module(states, position_embeddings=turned, row_pass=RowPass(self.slots, [own]))
            if index + 1 < layers.stop:
                self._send(index + 1)  # on its way while this one computes
            new = self.slots.views(own)
            down = self.kept.down(torch.stack((new.new_keys[0][0], new.new_values[0][0])))
            slots.write(index, segment, down[0], down[1])
        return self.rows.down(states[0]).to(torch.float32, copy=True)

    def _send(self, index: int) -> None:
        self.weight_bytes += self.buffers[index % 2].send(self.layers[index])

    def _attend_before(self, slots: KVSlots, index: int, segment: Segment) -> None:
        """The keys and values of the positions before, for this layer."""
        if segment.prefix:
            found = slots.views(segment).attended(index, torch.float32)
            before = self.kept.up(torch.stack([part[0, :, : segment.prefix] for part in found]), self.dtype)
            for store, part in zip(self.slots.stores, before, strict=True):
                store[0, 0, :, : segment.prefix].copy_(part)


class PromptStream:
    """A ``LayerStream`` as long as its device works; where it fails, the CPU reads, and the device is tried again."""

    def __init__(
        self, make: Callable[[], LayerStream], stream: Stream, now: Callable[[], float] = time.monotonic
    ) -> None:
        """``now``: a clock in seconds."""
        self.make, self.stream, self.now = make, stream, now
        self.recovery = Recovery()
        self.layers: LayerStream | None = None
        self._attempt(self._begin)

    @property
    def block(self) -> int:
        """Positions of a block; 0 while the CPU reads everything."""
        return 0 if self.layers is None else self.stream.block

    @property
    def state(self) -> dict[str, Any]:
        """For health checks; may be read from any thread."""
        layers = self.layers
        bus = {"up": 0, "down": 0} if layers is None else layers.bus_bytes
        found = {"device": str(self.stream.place.device), "block": self.block, "reason": self.recovery.reason}
        return found | {"bus_bytes": bus}

    def read(self, hidden: Tensor, row_pass: LayerPass, layers: range, tap: FeatureTap) -> bool:
        """Take rows [rows, hidden] through the layers, in place, where they are a block; whether that was done."""
        segment, *others = row_pass.segments
        if others or segment.tail_mask is not None:
            return False
        if self.layers is None and segment.prefix == 0 and self.now() >= self.recovery.until:
            self._attempt(self._begin)
        block, stream = self.stream.block, self.layers
        if stream is None or segment.num_rows != block or segment.prefix % block:
            return False
        return self._attempt(lambda: hidden.copy_(stream(hidden, segment, row_pass.slots, layers, tap)))

    def _begin(self) -> None:
        self.layers = self.make()

    def _attempt(self, work: Callable[[], object]) -> bool:
        """Whether the device did it."""
        try:
            work()
        except RuntimeError as error:
            if not is_device_failure(error):
                raise
            self.layers = None
            self.recovery.failed(f"{type(error).__name__}: {error}", self.now())
            logger.warning(
                "%s failed (%s); prompts are read on the CPU, and the device is tried again with a new one, after "
                "%.0f s at the earliest. A prompt read by the other of the two may be answered in other words",
                self.stream.place.device, self.recovery.reason, self.recovery.pause_s,
            )  # fmt: skip
            return False
        if self.recovery.reason and self.layers is not None:
            self.recovery.succeeded()
        return True
