"""What ``dovetail bench face-quality`` measures: the scorer on one thread, and a network of LightQNet's size beside it.

LightQNet (Chen, Yi and Lv, IEEE SPL 28, 2021) has 0.45 million parameters and 77 M multiply-adds at 96 pixels. The peer
here is a stack of inverted residuals of that size with random weights, written from that description: weights do not
change the time of a convolution. Both run on ONNX Runtime and take turns.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from server.bench.vision import VisionBenchOptions, measure_endpoint, running_server, sample_picture
from server.placement.machine import measure_machine
from vision.face_quality.alignment import FACE_SIZE, TEMPLATE
from vision.face_quality.tinyfqnet import InvertedResidual, TinyFQNet, normalize_faces
from vision.serving.export import require_packages, trace_module
from vision.serving.networks import open_session

BATCHES = (1, 32)
ROUTE = "/v1/vision/face-quality"
CLIENTS = (1, 4)
LANDMARKS = 3 * TEMPLATE + 100  # a face of 336 pixels in the sample picture of 640 x 480
PEER_SIDE = 96
PEER = "LightQNet's size class, random weights"
# Expansion, width, stride; the stem keeps the size, as LightQNet's does.
PEER_STEM = 16
PEER_BLOCKS: tuple[tuple[int, int, int], ...] = (
    (3, 24, 2), (4, 40, 2), (3, 40, 1), (4, 64, 2), (5, 64, 1), (5, 64, 1), (5, 80, 1), (4, 80, 1), (5, 112, 2),
    (4, 112, 1),
)  # fmt: skip


class LightPeer(nn.Module):
    """Faces [B, 3, 96, 96] in [0, 1] to scores [B]."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(3, PEER_STEM, 3, 1, padding=1, bias=False)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(PEER_STEM), nn.ReLU()]
        channels = PEER_STEM
        for expansion, width, stride in PEER_BLOCKS:
            layers.append(InvertedResidual(channels, width, stride, expansion))
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Scores."""
        scores: Tensor = self.head(self.features(normalize_faces(images)).mean(dim=(2, 3))).sigmoid().squeeze(1)
        return scores


class Scorer(nn.Module):
    """tinyFQnet behind its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TinyFQNet()

    def forward(self, images: Tensor) -> Tensor:
        """Faces [B, 3, 112, 112] in [0, 1] to scores [B]."""
        scores: Tensor = self.model(normalize_faces(images))
        return scores


def measure_face_quality(
    repeats: int, warmup: int = 5, scorer: Path | None = None, seconds: float = 3.0
) -> dict[str, Any]:
    """The report; times are medians over ``repeats`` turns. With ``scorer`` also the endpoint serving it."""
    require_packages()
    contenders = {"tinyfqnet": (Scorer(), FACE_SIZE), PEER: (LightPeer(), PEER_SIDE)}
    runs: dict[str, Callable[[int], None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (network, side) in contenders.items():
            file = Path(folder) / f"{len(runs)}.onnx"
            export(network.eval(), side, file)
            runs[name] = runner(file, side)
        results = []
        for batch in BATCHES:
            times: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(repeats + warmup):
                for name, run in runs.items():
                    started = time.perf_counter()
                    run(batch)
                    if turn >= warmup:
                        times[name].append((time.perf_counter() - started) * 1e3)
            medians = {name: statistics.median(values) for name, values in times.items()}
            results += [
                {"network": name, "batch": batch, "ms": round(ms, 3), "faces_per_s": round(batch / ms * 1e3, 1)}
                for name, ms in medians.items()
            ]
            results[-1]["over_tinyfqnet"] = round(medians[PEER] / medians["tinyfqnet"], 2)
    sizes = {name: {"parameters": count(network), "side": side} for name, (network, side) in contenders.items()}
    report = {"hardware": measure_machine().json(), "threads": 1, "networks": sizes, "results": results}
    return report if scorer is None else report | {"endpoint": measure_scorer_endpoint(scorer, seconds)}


def measure_scorer_endpoint(scorer: Path, seconds: float) -> dict[str, Any]:
    """Faces per second over HTTP by clients at the same time: a JPEG of 640 x 480 with landmarks, one face each."""
    picture, fields = sample_picture(), {"landmarks": json.dumps([LANDMARKS.tolist()])}
    with running_server(VisionBenchOptions(scorer, text=False)) as port:
        return {str(clients): measure_endpoint(port, picture, clients, seconds, ROUTE, fields) for clients in CLIENTS}


def markdown(report: dict[str, Any]) -> str:
    """The table of one-thread times."""
    lines = ["| network | parameters | faces | ms | faces/s |", "|---|---|---|---|---|"]
    for row in report["results"]:
        parameters = report["networks"][row["network"]]["parameters"]
        lines.append(
            f"| {row['network']} | {parameters:,} | {row['batch']} | {row['ms']:.2f} | {row['faces_per_s']:.0f} |"
        )
    return "\n".join(lines)


def count(network: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def export(network: nn.Module, side: int, file: Path) -> None:
    """One file with a free batch size."""
    trace_module(network, side, ["scores"]).save(file, external_data=False)


def runner(file: Path, side: int) -> Callable[[int], None]:
    """A function that scores a batch of so many random faces on one thread."""
    session = open_session(file, 1)
    faces: NDArray[np.float32] = np.random.default_rng(0).random((max(BATCHES), 3, side, side), dtype=np.float32)

    def run(batch: int) -> None:
        session.run(None, {"images": faces[:batch]})

    return run
