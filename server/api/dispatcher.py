"""The bridge from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence

from server.engine.request import Event


class Dispatcher:
    """Hands the engine's events to whoever waits for them; ONE call into the event loop for each round.

    ``deliver`` is called in the engine's thread, everything else on the event loop. Events of a request that nobody
    has open are dropped: its client left.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, watch: Callable[[Sequence[Event]], None]) -> None:
        """``watch`` sees every round's events first."""
        self.loop = loop
        self.watch = watch
        self.queues: dict[str, asyncio.Queue[Event | None]] = {}

    def deliver(self, events: list[Event]) -> None:
        """Take over one round's events."""
        with contextlib.suppress(RuntimeError):  # the loop closed while the engine was being stopped
            self.loop.call_soon_threadsafe(self._hand_over, events)

    def open(self, request_ids: Iterable[str]) -> asyncio.Queue[Event | None]:
        """One queue that receives the events of all these requests; its reader may put None into it."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self.queues.update(dict.fromkeys(request_ids, queue))
        return queue

    def close(self, request_ids: Iterable[str]) -> None:
        """Receive nothing more for these requests."""
        for request_id in request_ids:
            self.queues.pop(request_id, None)

    def _hand_over(self, events: list[Event]) -> None:
        self.watch(events)
        for event in events:
            if (queue := self.queues.get(event.request_id)) is not None:
                queue.put_nowait(event)
