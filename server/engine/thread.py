"""The one thread that owns the engine, and the door to it from anywhere else."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.drafting import DraftingStatus
from server.engine.engine import Engine
from server.engine.request import EngineStopped, Event, FinishedEvent, QueueFull, Request

logger = logging.getLogger(__name__)

Deliver = Callable[[list[Event]], None]
SECONDS_PER_WAITING_REQUEST = 2.0
MAX_RETRY_AFTER_S = 120.0  # clients give up on anything longer
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class EngineStatus:
    """How busy the engine is."""

    running: int
    waiting: int
    slots: int
    free_slots: int
    drafting: DraftingStatus


@dataclass(frozen=True)
class Submit:
    """A request on its way in."""

    request: Request


@dataclass(frozen=True)
class Cancel:
    """A wish to end a request."""

    request_id: str


class EngineThread:
    """Runs ``engine.step`` while there is work, sleeps otherwise. ``submit`` and ``cancel`` may be called anywhere."""

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self.engine = engine
        self.max_waiting = max_waiting
        self.inbox: queue.SimpleQueue[Submit | Cancel | None] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.unfinished: set[str] = set()
        self.stopping = False
        self.deliver: Deliver | None = None
        self.at_end: Callable[[], None] | None = None  # called in the thread once it has ended as it should
        self.thread = threading.Thread(target=self._run, name="dovetail-engine", daemon=True)

    def start(self, deliver: Deliver) -> None:
        """Begin; ``deliver`` is called in the engine thread, once for every step that produced events."""
        self.deliver = deliver
        self.thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests can still be answered."""
        return self.thread.is_alive() and not self.stopping

    def status(self) -> EngineStatus:
        """Numbers for health checks; a moment old."""
        scheduler = self.engine.scheduler
        slots, free = scheduler.limits.num_slots, len(scheduler.free_slots)
        with self.lock:
            running = slots - free
            waiting = max(0, len(self.unfinished) - running)
        return EngineStatus(running, waiting, slots, free, self.engine.drafting.status)

    def submit(self, request: Request) -> None:
        """Hand a request in. Errors: EngineStopped, QueueFull, what ``Engine.check`` refuses."""
        if not self.alive:
            raise EngineStopped("the engine has stopped; restart the server")
        self.engine.check(request)
        with self.lock:
            num_waiting = len(self.unfinished) - self.engine.options.max_seqs
            if num_waiting >= self.max_waiting:
                retry_after_s = min(MAX_RETRY_AFTER_S, SECONDS_PER_WAITING_REQUEST * (num_waiting + 1))
                raise QueueFull(self.max_waiting, retry_after_s)
            self.unfinished.add(request.request_id)
        self.inbox.put(Submit(request))

    def cancel(self, request_id: str) -> None:
        """End a request soon: a FinishedEvent with CANCELLED follows, unless it has ended already."""
        self.inbox.put(Cancel(request_id))

    def stop(self) -> None:
        """End all requests and the thread."""
        self.stopping = True
        self.inbox.put(None)
        if self.thread.is_alive():
            self.thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            while not self.stopping:
                events = self._take_in()
                if self.engine.scheduler.has_work:
                    events += self.engine.step()
                else:
                    self.engine.check_integrity()
                self._hand_over(events)
            self._hand_over(self._cancel_all())
            if self.at_end is not None:
                self.at_end()
        except Exception:
            logger.exception("the engine thread died; its requests are cancelled")
        finally:
            self.stopping = True
            self._hand_over(self._cancel_all())

    def _take_in(self) -> list[Event]:
        """Everything in the inbox; waits for the first message when there is nothing else to do."""
        events: list[Event] = []
        wait = not self.engine.scheduler.has_work
        while not self.stopping:
            try:
                message = self.inbox.get(block=wait)
            except queue.Empty:
                break
            wait = False
            if isinstance(message, Submit):
                self.engine.submit(message.request)
            elif isinstance(message, Cancel):
                events += self.engine.cancel(message.request_id)
        return events

    def _cancel_all(self) -> list[Event]:
        """Events that end whatever was still known."""
        with self.lock:
            known = list(self.unfinished)
        return [event for request_id in known for event in self.engine.cancel(request_id)]

    def _hand_over(self, events: list[Event]) -> None:
        if not events or self.deliver is None:
            return
        finished = {event.request_id for event in events if isinstance(event, FinishedEvent)}
        with self.lock:
            self.unfinished -= finished
        self.deliver(events)
