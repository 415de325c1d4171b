"""Who runs next: a first-come queue, a fixed number of slots, one prefill chunk a step. Policy only, no torch here."""

from __future__ import annotations

import time
from collections import deque

from server.engine.request import EngineError
from server.engine.sequence import RunningSequence, Status


class Scheduler:
    """Waiting and running requests. Prefill goes first come, first served; everything prefilled decodes together."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.free_slots = list(range(num_slots))
        self.waiting: deque[RunningSequence] = deque()
        self.running: dict[str, RunningSequence] = {}

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    def add(self, sequence: RunningSequence) -> None:
        """Queue a request."""
        self.waiting.append(sequence)

    def admit(self) -> None:
        """Move waiting requests into free slots, in order; the lowest slot is given first."""
        while self.waiting and self.free_slots:
            sequence = self.waiting.popleft()
            sequence.held_slot = min(self.free_slots)
            self.free_slots.remove(sequence.slot)
            sequence.status = Status.PREFILLING
            sequence.timings.admitted = time.monotonic()
            self.running[sequence.request_id] = sequence

    def next_prefill(self) -> RunningSequence | None:
        """The first running request whose prompt is not through."""
        return next((s for s in self.running.values() if s.status is Status.PREFILLING), None)

    def decoding(self) -> list[RunningSequence]:
        """All running requests whose prompt is through, in order of admission."""
        return [s for s in self.running.values() if s.status is Status.DECODING]

    def find(self, request_id: str) -> RunningSequence | None:
        """A request by its name, wherever it is; None if it is not here any more."""
        return self.running.get(request_id) or next((s for s in self.waiting if s.request_id == request_id), None)

    def remove(self, sequence: RunningSequence) -> int | None:
        """End a request; the slot it held, which is free now, or None."""
        slot, sequence.held_slot = sequence.held_slot, None
        sequence.status = Status.ENDED
        if slot is None:
            self.waiting.remove(sequence)
        else:
            del self.running[sequence.request_id]
            self.free_slots.append(slot)
        return slot

    def check_integrity(self) -> None:
        """Every slot is free or held by one running request: raises EngineError otherwise."""
        held = [sequence.slot for sequence in self.running.values()]
        if sorted([*self.free_slots, *held]) != list(range(self.num_slots)):
            raise EngineError(f"slots leaked: free {sorted(self.free_slots)}, held {held} of {self.num_slots}")
