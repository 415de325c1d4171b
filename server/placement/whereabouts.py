"""What lies where while a server runs, and how large it is: for ``/health`` and ``/v1/models``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.engine.ahead import AheadDrafter
from server.engine.engine import Engine
from server.placement.moving_drafter import MovingDrafter
from server.placement.serving import Placed
from server.placement.shape import STORED, PlanError, read_shape
from server.targets.checkpoint import stored_weights
from server.targets.native_target import NativeTarget
from server.targets.split_target import SplitTarget


def target_sizes(folder: Path, weights: str | None, rows: int) -> dict[str, int]:
    """``weight_bytes`` of a target, and ``kv_bytes`` of so many rows, by its shape; empty where that is not known."""
    try:
        shape = read_shape(str(folder))
        weights = weights or (STORED if shape.stored_bytes is not None else stored_weights(folder))
        return {
            "weight_bytes": round(shape.target_bytes(weights)),
            "kv_bytes": rows * shape.kv_bytes(shape.num_layers, weights),
        }
    except PlanError:
        return {}


def placement_status(engine: Engine, placed: Placed, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Where drafter and layers are now, and why they are not where they were to be. May be called from any thread.

    ``sizes``: of the target, in bytes. bus_bytes: hidden states and features to an accelerator and from it, and what
    goes each way where it reads prompts.
    """
    drafter, target = engine.drafting.drafter, engine.target
    here: dict[str, Any] = {"device": "cpu", "layers": target.info.num_layers, "weights": target.info.weights} | dict(
        sizes
    )
    bus = {"up": 0, "down": 0}
    found: dict[str, Any] = {"reason": placed.reason, "target": here, "bus_bytes": bus}
    if isinstance(drafter, AheadDrafter):
        found["drafts_ahead"] = {"on": drafter.trial.ahead and drafter.trial.settled, "gain": drafter.trial.gain}
        drafter = drafter.drafter
    if isinstance(drafter, MovingDrafter):
        found["drafter"] = {"device": drafter.device, "reason": drafter.recovery.reason}
        bus["up"] += drafter.bytes_up
    elif drafter is not None:
        found["drafter"] = {"device": str(placed.drafter.device), "reason": ""}
    if drafter is not None:
        found["drafter"]["bytes"] = placed.drafter_bytes
    if isinstance(target, SplitTarget):
        found["gpu_layers"] = dataclasses.asdict(target.upper_state)
        here["layers"] -= target.upper_state.layers
        for way, count in target.bus_bytes.items():
            bus[way] += count
    if isinstance(target, NativeTarget) and target.prompts is not None:
        found["prompts"] = target.prompts.state
        for way, count in found["prompts"]["bus_bytes"].items():
            bus[way] += count
    return found
