"""The server's side of the vision process: a bounded queue, batches over requests, and a process that may die.

One thread takes jobs from the queue, hands a batch to the process and waits for the answers. While it waits, the next
batch gathers in the queue, so that batches grow with the load by themselves. No torch here, nor in that thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from server.vision.child import Job, JobAnswer, ProcessDied, VisionError, VisionProcess, VisionStopped
from vision.images import ImageLimits
from vision.serving.protocol import ModelInfo

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0
IDLE_POLL_S = 0.5
MAX_RETRY_AFTER_S = 120.0
FIRST_GUESS_S = 0.05
MAX_RETRY_PAUSE_S = 300.0
# Threads that read bodies and fetch URLs; a fetch holds one for up to fifteen seconds.
READERS, READER_NAME = 4, "dovetail-images"

Result = TypeVar("Result")


class VisionQueueFull(VisionError):
    """As many vision requests wait as may. ``retry_after_s`` is an estimate for the client."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ImageCrashed(VisionError):
    """The vision process died, or did not come back, while it worked on this image alone."""


@dataclass(frozen=True)
class WorkerOptions:
    """Bounds of the queue and of a batch.

    ``max_requests`` with ``max_bytes`` of bodies may be in the server at once. A batch takes up to ``max_batch``
    images; ``window_s`` is what its first image waits for company when the process is idle. ``answer_timeout_s`` after
    a batch was handed over the process counts as hung. Loading may take ``load_timeout_s``. A start that failed is
    tried again after ``retry_pause_s``, and after twice as long each time until ``MAX_RETRY_PAUSE_S``; so is one whose
    process dies before it has answered anything.
    """

    max_requests: int = 64
    max_bytes: int = 256 * 2**20
    max_batch: int = 8
    window_s: float = 0.002
    answer_timeout_s: float = 60.0
    load_timeout_s: float = 300.0
    retry_pause_s: float = 1.0
    niceness: int = 19
    limits: ImageLimits = field(default_factory=ImageLimits)


@dataclass
class Pending:
    """A job in the queue."""

    job: Job
    future: Future[JobAnswer] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class WorkerStatus:
    """How busy the worker is; ``restarts`` counts processes that died."""

    requests: int
    images: int
    restarts: int


