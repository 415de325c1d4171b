"""The server's end of the vision process: start it, exchange batches over its pipe, end it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

from server.vision.process import run_vision_process
from vision.images import ImageLimits
from vision.serving.protocol import ModelInfo

GRACE_S = 0.5  # what a process gets to notice that its pipe is closed
END_TIMEOUT_S = 10.0


class VisionError(Exception):
    """Base of what the worker refuses or fails with."""


class VisionStopped(VisionError):
    """The vision process does not run; after a failed restart it is tried again later."""


class ProcessDied(VisionError):
    """The pipe broke or nothing came in time. Never leaves the worker."""


@dataclass(frozen=True)
class Job:
    """One image as a file's bytes, what is asked of it, and "JPEG" or "PNG" where a picture is wanted."""

    model: str
    data: bytes
    options: Mapping[str, Any]
    draw: str | None = None

    def header(self) -> dict[str, Any]:
        """All but the bytes."""
        return {"model": self.model, "options": dict(self.options), "draw": self.draw}


@dataclass(frozen=True)
class JobAnswer:
    """The process's header for one job (``answer, width, height, timings`` or ``error``) and the drawn picture."""

    header: dict[str, Any]
    picture: bytes


class VisionProcess:
    """A running process with the models of ``paths``, name to path."""

    def __init__(self, paths: Mapping[str, str], limits: ImageLimits, niceness: int) -> None:
        # A fresh interpreter: a fork would copy the engine's threads' locks in whatever state they are.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=run_vision_process, args=(theirs, paths, limits, niceness), name="dovetail-vision", daemon=True
        )
        with ctrl_c_blocked():
            self.process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return self.process.pid

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self.process.is_alive()

    def kill(self) -> None:
        """End it at once; may be called from another thread than the one that exchanges."""
        self.process.kill()

    def end(self) -> None:
        """Close the pipe, which ends the process where it still listens; kill it where it does not."""
        self.connection.close()
        self.process.join(GRACE_S)
        self.process.kill()
        self.process.join(END_TIMEOUT_S)

    def wait_until_loaded(self, timeout_s: float) -> tuple[ModelInfo, ...]:
        """What its models are. Errors: VisionStopped."""
        try:
            hello = self._receive(timeout_s)
        except (ProcessDied, EOFError, OSError) as error:
            raise VisionStopped(f"the vision process ended while it loaded its models ({error})") from error
        if "failed" in hello:
            raise VisionStopped(hello["failed"])
        return tuple(ModelInfo(**(model | {"class_names": tuple(model["class_names"])})) for model in hello["models"])

    def exchange(self, jobs: Sequence[Job], timeout_s: float) -> list[JobAnswer]:
        """Answers of a batch. Errors: ProcessDied."""
        try:
            self.connection.send_bytes(json.dumps({"jobs": [job.header() for job in jobs]}).encode())
            for job in jobs:
                self.connection.send_bytes(job.data)
            headers = self._receive(timeout_s)["answers"]
            return [JobAnswer(header, self.connection.recv_bytes()) for header in headers]
        except (EOFError, OSError) as error:
            raise ProcessDied(f"the pipe broke: {error}") from error

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        """One JSON header. Errors: ProcessDied where none comes in time; EOFError, OSError."""
        if not self.connection.poll(timeout_s):
            raise ProcessDied(f"no answer within {timeout_s:.0f} s")
        header: dict[str, Any] = json.loads(self.connection.recv_bytes())
        return header


@contextlib.contextmanager
def ctrl_c_blocked() -> Iterator[None]:
    """A process started from this thread meanwhile never sees Ctrl-C, which reaches the whole group.

    The server ends it itself. Without this the signal meets it while it imports, and it prints a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # a process start would start it, and that unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
