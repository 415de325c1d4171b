"""The process that looks at images: niced, one thread, one batch at a time. Started by ``server.vision.child``.

It shares nothing with the server but a pipe of JSON headers and image bytes; nothing is unpickled from it. An image
that crashes a decoder takes this process with it, not the server.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vision.images import ImageError, ImageLimits, decode_image
from vision.serving.batch import Request, answer_all
from vision.serving.load import load_models
from vision.serving.protocol import Answering, Model

# At equal priority a busy vision process costs text most of its speed; at the lowest, next to nothing.
NICENESS = 19
NUM_THREADS = 1
JPEG_QUALITY = 90
Answer = tuple[dict[str, Any], bytes]


def run_vision_process(connection: Connection, models: Mapping[str, str], limits: ImageLimits, niceness: int) -> None:
    """Load ``models`` (name to path), tell what they are, then answer batches until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server ends this process itself
    if hasattr(os, "nice"):
        os.nice(niceness)
    with contextlib.suppress(EOFError, OSError):  # the server is gone
        try:
            loaded = load_models({name: Path(path) for name, path in models.items()}, NUM_THREADS)
        except (ValueError, OSError, ImportError) as error:
            send(connection, {"failed": str(error)})
            return
        send(connection, {"models": [model.info.json() for model in loaded.values()]})
        while True:
            jobs = json.loads(connection.recv_bytes())["jobs"]
            images = [connection.recv_bytes() for _ in jobs]
            answers = answer_batch(loaded, jobs, images, limits)
            send(connection, {"answers": [header for header, _ in answers]})
            for _, picture in answers:
                connection.send_bytes(picture)


def send(connection: Connection, header: Mapping[str, Any]) -> None:
    """One JSON object."""
    connection.send_bytes(json.dumps(header).encode())


def answer_batch(
    models: Mapping[str, Model], jobs: Sequence[Mapping[str, Any]], images: Sequence[bytes], limits: ImageLimits
) -> list[Answer]:
    """One answer a job, ``{answer, width, height, timings}`` with the drawn picture's bytes, or ``{error}``."""
    opened = [OpenedJob(models[job["model"]], job, data, limits) for job, data in zip(jobs, images, strict=True)]
    answer_all([job.request for job in opened])
    return [job.answer() for job in opened]


class OpenedJob:
    """One job on its way: its file is decoded when ``vision.serving.batch`` has room for it."""

    def __init__(self, model: Model, job: Mapping[str, Any], data: bytes, limits: ImageLimits) -> None:
        self.model, self.job, self.data, self.limits = model, job, data, limits
        self.request = Request(self.open)
        self.head: dict[str, Any] = {}

    def open(self) -> tuple[Answering, int]:
        """Decode the image. Errors: ImageError."""
        whole = self.model.kind.full_size(self.job["options"])
        picture = decode_image(self.data, self.limits, None if whole else self.model.info.image_size)
        self.head = {"width": picture.width, "height": picture.height}
        pixels = picture.image.width * picture.image.height if whole else 0
        return self.model.answer(picture, self.job["options"]), pixels

    def answer(self) -> Answer:
        """The answer's header, and the drawn picture: empty where nobody asked."""
        found = self.request.answer
        if isinstance(found, ImageError):
            return {"error": {"code": found.code, "message": str(found)}}, b""
        assert found is not None
        timings = {"decode_ms": in_ms(self.request.opening_s), "inference_ms": in_ms(self.request.network_s)}
        drawn = draw(self.model, self.data, found, self.job["draw"], self.limits)
        return self.head | {"answer": found, "timings": timings}, drawn


def draw(model: Model, data: bytes, answer: dict[str, Any], file_format: str | None, limits: ImageLimits) -> bytes:
    """The answer drawn on the whole image, decoded again for it, as a file; empty where nobody asked."""
    if file_format is None:
        return b""
    buffer = io.BytesIO()
    model.kind.draw(decode_image(data, limits).image, answer).save(buffer, file_format, quality=JPEG_QUALITY)
    return buffer.getvalue()


def in_ms(seconds: float) -> float:
    """Milliseconds, to the microsecond."""
    return round(seconds * 1e3, 3)