class VisionWorker:
    """Owns the vision process. ``admit`` and ``submit`` may be called anywhere.

    ``models`` maps served names to paths, as ``vision.serving.load.load_model`` takes them.
    """

    def __init__(self, models: Mapping[str, Path], options: WorkerOptions = WorkerOptions()) -> None:
        self.names = tuple(models)
        self.paths = {name: str(path) for name, path in models.items()}
        self.options = options
        self.models: tuple[ModelInfo, ...] = ()
        self.failure = ""
        self.stopping = False
        self.restarts = 0
        self.is_loaded = False  # whether a start has succeeded
        self.failed_starts = self.idle_deaths = 0
        self.next_start = 0.0
        self.seconds_per_image = FIRST_GUESS_S
        self.lock = threading.Lock()
        self.num_requests = self.num_images = self.num_bytes = 0
        self.inbox: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self.process: VisionProcess | None = None
        self.thread = threading.Thread(target=self._run, name="dovetail-vision", daemon=True)
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix=READER_NAME)
        self.on_loaded: Callable[[Exception | None], None] = lambda _: None

    def start(self, on_loaded: Callable[[Exception | None], None] | None = None) -> None:
        """Start thread and process; ``on_loaded`` is called in that thread: with why a first start failed, which is
        tried again, and once with None."""
        self.on_loaded = on_loaded or self.on_loaded
        self.thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests can be answered, now or once a process that died is back."""
        return self.thread.is_alive() and not self.stopping and not self.failure

    def status(self) -> WorkerStatus:
        """Numbers for health checks."""
        with self.lock:
            return WorkerStatus(self.num_requests, self.num_images, self.restarts)

    @contextlib.contextmanager
    def admit(self, num_bytes: int) -> Iterator[None]:
        """A request's place, held from before its body of ``num_bytes`` is read until it is answered.

        Errors: VisionQueueFull, VisionStopped.
        """
        if not self.alive:
            raise self._stopped()
        with self._held(1, num_bytes):
            yield

    @contextlib.contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        """Room for what an admitted request fetches. Errors: VisionQueueFull."""
        with self._held(0, num_bytes):
            yield

    @contextlib.contextmanager
    def _held(self, num_requests: int, num_bytes: int) -> Iterator[None]:
        options = self.options
        with self.lock:
            too_many = self.num_requests + num_requests > options.max_requests
            if too_many or self.num_bytes + num_bytes > options.max_bytes:
                wait_s = min(MAX_RETRY_AFTER_S, self.seconds_per_image * (self.num_images + 1))
                message = f"{self.num_requests} vision requests are waiting already; try again in {wait_s:.0f} s"
                raise VisionQueueFull(message, wait_s)
            self.num_requests += num_requests
            self.num_bytes += num_bytes
        try:
            yield
        finally:
            with self.lock:
                self.num_requests -= num_requests
                self.num_bytes -= num_bytes

    async def aside(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run ``work`` in a thread of vision's own: neither the event loop nor text's threads wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, work, *arguments)

    def submit(self, jobs: Sequence[Job]) -> list[Future[JobAnswer]]:
        """Queue images. A future raises VisionStopped or ImageCrashed; cancelling it before its turn drops the job."""
        waiting = [Pending(job) for job in jobs]
        with self.lock:
            self.num_images += len(waiting)
        for entry in waiting:
            entry.future.add_done_callback(self._count_down)
            self.inbox.put(entry)
        if not self.alive:  # the thread may have emptied the queue for the last time before these came in
            self._refuse_waiting()
        return [entry.future for entry in waiting]

    def stop(self) -> None:
        """Answer the batch in hand, refuse the rest, end the process. May be called again."""
        self.stopping = True
        self.readers.shutdown(wait=False, cancel_futures=True)
        self.inbox.put(None)
        if self.thread.is_alive():
            self.thread.join(STOP_TIMEOUT_S if self.models else 0)
            # Still loading or hung: the thread sees the pipe break and ends.
            if self.thread.is_alive() and (process := self.process) is not None:
                process.kill()
            self.thread.join(STOP_TIMEOUT_S)
        self._refuse_waiting()

    def _count_down(self, _: Future[JobAnswer]) -> None:
        with self.lock:
            self.num_images -= 1

    def _run(self) -> None:
        try:
            try:
                self._start_process()
            except VisionStopped as error:
                self._postpone(error)
                self.on_loaded(error)
            while not self.stopping:
                self._recover()
                batch = self._next_batch()
                try:
                    self._answer(batch)
                except VisionStopped as error:
                    self._postpone(error)
                finally:
                    fail(batch, self._stopped())
        finally:
            self._end_process()
            self._refuse_waiting()

    def _postpone(self, error: VisionStopped) -> None:
        """A start has failed: refuse what comes, and try again after a pause."""
        self._end_process()
        self.failure = str(error)
        self.failed_starts += 1
        pause_s = self._pause_s(self.failed_starts)
        self.next_start = time.monotonic() + pause_s
        self._refuse_waiting()
        if not self.stopping:
            logger.error("the vision process could not be started: %s; trying again in %.0f s", error, pause_s)

    def _recover(self) -> None:
        """Start a process where the last start failed or its process died, and the pause is over."""
        has_died = self.process is not None and not self.process.is_alive()
        if not (self.failure or has_died) or time.monotonic() < self.next_start:
            return
        try:
            if has_died:
                self.idle_deaths += 1
                self.next_start = time.monotonic() + self._pause_s(self.idle_deaths)
                self._restart(ProcessDied("while it was idle"), 0)
            else:
                self._start_process()
        except VisionStopped as error:
            self._postpone(error)
        else:
            self.failure, self.failed_starts = "", 0
            logger.warning("the vision process runs again")

    def _pause_s(self, num_failures: int) -> float:
        """Before the next start."""
        return min(MAX_RETRY_PAUSE_S, self.options.retry_pause_s * 2.0 ** (num_failures - 1))

    def _stopped(self) -> VisionStopped:
        return VisionStopped(self.failure or "the vision process has stopped; restart the server")

    def _next_batch(self) -> list[Pending]:
        """The first job, and what comes within the window; jobs whose client left are dropped."""
        batch: list[Pending] = []
        deadline = time.monotonic() + IDLE_POLL_S
        while len(batch) < self.options.max_batch and not self.stopping:
            try:
                entry = self.inbox.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                break
            if entry is not None and entry.future.set_running_or_notify_cancel():
                if not batch:
                    deadline = time.monotonic() + self.options.window_s
                batch.append(entry)
        return batch

    def _answer(self, batch: list[Pending]) -> None:
        """Exchange a batch. Where the process dies over it, its jobs are tried again one by one, so that only the

        image that kills it fails. Errors: VisionStopped where no new process comes up.
        """
        if not batch:
            return
        if self.process is None or not self.process.is_alive():
            self._restart(ProcessDied("while it was idle"), 0)
        started = time.monotonic()
        try:
            answers = self._exchange([entry.job for entry in batch])
        except ProcessDied as death:
            self._restart(death, len(batch))
            if len(batch) == 1:
                fail(batch, ImageCrashed("the vision process failed on this image"))
            else:
                for entry in batch:
                    self._answer([entry])
            return
        self.idle_deaths = 0
        taken = time.monotonic() - started
        self.seconds_per_image += 0.2 * (taken / len(batch) - self.seconds_per_image)
        for entry, answer in zip(batch, answers, strict=True):
            answer.header.setdefault("timings", {})["queue_ms"] = round((started - entry.submitted) * 1e3, 3)
            entry.future.set_result(answer)

    def _exchange(self, jobs: Sequence[Job]) -> list[JobAnswer]:
        assert self.process is not None
        return self.process.exchange(jobs, self.options.answer_timeout_s)

    def _start_process(self) -> None:
        """Start the process and wait until its models are loaded. Errors: VisionStopped."""
        options = self.options
        self.process = VisionProcess(self.paths, options.limits, options.niceness)
        if self.stopping:
            raise self._stopped()
        self.models = self.process.wait_until_loaded(options.load_timeout_s)
        self._loaded()

    def _loaded(self) -> None:
        """Tell, once, that the models can answer."""
        if not self.is_loaded:
            self.is_loaded = True
            self.on_loaded(None)

    def _restart(self, death: ProcessDied, num_images: int) -> None:
        """A new process for the dead one. Errors: VisionStopped."""
        self._end_process()
        if self.stopping:
            raise self._stopped()
        self.restarts += 1
        logger.error("the vision process died over %d images (%s); starting another", num_images, death)
        self._start_process()

    def _end_process(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.end()

    def _refuse_waiting(self) -> None:
        while True:
            try:
                entry = self.inbox.get_nowait()
            except queue.Empty:
                return
            if entry is not None and entry.future.set_running_or_notify_cancel():
                fail([entry], self._stopped())


def fail(batch: Sequence[Pending], error: VisionError) -> None:
    """Give ``error`` to whichever jobs of ``batch`` are not answered yet."""
    for entry in batch:
        if not entry.future.done():
            entry.future.set_exception(error)
