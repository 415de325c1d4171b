"""The vision endpoints and text beside them, of two checkouts of Dovetail on one machine, in turns.

    python docs/bench/vision_versions.py FOLDER_BEFORE FOLDER_NOW OUTPUT.json

Both folders have their native library built. Each serves its default model without a drafter, its bundled detector and
its bundled face scorer; requests are the same. In every round each figure is taken of one server and then of the other,
which rests meanwhile; medians over the rounds, and the median of the rounds' ratios. Rounds are short: what else a
shared machine does comes and goes in seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from server.bench.face_quality import LANDMARKS
from server.bench.face_quality import ROUTE as FACE_ROUTE
from server.bench.vision import (
    DETECTION_ROUTE,
    POLL_S,
    START_TIMEOUT_S,
    TEXT_CLIENTS_BESIDE,
    Load,
    is_healthy,
    measure_endpoint,
    sample_picture,
    tokens_per_s,
)
from server.placement.machine import measure_machine

ROUNDS, SECONDS, TOKENS = 11, 0.4, 64
CLIENTS = (1, 4)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[int]:
    """A checkout's own server, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    models = (folder / "server" / "assets" / name for name in ("detector", "face_quality"))
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--drafter", "none"]
    command += [*(word for model in models for word in ("--vision", str(model))), "--port", str(port)]
    server = subprocess.Popen(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, stderr=subprocess.DEVNULL
    )
    try:
        yield port
    finally:
        server.terminate()
        server.wait()


def wait_for(port: int) -> None:
    """Until everything is loaded. Errors: RuntimeError."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_healthy(port):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server on port {port} did not come up")
        time.sleep(POLL_S)


def figures(picture: bytes) -> dict[str, Callable[[int], float]]:
    """What is measured of the server on a port: pictures a second, tokens a second."""
    routes = {"detections": (DETECTION_ROUTE, {}), "face-quality": (FACE_ROUTE, {"landmarks": landmarks()})}

    def pictures(route: str, fields: dict[str, str], clients: int) -> Callable[[int], float]:
        def measure(port: int) -> float:
            found = measure_endpoint(port, picture, clients, SECONDS, route, fields)
            if found["failures"]:
                raise RuntimeError(f"{route} on port {port} failed {found['failures']} times")
            speed: float = found["images_per_s"]
            return speed

        return measure

    def beside(port: int) -> float:
        with Load(port, picture, TEXT_CLIENTS_BESIDE):
            time.sleep(2 * POLL_S)
            return tokens_per_s(port, TOKENS)

    measured = {
        f"{name}, {clients} clients, images/s": pictures(route, fields, clients)
        for name, (route, fields) in routes.items()
        for clients in CLIENTS
    }
    return measured | {
        "text alone, tokens/s": lambda port: tokens_per_s(port, TOKENS),
        f"text beside {TEXT_CLIENTS_BESIDE} clients of detections, tokens/s": beside,
    }


def landmarks() -> str:
    """Of one large face."""
    return json.dumps([LANDMARKS.tolist()])


def main(before: Path, now: Path, output: Path) -> None:
    """Rounds in turns, the report after each."""
    measured = figures(sample_picture())
    hardware = measure_machine().json()
    taken: dict[str, dict[str, list[float]]] = {name: {"before": [], "now": []} for name in measured}
    with served(before) as old, served(now) as new:
        ports = {"before": old, "now": new}
        for port in ports.values():
            wait_for(port)
            tokens_per_s(port, TOKENS)
        for number in range(ROUNDS):
            order = list(ports) if number % 2 == 0 else list(reversed(ports))
            for name, measure in measured.items():
                for version in order:
                    taken[name][version].append(measure(ports[version]))
            report = {"hardware": hardware, "rounds": number + 1, "seconds": SECONDS, "rows": rows(taken)}
            output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def rows(taken: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Medians, and the median of the rounds' ratios."""
    return {
        name: {
            "before": statistics.median(each["before"]),
            "now": statistics.median(each["now"]),
            "now_over_before": round(
                statistics.median(b / a for a, b in zip(each["before"], each["now"], strict=True)), 3
            ),
            "rounds": each,
        }
        for name, each in taken.items()
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
