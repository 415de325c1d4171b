"""A native target cut in two: the first layers on the CPU, the last ones, the norm and the head on an accelerator.

Requests survive the accelerator. Main memory keeps every layer, and the hidden states that went up for each committed
position; when the device fails (no memory, an error, gone), the layers' keys and values are computed from those here,
the pass is run again on the CPU alone, and no request notices more than the time it takes. While no request runs the
device is tried again, after a pause that doubles.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kernels.decoder_layer import LayerPass, decoder_layers, normalise
from kernels.tree_attention import Segment, causal_segment
from server.placement.devices import Placement, is_device_failure
from server.placement.recovery import Recovery
from server.targets.layer_stream import Stream
from server.targets.native_target import NativeTarget
from server.targets.packed_model import PackedModel
from server.targets.target import PrefillChunk, Prefilled, Verified, VerifyRows, share_out
from server.targets.torch_target import TorchOutputs
from server.targets.upper_layers import Split, UpperLayers, UpperPass

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class UpperState:
    """layers: how many ``device`` computes now; reason: why they are fewer than planned, for people."""

    device: str
    layers: int
    reason: str


class SplitOutputs(TorchOutputs):
    """Features and greedy tokens are here already; logits come from the device, or from the CPU's head."""

    def __init__(self, found: UpperPass, greedy_ids: list[int], target: SplitTarget) -> None:
        super().__init__(found.features, found.here, target.head)
        self.found = found
        self.on_device = greedy_ids
        self.target = target

    def argmax(self) -> list[int]:
        """The greedy next token after each row."""
        return self.on_device

    def logits(self, row_ids: Sequence[int]) -> Tensor:
        """[len(row_ids), vocabulary] fp32."""
        return self.target.logits(self.found, row_ids)


