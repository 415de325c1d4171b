"""Wall-clock comparison of contenders that do the same work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Step = Callable[[], object]

FEWEST_REPEATS = 3


@dataclass(frozen=True)
class Timing:
    """Quartiles of one contender's time in milliseconds."""

    lower_ms: float
    median_ms: float
    upper_ms: float

    def clearly_beats(self, other: Timing) -> bool:
        """Faster beyond noise: the slower half of these runs still lies below the faster half of the others."""
        return self.upper_ms < other.lower_ms


def compare(
    steps: Mapping[str, Step],
    device: torch.device,
    warmups: int = 3,
    repeats: int = 15,
    limit_s: float = math.inf,
) -> dict[str, Timing]:
    """Time every step ``repeats`` times after ``warmups``, turn by turn, so that a slow moment meets all alike.

    Once ``limit_s`` have passed since the warm-up no turn begins, but each step is timed three times in any case.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(warmups):
        for step in steps.values():
            time_once(step, device)
    started = time.perf_counter()
    for turn in range(repeats):
        if turn >= FEWEST_REPEATS and time.perf_counter() - started > limit_s:
            break
        for name, step in steps.items():
            samples[name].append(time_once(step, device))
    return {name: quartiles(times) for name, times in samples.items()}


def quartiles(milliseconds: Sequence[float]) -> Timing:
    """The quartiles, to a tenth of a microsecond."""
    return Timing(*(round(float(quartile), 4) for quartile in np.percentile(milliseconds, (25, 50, 75))))


def time_once(step: Step, device: torch.device) -> float:
    """Milliseconds of one call, with the device's queue empty before and after."""
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    return (time.perf_counter() - started) * 1000


def synchronize(device: torch.device) -> None:
    """Wait for ``device``; a CPU has nothing queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
