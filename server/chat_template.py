"""A model's chat template, rendered in a process of its own that is bounded in time, memory and length."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("template_process.py")
CPU_S, WALL_S = 2.0, 20.0
MAX_BYTES = 512 * 2**20
# A template repeats what it is given a few times at most, and adds a page of instructions of its own.
FREE_LENGTH, GROWTH = 1_000_000, 4
TIMED_OUT = (-getattr(signal, "SIGPROF", 0), -getattr(signal, "SIGALRM", 0))


class TemplateFault(ValueError):
    """The template is not valid Jinja, refuses what it is given, or takes more than a template may."""


class ChatTemplate:
    """One template. The process is started when it is first needed, and again where it has ended.

    Safe to call from several threads, one of which renders at a time.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def check(self) -> None:
        """Compile it. Errors: TemplateFault."""
        self._ask(None, 0)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for these variables, which are plain JSON values. Errors: TemplateFault."""
        size = len(json.dumps(variables))
        return self._ask(dict(variables), FREE_LENGTH + GROWTH * size)

    def _ask(self, variables: dict[str, Any] | None, max_length: int) -> str:
        job = {"template": self.source, "variables": variables, "max_length": max_length}
        with self.lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(job).encode() + b"\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = b""
            if not line:
                raise TemplateFault(self._end_of(process))
        reply: dict[str, str] = json.loads(line)
        if "error" in reply:
            how = "is not valid Jinja" if reply["kind"] == "syntax" else "refuses these messages"
            raise TemplateFault(f"{how}: {reply['error']}")
        return reply["text"]

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            limits = (str(CPU_S), str(WALL_S), str(MAX_BYTES))
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(SCRIPT), *limits],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            weakref.finalize(self, end, self.process)
        return self.process

    def _end_of(self, process: subprocess.Popen[bytes]) -> str:
        end(process)
        self.process = None
        if process.returncode in TIMED_OUT:
            return f"takes more than {CPU_S:g} s and was stopped"
        return f"ended the process that renders it (code {process.returncode})"


def end(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes, on which the process ends by itself, and wait for it."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was still to be written has no reader any more
                pipe.close()
    if process.poll() is None:
        process.kill()
    process.wait()