class SplitTarget(NativeTarget):
    """A ``NativeTarget`` whose layers ``split.first`` .. L-1 are ``UpperLayers``, as long as their device works."""

    def __init__(
        self, packed: PackedModel, name: str, num_slots: int, capacity: int, kv_cache: str | None, split: Split,
        stream: Stream | None = None, now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """``now``: a clock in seconds. A device that cannot take the layers leaves them on the CPU, with a warning."""
        modules = list(packed.model.base_model.layers)
        super().__init__(packed, name, num_slots, capacity, kv_cache, stream)
        self.split = split
        self.make: Callable[[], UpperLayers] = lambda: UpperLayers(
            packed, modules, split, self.angles, num_slots, capacity
        )
        # What crossed for each position; memory is taken page by page as rows come.
        self.crossed = torch.empty(num_slots, capacity, self.info.hidden_size, dtype=split.place.dtype)
        self.info = dataclasses.replace(self.info, exact_rows=False)
        self.upper: UpperLayers | None = None
        self.pending: set[int] = set()  # slots whose last verify pass ran on the device
        self.recovery = Recovery()
        self.now = now
        self._advance()

    @property
    def upper_state(self) -> UpperState:
        """For health checks; may be read from any thread."""
        count = self.info.num_layers - self.split.first
        return UpperState(str(self.split.place.device), count if self.upper is not None else 0, self.recovery.reason)

    @property
    def bus_bytes(self) -> dict[str, int]:
        """What went to the layers on the device and came from them since they are there; may be read anywhere."""
        upper = self.upper
        return (
            {"up": 0, "down": 0}
            if upper is None
            else {
                "up": upper.staging.bytes_up,
                "down": upper.staging.bytes_down,
            }
        )

    def head_at(self, place: Placement) -> Tensor | None:
        """The head [vocabulary, hidden] that lies at this place already, where it does in that type."""
        upper = self.upper
        return upper.head if upper is not None and (upper.device, upper.dtype) == (place.device, place.dtype) else None

    def prefill(self, chunk: PrefillChunk) -> Prefilled:
        """Run and commit consecutive rows."""
        if self.upper is None and self.now() >= self.recovery.until and not any(self.slots.lengths):
            self._advance()
        if self.upper is not None:
            length, count = self.slots.lengths[chunk.slot], len(chunk.token_ids)
            segment = causal_segment(chunk.slot, length, count)
            found = self._pass([segment], list(chunk.token_ids), list(range(length, length + count)))
            if found is not None:
                self._set_length(chunk.slot, length + count)
                return Prefilled(found.features, found.here, lambda rows: self.logits(found, rows))
        return super().prefill(chunk)

    def verify(self, rows: Sequence[VerifyRows]) -> list[Verified]:
        """One pass over the rows of all requests; they stay behind the committed rows until ``keep``."""
        if (upper := self.upper) is not None:
            found = self._pass(*self._rows_of(rows))
            greedy = None if found is None else self._attempt(lambda: upper.greedy(found.last))
            if found is not None and greedy is not None:
                self.pending |= {part.slot for part in rows}
                return share_out(SplitOutputs(found, greedy, self), rows)
        return super().verify(rows)

    def logits(self, found: UpperPass, row_ids: Sequence[int]) -> Tensor:
        """[len(row_ids), vocabulary] fp32 of rows of a pass: from the device, or from the CPU's head if that fails."""
        upper, rows = self.upper, list(row_ids)
        logits = None if upper is None else self._attempt(lambda: upper.logits(found.last[rows]))
        return self.head(found.here[rows]) if logits is None else self.head.finished(logits)

    def keep(self, slot: int, rows: Sequence[int]) -> None:
        """Commit a path of the last verify pass."""
        start = self.slots.lengths[slot]
        super().keep(slot, rows)
        stop = self.slots.lengths[slot]
        self.crossed[slot, start:stop] = self.crossed[slot, [start + row for row in rows]]
        was_above = self.upper is not None
        self._above(lambda upper: upper.slots.keep(slot, rows))
        if slot in self.pending and not was_above:  # the device went between the pass and now
            self._fill(slot, start, stop)
        self.pending.discard(slot)

    def read_rows(self, slot: int, start: int, stop: int) -> tuple[Tensor, ...]:
        """Copies of committed rows: the CPU layers' stores, then what crossed [1, 1, rows, hidden]."""
        lower = tuple(part[: self.split.first] for part in self.slots.read_rows(slot, start, stop))
        return (*lower, self.crossed[slot, start:stop].clone())

    def write_rows(self, slot: int, rows: Sequence[Tensor]) -> None:
        """Commit rows read earlier; the layers above take in anew what crossed."""
        start = self.slots.lengths[slot]
        stop = start + len(rows[-1])
        self.slots.check(Segment(slot, start, stop - start))
        for store, part in zip(self.slots.stores, rows[:-1], strict=True):
            store[: self.split.first, slot, :, start:stop] = part
        self.crossed[slot, start:stop] = rows[-1]
        self._fill(slot, start, stop)
        self._set_length(slot, stop)

    def release(self, slot: int) -> None:
        """Empty a slot."""
        super().release(slot)
        self.pending.discard(slot)
        self._above(lambda upper: upper.slots.release(slot))

    def _pass(self, segments: Sequence[Segment], token_ids: list[int], positions: list[int]) -> UpperPass | None:
        """Rows through all layers, the last ones on the device; None where that failed and is left."""
        upper = self.upper
        assert upper is not None
        hidden, _ = self._lower(segments, token_ids, positions)
        found = self._attempt(lambda: upper(hidden, segments, positions, self.tap))
        if found is not None and self.recovery.reason:
            logger.info("%s computes layers again", self.split.place.device)
            self.recovery.succeeded()
        return found

    @torch.inference_mode()
    def _forward(self, segments: Sequence[Segment], token_ids: list[int], positions: list[int]) -> Tensor:
        """Without the device: features [rows, hidden] after the final norm, fp32."""
        hidden, row_pass = self._lower(segments, token_ids, positions)
        self._run(hidden, row_pass, range(self.split.first, len(self.stack)))
        return normalise(hidden, self.norm)

    @torch.inference_mode()
    def _lower(
        self, segments: Sequence[Segment], token_ids: list[int], positions: list[int]
    ) -> tuple[Tensor, LayerPass]:
        """Rows through the CPU's own layers; what comes out of them is remembered."""
        hidden, row_pass = self._begin(segments, token_ids, positions)
        self._run(hidden, row_pass, range(self.split.first))
        rows = torch.split(hidden, [segment.num_rows for segment in segments])
        for segment, part in zip(segments, rows, strict=True):
            first = segment.num_keys - segment.num_rows
            self.crossed[segment.slot, first : segment.num_keys] = part
        return hidden, row_pass

    @torch.inference_mode()
    def _fill(self, slot: int, start: int, stop: int) -> None:
        """Keys and values of the upper layers at committed positions, from what crossed there."""
        segment, positions = causal_segment(slot, start, stop - start), list(range(start, stop))
        hidden = self.crossed[slot, start:stop].to(torch.float32, copy=True)  # layers work in place
        upper = self.upper
        if upper is not None and self._attempt(lambda: upper(hidden, [segment], positions, self.tap)) is not None:
            return
        row_pass = LayerPass(self.slots, [segment], *self.angles(positions))
        decoder_layers(hidden, self.stack, row_pass, range(self.split.first, len(self.stack)))

    def _set_length(self, slot: int, length: int) -> None:
        self.slots.lengths[slot] = length
        if self.upper is not None:
            self.upper.slots.lengths[slot] = length

    def _above(self, work: Callable[[UpperLayers], None]) -> None:
        """Do to the device's slots what was done to those here."""
        if (upper := self.upper) is not None:
            self._attempt(lambda: work(upper))

    @torch.inference_mode()
    def _attempt(self, work: Callable[[], Result]) -> Result | None:
        """What the device gives; None where it failed, and then everything is on the CPU."""
        try:
            return work()
        except RuntimeError as error:
            self._lose(error)
            for slot, length in enumerate(self.slots.lengths):
                if length:
                    self._fill(slot, 0, length)
            return None

    def _advance(self) -> None:
        """Put the upper layers on the device, if it takes them."""
        try:
            self.upper = self.make()
        except RuntimeError as error:
            self._lose(error)

    def _lose(self, error: RuntimeError) -> None:
        """Go on without the device, where it is that which failed."""
        if not is_device_failure(error):
            raise error
        self.upper = None
        self.recovery.failed(f"{type(error).__name__}: {error}", self.now())
        logger.warning(
            "%s failed (%s); layers %d to %d go on on the CPU, whose rounding may change words; the device is tried "
            "again when no request runs, after %.0f s at the earliest", self.split.place.device, self.recovery.reason,
            self.split.first, self.info.num_layers - 1, self.recovery.pause_s,
        )  # fmt: skip
