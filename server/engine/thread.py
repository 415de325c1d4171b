"""The one thread that owns the engine, and the door to it from anywhere else."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.drafting import DraftingStatus
from server.engine.engine import Engine
from server.engine.figures import EngineFigures
from server.engine.request import (
    DraftStats,
    EngineStopped,
    Event,
    FinishedEvent,
    FinishReason,
    QueueFull,
    Request,
    Timings,
)

logger = logging.getLogger(__name__)

Deliver = Callable[[list[Event]], None]
SECONDS_PER_WAITING_REQUEST = 2.0
MAX_RETRY_AFTER_S = 120.0  # clients give up on anything longer
STOP_TIMEOUT_S = 30.0
MAX_FAILED_STEPS = 3  # one behind another; then the engine is given up


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
        self.step_in_hand: int | None = None  # its number while it runs; one that stays for long is stuck
        self.num_steps = 0
        self.failed_steps = 0
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

    def figures(self) -> EngineFigures:
        """What it has done since its start; a moment old."""
        return self.engine.figures()

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
            self.inbox.put(Submit(request))  # in the lock: whatever is unfinished is in the inbox or in the engine

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
                self._hand_over(self._take_in())
                self._hand_over(self._step())
            self._hand_over(self._end_all())
            if self.at_end is not None:
                self.at_end()
        except Exception:
            logger.exception("the engine thread died; its requests are cancelled")
        finally:
            self.stopping = True
            self._hand_over(self._end_all())

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
                events += self._submit(message.request)
            elif isinstance(message, Cancel):
                events += self.engine.cancel(message.request_id)
        return events

    def _submit(self, request: Request) -> list[Event]:
        """Hand a request to the engine; its end where that does not take it."""
        try:
            self.engine.submit(request)
        except Exception as error:
            logger.exception("request %s could not be queued", request.request_id)
            return [ending(request.request_id, FinishReason.FAILED, error)]
        return []

    def _step(self) -> list[Event]:
        """One step. What it throws belongs to no single request: what ran in it is ended as failed, what waits goes on.

        Errors: the last of ``MAX_FAILED_STEPS`` that came one behind another.
        """
        self.num_steps += 1
        self.step_in_hand = self.num_steps
        try:
            if not self.engine.scheduler.has_work:
                self.engine.check_integrity()
                return []
            events = self.engine.step()
        except Exception as error:
            self.failed_steps += 1
            if self.failed_steps == MAX_FAILED_STEPS:
                raise
            logger.exception("a step of the engine failed; the requests that ran in it are ended")
            return self._end_running(error)
        finally:
            self.step_in_hand = None
        self.failed_steps = 0
        return events

    def _end_running(self, error: Exception) -> list[Event]:
        """Ends of what ran in a step that threw, and of what had ended in it and whose end was lost."""
        events: list[Event] = list(self.engine.fail_running(error))
        with self.lock:
            lost = self.unfinished - {event.request_id for event in events} - self._queued()
        return events + [ending(request_id, FinishReason.FAILED, error) for request_id in lost]

    def _queued(self) -> set[str]:
        """Requests in the inbox, which stay there, and those that wait in the engine. The lock must be held."""
        messages = [self.inbox.get_nowait() for _ in range(self.inbox.qsize())]
        for message in messages:
            self.inbox.put(message)
        waiting = {sequence.request_id for sequence in self.engine.scheduler.waiting}
        return waiting | {message.request.request_id for message in messages if isinstance(message, Submit)}

    def _end_all(self) -> list[Event]:
        """An end for whatever was still known, also where the engine cannot give it."""
        with self.lock:
            known = list(self.unfinished)
        events: list[Event] = []
        for request_id in known:
            try:
                events += self.engine.cancel(request_id) or [ending(request_id, FinishReason.CANCELLED)]
            except Exception:
                logger.exception("request %s could not be taken out of the engine", request_id)
                events.append(ending(request_id, FinishReason.CANCELLED))
        return events

    def _hand_over(self, events: list[Event]) -> None:
        if not events or self.deliver is None:
            return
        finished = {event.request_id for event in events if isinstance(event, FinishedEvent)}
        with self.lock:
            self.unfinished -= finished
        self.deliver(events)


def ending(request_id: str, reason: FinishReason, error: Exception | None = None) -> FinishedEvent:
    """The end of a request of which the engine knows nothing."""
    text = None if error is None else f"{type(error).__name__}: {error}"
    return FinishedEvent(request_id, reason, DraftStats(), Timings(), text)
