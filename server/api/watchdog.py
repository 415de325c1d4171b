"""Notices a step of the engine that does not come back."""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from collections.abc import Callable
from typing import Protocol

from server.api import supervisor

logger = logging.getLogger(__name__)

WATCH_S = 1.0


class Stepping(Protocol):
    """What of an engine is looked at."""

    @property
    def alive(self) -> bool:
        """Whether it can answer."""

    @property
    def step_in_hand(self) -> int | None:
        """The number of the step that runs; None between steps."""


class Watchdog:
    """Looked at regularly. The time is counted in looks, not read from a clock: a process that was stopped, or a
    machine that slept, is not stuck."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self.step: int | None = None
        self.seconds = 0.0

    @property
    def is_stuck(self) -> bool:
        """Whether one step has run for longer than ``patience_s``."""
        return self.seconds >= self.patience_s

    async def watch(self, engine: Callable[[], Stepping | None]) -> None:
        """Look once a second, and tell whoever supervises the process that it is well; None: nothing is loaded yet."""
        while True:
            await asyncio.sleep(WATCH_S)
            found = engine()
            self.look(None if found is None else found.step_in_hand, WATCH_S)
            if not self.is_stuck and (found is None or found.alive):
                supervisor.tell("WATCHDOG=1")

    def look(self, step: int | None, seconds: float) -> None:
        """The number of the step that runs now, None where none does, ``seconds`` after the last look."""
        was_stuck = self.is_stuck
        self.seconds = self.seconds + seconds if step is not None and step == self.step else 0.0
        self.step = step
        if self.is_stuck and not was_stuck:
            logger.critical("step %d of the engine has run for %.0f s; all threads:\n%s", step, self.seconds, stacks())
        elif was_stuck and not self.is_stuck:
            logger.warning("the engine has come back")


def stacks() -> str:
    """Where every thread stands."""
    return "\n".join(
        f"thread {ident}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in sys._current_frames().items()
    )
