"""What ``dovetail bench vision`` measures: a detector alone, the endpoint under load, and text beside it."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from server.bench.vision_peer import PeerDetector, export_peer
from server.placement.machine import measure_machine
from vision.images import decode_image
from vision.serving.batch import answer_pictures
from vision.serving.load import load_model
from vision.serving.protocol import Model, Pixels

PICTURE_SIZE = (640, 480)
DETECTION_ROUTE = "/v1/vision/detections"
PROMPT = "def fibonacci(n):\n"
START_TIMEOUT_S = 120.0
POLL_S = 0.1
LOW_THRESHOLD = 0.05
TEXT_CLIENTS_BESIDE = 4


@dataclass(frozen=True)
class VisionBenchOptions:
    """``detector``: folder or file; ``clients``: loads of the endpoint; ``seconds``: of each measurement.

    ``repeats``: single-thread images, and turns of text with and without vision. ``target`` None is the bundled one.
    """

    detector: Path
    clients: tuple[int, ...] = (1, 4, 8)
    seconds: float = 4.0
    repeats: int = 3
    peer: bool = True
    text: bool = True
    target: str | None = None
    max_tokens: int = 128


Progress = Callable[[str], None]


def measure_vision(options: VisionBenchOptions, progress: Progress) -> dict[str, Any]:
    """The whole report."""
    picture = sample_picture()
    report: dict[str, Any] = {"hardware": measure_machine().json()}
    progress("one thread")
    report["single_thread"] = measure_single_thread(options, picture)
    report["peak_memory_mb"] = measure_peak_memory(options.detector, picture)
    with running_server(options) as port:
        report["endpoint"] = {}
        for count in options.clients:
            progress(f"endpoint, {count} clients")
            report["endpoint"][str(count)] = measure_endpoint(port, picture, count, options.seconds)
        if options.text:
            progress("text with and without vision")
            report["text"] = measure_text(port, picture, options)
    return report


def sample_picture() -> bytes:
    """A JPEG with the structure of a photograph's frequencies, always the same."""
    generator = np.random.default_rng(0)
    total = np.zeros((PICTURE_SIZE[1], PICTURE_SIZE[0], 3))
    for cells in (4, 16, 64):
        noise = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(noise.resize(PICTURE_SIZE, Image.Resampling.BICUBIC), dtype=float) / cells**0.5
    buffer = io.BytesIO()
    Image.fromarray((255 * total / total.max()).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def measure_single_thread(options: VisionBenchOptions, picture: bytes) -> dict[str, Any]:
    """Milliseconds an image on one thread from the file's bytes to boxes; detector and peer take turns."""
    model = load_model(options.detector, num_threads=1)
    with tempfile.TemporaryDirectory() as folder:
        peer = None
        if options.peer:
            file = Path(folder) / "peer.onnx"
            export_peer(file, model.info.image_size)
            peer = PeerDetector(file, model.info.image_size)
        times: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(10 * options.repeats):
            times["ours"].append(timed(lambda: detect(model, picture)))
            if peer is not None:
                times["peer"].append(timed(lambda: peer.run(prepare(model, picture))))
    result: dict[str, Any] = {
        "model": model.info.name,
        "runtime": model.info.runtime,
        "image_size": model.info.image_size,
        "ms_per_image": round(statistics.median(times["ours"]), 2),
        "decode_and_resize_ms": round(statistics.median(timed(lambda: prepare(model, picture)) for _ in range(10)), 2),
    }
    if times["peer"]:
        peer_ms = statistics.median(times["peer"])
        result["peer"] = {"name": "NanoDet-m structure, random weights", "ms_per_image": round(peer_ms, 2)}
        result["peer_over_ours"] = round(peer_ms / statistics.median(times["ours"]), 3)
    return result


# Asked of a process of its own, without torch; ru_maxrss would hold the memory of the process that started it.
MEMORY_PROBE = """
import sys
from pathlib import Path
from vision.images import decode_image
from vision.serving.batch import answer_pictures
from vision.serving.load import load_model

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1e3

picture, before = sys.stdin.buffer.read(), peak()
model = load_model(Path(sys.argv[1]), num_threads=1)
answer_pictures(model, [decode_image(picture, enough=model.info.image_size)], {})
print(before, peak())
"""


def measure_peak_memory(detector: Path, picture: bytes) -> dict[str, float] | None:
    """Megabytes of a process that loads the detector and looks at one image, and before that; None but on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    command = [sys.executable, "-c", MEMORY_PROBE, str(detector)]
    done = subprocess.run(command, input=picture, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    before, peak = (round(float(value), 1) for value in done.stdout.split())
    return {"before_loading": before, "peak": peak}


def prepare(model: Model, picture: bytes) -> Pixels:
    """Bytes to the network's input [3, S, S]."""
    rows: Pixels = next(model.answer(decode_image(picture, enough=model.info.image_size), {})).rows
    image: Pixels = rows[0]
    return image


def detect(model: Model, picture: bytes) -> None:
    """Bytes to boxes."""
    decoded = decode_image(picture, enough=model.info.image_size)
    answer_pictures(model, [decoded], {"score_threshold": LOW_THRESHOLD})


def timed(work: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


@contextlib.contextmanager
def running_server(options: VisionBenchOptions) -> Iterator[int]:
    """``dovetail serve`` as a user starts it, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    what = [*([options.target] if options.target else [])] if options.text else ["--no-llm"]
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", *what, "--drafter", "none"]
    command += ["--vision", str(options.detector), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_healthy(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not come up; `dovetail serve` with the same model says why")
            time.sleep(POLL_S)
        yield port
    finally:
        server.terminate()
        server.wait()


def is_healthy(port: int) -> bool:
    """Whether everything is loaded."""
    try:
        return request(port, "GET", "/health", b"", "text/plain")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def request(port: int, method: str, route: str, body: bytes, kind: str) -> tuple[int, bytes]:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_TIMEOUT_S)
    try:
        connection.request(method, route, body, {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


class Load:
    """``count`` clients, each sending the next image as soon as its last is answered; ``fields`` stand beside it."""

    def __init__(
        self,
        port: int,
        picture: bytes,
        count: int,
        route: str = DETECTION_ROUTE,
        fields: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.port, self.route = port, route
        edge = "dovetail-bench"
        parts = [
            f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        ]
        head = "".join(parts) + f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n'
        self.body = f"{head}Content-Type: image/jpeg\r\n\r\n".encode() + picture + f"\r\n--{edge}--\r\n".encode()
        self.kind = f"multipart/form-data; boundary={edge}"
        self.stopping = threading.Event()
        self.times: list[float] = []
        self.failures: list[float] = []
        self.threads = [threading.Thread(target=self._send) for _ in range(count)]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def _send(self) -> None:
        while not self.stopping.is_set():
            started = time.perf_counter()
            status, _ = request(self.port, "POST", self.route, self.body, self.kind)
            (self.times if status == 200 else self.failures).append(time.perf_counter() - started)


def measure_endpoint(
    port: int,
    picture: bytes,
    count: int,
    seconds: float,
    route: str = DETECTION_ROUTE,
    fields: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Images per second and the clients' waiting times."""
    with Load(port, picture, 1, route, fields) as warm:
        while not (warm.times or warm.failures):
            time.sleep(POLL_S)
    started = time.perf_counter()
    with Load(port, picture, count, route, fields) as load:
        time.sleep(seconds)
    taken = time.perf_counter() - started
    times = sorted(load.times)
    return {
        "images_per_s": round(len(times) / taken, 2),
        "p50_ms": round(statistics.median(times) * 1e3, 1) if times else None,
        "max_ms": round(times[-1] * 1e3, 1) if times else None,
        "failures": len(load.failures),
    }


def measure_text(port: int, picture: bytes, options: VisionBenchOptions) -> dict[str, Any]:
    """Tokens per second of one text, in turns alone and beside ``TEXT_CLIENTS_BESIDE`` vision clients."""
    alone: list[float] = []
    beside: list[float] = []
    images = 0
    tokens_per_s(port, options.max_tokens)
    for _ in range(options.repeats):
        alone.append(tokens_per_s(port, options.max_tokens))
        with Load(port, picture, TEXT_CLIENTS_BESIDE) as load:
            time.sleep(2 * POLL_S)
            beside.append(tokens_per_s(port, options.max_tokens))
        images += len(load.times)
    loss = 1 - statistics.median(beside) / statistics.median(alone)
    return {
        "alone_tokens_per_s": round(statistics.median(alone), 1),
        "beside_tokens_per_s": round(statistics.median(beside), 1),
        "loss": round(loss, 3),
        "vision_clients": TEXT_CLIENTS_BESIDE,
        "images_meanwhile": images,
    }


def tokens_per_s(port: int, max_tokens: int) -> float:
    """The speed that one answer reports."""
    models = json.loads(request(port, "GET", "/v1/models", b"", "text/plain")[1])["data"]
    body = {"model": models[0]["id"], "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    _, answer = request(port, "POST", "/v1/completions", json.dumps(body).encode(), "application/json")
    speed: float = json.loads(answer)["timings"]["tokens_per_s"]
    return speed
