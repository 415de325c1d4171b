"""A machine that is not here, from a line such as ``cores=16,bandwidth=80,vram=4GiB,gpu_tflops=10,pcie=12``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server.placement.cost import Rates
from server.placement.machine import Machine
from server.placement.shape import PlanError
from server.settings import parse_bytes

GMAC_PER_CORE = (
    60.0  # 8-bit multiply-adds of an AVX2 core: 32 each cycle at some 2 GHz; VNNI has two to five times that
)
MARGIN_BYTES = 512 * 2**20  # of a card's free memory: the driver's own, and what else comes up meanwhile
GPU_GB_PER_S, GPU_TFLOPS = 200.0, 5.0  # a small card, where nothing is said of it


@dataclass(frozen=True)
class WhatIf:
    """vram None: no GPU. blocks, layers and rows fix what is searched otherwise."""

    cores: int = 8
    bandwidth: float = 40.0
    dots: float | None = None
    vram: int | None = None
    gpu_bandwidth: float = GPU_GB_PER_S
    gpu_tflops: float = GPU_TFLOPS
    pcie: float = 6.0
    latency_us: float = 20.0
    engine: str = "native"
    acceptance: float | None = None
    blocks: int | None = None
    layers: int | None = None
    rows: int | None = None

    def rates(self) -> Rates:
        """The machine as costs see it."""
        return Rates(
            stream_gb_per_s=self.bandwidth,
            dot_gmac_per_s=self.dots or self.cores * GMAC_PER_CORE,
            gpu_gb_per_s=self.gpu_bandwidth,
            gpu_tflops=self.gpu_tflops,
            bus_gb_per_s=self.pcie,
            bus_latency_us=self.latency_us,
            native=self.engine == "native",
            acceptance=self.acceptance,
        )


def this_machine(machine: Machine, card: int = 0) -> WhatIf:
    """What was measured here; vram is what is free on that card, less a margin, None where it was not measured."""
    known = WhatIf(cores=machine.cores, bandwidth=machine.stream_gb_per_s, dots=machine.dot_gmac_per_s)
    found = next((gpu for gpu in machine.gpus if gpu.index == card), None)
    if found is None:
        return known
    return dataclasses.replace(
        known,
        vram=max(found.free_bytes - MARGIN_BYTES, 1),
        gpu_bandwidth=found.stream_gb_per_s,
        gpu_tflops=found.fp16_tflops,
        pcie=min(found.to_gb_per_s, found.from_gb_per_s),
        latency_us=max(found.to_latency_us, found.from_latency_us),
    )


READERS: dict[str, Callable[[str], Any]] = {
    "cores": int, "bandwidth": float, "dots": float, "vram": parse_bytes, "gpu_bandwidth": float, "gpu_tflops": float,
    "pcie": float, "latency_us": float, "engine": str, "acceptance": float, "blocks": int, "layers": int, "rows": int,
}  # fmt: skip
MAY_BE_ZERO = {"latency_us", "blocks", "layers"}


def parse_what_if(text: str) -> WhatIf:
    """Errors: PlanError naming the part that is wrong, with what is allowed."""
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in READERS or not equals:
            near = difflib.get_close_matches(name, READERS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise PlanError(f"--what-if: {part!r} is not NAME=VALUE with a known name ({', '.join(READERS)}){hint}")
        try:
            values[name] = READERS[name](value)
        except ValueError as error:
            raise PlanError(f"--what-if: {name} is {value!r}: {error}") from error
        least = 0 if name in MAY_BE_ZERO else 1e-9
        if isinstance(values[name], int | float) and not least <= values[name] < float("inf"):
            raise PlanError(f"--what-if: {name} is {value}; it must be {'at least' if least == 0 else 'above'} 0")
    if values.get("engine", "native") not in ("native", "torch"):
        raise PlanError(f"--what-if: engine is {values['engine']!r}; allowed are native and torch")
    if values.get("acceptance") is not None and values["acceptance"] <= 1:
        raise PlanError(
            f"--what-if: an acceptance length of {values['acceptance']:g} is no drafting; it must be above 1"
        )
    return dataclasses.replace(WhatIf(), **values)
