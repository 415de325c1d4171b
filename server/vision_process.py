"""The process that looks at images: niced, one thread, one batch at a time. Started by ``server.vision_worker``.

It shares nothing with the server but a pipe of JSON headers and image bytes; nothing is unpickled from it. An image
that crashes a decoder takes this process with it, not the server.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vision.images import ImageError, ImageLimits, decode_image
from vision.predict import VisionModel, load_vision_model

logger = logging.getLogger(__name__)

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
            loaded = {name: load_vision_model(Path(path), NUM_THREADS, name) for name, path in models.items()}
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
    models: Mapping[str, VisionModel], jobs: Sequence[Mapping[str, Any]], images: list[bytes], limits: ImageLimits
) -> list[Answer]:
    """One answer a job. Jobs of one model run as one batch; only one image at a time is held decoded.

    An answer is ``{answer, width, height, timings}`` with the drawn picture's bytes, or ``{error}``.
    """
    answers: list[Answer] = [({}, b"")] * len(jobs)
    for name, model in models.items():
        prepared: dict[int, Any] = {}
        heads: dict[int, dict[str, Any]] = {}
        for index, job in enumerate(jobs):
            if job["model"] != name:
                continue
            started = time.perf_counter()
            try:
                picture = decode_image(images[index], limits, None if model.info.full_size else model.info.image_size)
                prepared[index] = model.prepare(picture, job["options"])
            except ImageError as error:
                answers[index] = ({"error": {"code": error.code, "message": str(error)}}, b"")
            else:
                heads[index] = {"width": picture.width, "height": picture.height, "decode_ms": since_ms(started)}
        if not prepared:
            continue
        started = time.perf_counter()
        found = model.predict(list(prepared.values()))
        inference_ms = since_ms(started) / len(prepared)
        for index, answer in zip(prepared, found, strict=True):
            head = heads[index]
            timings = {"decode_ms": head.pop("decode_ms"), "inference_ms": round(inference_ms, 3)}
            drawn = draw(model, images[index], answer, jobs[index]["draw"], limits)
            answers[index] = (head | {"answer": answer, "timings": timings}, drawn)
    return answers


def draw(
    model: VisionModel, data: bytes, answer: Mapping[str, Any], file_format: str | None, limits: ImageLimits
) -> bytes:
    """The answer drawn on the whole image, decoded again for it, as a file; empty where nobody asked."""
    if file_format is None:
        return b""
    buffer = io.BytesIO()
    model.draw(decode_image(data, limits).image, answer).save(buffer, file_format, quality=JPEG_QUALITY)
    return buffer.getvalue()


def since_ms(started: float) -> float:
    """Milliseconds since a moment of ``time.perf_counter``."""
    return round((time.perf_counter() - started) * 1e3, 3)
