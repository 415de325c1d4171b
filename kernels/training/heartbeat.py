"""Signs of life for a run whose output goes to a file: a line at least every half minute, and a log in its folder."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)

INTERVAL_S = 30.0
LOG_FILE = "run.log"


class Heartbeat:
    """Logs what is being done, how far it is and how long it will take, from a thread of its own.

    So a line comes also while one step, a load or an evaluation takes minutes. ``enabled`` False says nothing, where a
    bar shows the same.
    """

    def __init__(self, what: str, total: int | None = None, done: int = 0, *, enabled: bool = True) -> None:
        self.what, self.total, self.done, self.first_done = what, total, done, done
        self.enabled = enabled
        self.began = time.monotonic()
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Say what begins, and go on saying it."""
        if not self.enabled or self.thread is not None:
            return
        self.began = time.monotonic()
        logger.info("%s", self.line(0.0))
        self.thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Say no more. May be called again."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join()

    def line(self, elapsed_s: float) -> str:
        """What is being done after so many seconds."""
        if self.total is None:
            return f"{self.what}: {duration(elapsed_s)} so far" if elapsed_s else self.what
        new = self.done - self.first_done
        left = f", about {duration(elapsed_s * (self.total - self.done) / new)} left" if new > 0 else ""
        return f"{self.what}: {self.done} of {self.total}, {duration(elapsed_s)} so far{left}"

    def _beat(self) -> None:
        while not self.ended.wait(INTERVAL_S):
            logger.info("%s", self.line(time.monotonic() - self.began))


def duration(seconds: float) -> str:
    """``47 s``, ``12 min`` or ``3 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


@contextlib.contextmanager
def run_log(recipe: Mapping[str, Any]) -> Iterator[None]:
    """The folder that a recipe's ``training.output`` names, from the first second, with everything logged in a file."""
    table = recipe.get("training")
    output = table.get("output") if isinstance(table, Mapping) else None
    if not isinstance(output, str):  # the recipe's own check says what is wrong with it
        yield
        return
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
