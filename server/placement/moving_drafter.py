"""A drafter on an accelerator that goes on on the CPU when that fails, and goes back when it works again.

Requests never notice. Those that ran when the device failed decode without it from then on, since what it knew of them
is gone; those that come later are drafted for on the CPU. Once no request runs, and after a pause that doubles with
every failure, the device is tried again. Drafters are made in a thread of their own, so that no round waits for one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from drafters.drafter import Drafter, DraftState, Observation
from drafters.proposal import Budget, Proposal
from server.placement.devices import Placement, is_device_failure
from server.placement.recovery import Recovery

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class MovingDrafter:
    """The drafter that ``make`` gives for a place: ``there`` as long as that works, else ``here``."""

    def __init__(
        self, make: Callable[[Placement], Drafter], there: Placement, here: Placement,
        now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """``now``: a clock in seconds. A device that is full or gone leaves the drafter on the CPU, with a warning."""
        self.make = make
        self.there, self.here = there, here
        self.now = now
        self.recovery = Recovery()
        self.known: set[int] = set()  # slots that the drafter has rows of
        self.strangers: set[int] = set()  # slots whose rows an earlier drafter had
        self.place = there
        self.bytes_up = 0  # features that went to the device
        self.current: Drafter | None = None
        self.loading: tuple[Placement, Future[Drafter]] | None = None
        try:
            self.current = make(there)
        except RuntimeError as error:
            self._say(error)
            self.place, self.current = here, make(here)
        self.name, self.feature_layers = self.current.name, self.current.feature_layers

    @property
    def device(self) -> str:
        """Where it drafts now; "none" while it moves."""
        return "none" if self.current is None else str(self.place.device)

    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        """One tree for each state; empty where the drafter that knew the request is gone."""
        self._arrive()
        asked = [state for state in states if state.slot not in self.strangers]
        current = self.current
        trees = None if current is None else self._attempt(lambda: current.propose(asked, budget))
        by_slot = dict(zip((state.slot for state in asked), trees or (), strict=False))
        return [by_slot.get(state.slot, Proposal()) for state in states]

    def observe(self, batch: Sequence[Observation]) -> None:
        """Take in committed positions of requests whose every position was seen."""
        self._arrive()
        current = self.current
        self.known |= {observation.slot for observation in batch}
        if current is None:
            self.strangers |= self.known
            return
        told = [observation for observation in batch if observation.slot not in self.strangers]
        if self.place is self.there:
            self.bytes_up += sum(observation.features.nbytes for observation in told)
        self._attempt(lambda: current.observe(told))

    def release(self, slot: int) -> None:
        """Forget a request; with the last one gone the device may be tried again."""
        self.known.discard(slot)
        self.strangers.discard(slot)
        current = self.current
        if current is not None:
            self._attempt(lambda: current.release(slot))
        if not self.known and self.place is self.here and self.loading is None and self.now() >= self.recovery.until:
            self._load(self.there)

    def _attempt(self, work: Callable[[], Result]) -> Result | None:
        """What the drafter gives; where its device failed, None, and it moves to the CPU."""
        try:
            return work()
        except RuntimeError as error:
            if self.place is self.here:
                raise
            self._say(error)
            self.place, self.current = self.here, None
            self.strangers |= self.known
            self._load(self.here)
            return None

    def _load(self, place: Placement) -> None:
        """Begin to make the drafter for a place."""
        executor = ThreadPoolExecutor(1, "dovetail-drafter")
        self.loading = (place, executor.submit(self.make, place))
        executor.shutdown(wait=False)

    def _arrive(self) -> None:
        """Take the drafter that has been made meanwhile."""
        if self.loading is None or not self.loading[1].done():
            return
        (place, made), self.loading = self.loading, None
        try:
            self.current = made.result()
        except RuntimeError as error:
            self._say(error)
            return
        self.place = place
        self.strangers |= self.known
        if place is self.there:
            self.recovery.succeeded()
        logger.info("the drafter is on %s", place.device)

    def _say(self, error: RuntimeError) -> None:
        """Pause and tell, where it is the device that failed."""
        if not is_device_failure(error):
            raise error
        self.recovery.failed(f"{type(error).__name__}: {error}", self.now())
        logger.warning(
            "%s failed (%s); the drafter goes on on the CPU, and the device is tried again when no request runs, after "
            "%.0f s at the earliest", self.there.device, self.recovery.reason, self.recovery.pause_s,
        )  # fmt: skip
