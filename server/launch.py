"""From settings to a loaded model: target, drafter, codec and the engine around them. torch is imported when called."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from server.text import TextCodec

if TYPE_CHECKING:
    from drafters.drafter import Drafter
    from server.engine.thread import EngineThread
    from server.targets.target import TargetInfo
    from server.targets.torch_target import TorchTarget

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]


class LaunchError(ValueError):
    """A model named on the command line cannot be found or does not fit the others."""


@dataclass(frozen=True)
class LoadedModel:
    """Everything a server needs to answer for one model."""

    name: str
    created: int
    engine: EngineThread
    codec: TextCodec
    info: TargetInfo
    drafter_name: str
    context_length: int


def resolve_model(name: str | None, bundled: str) -> Path:
    """The folder of a target or drafter: None is the bundled one, else a folder, else a hub id (fetched)."""
    if name is None:
        return ASSETS / bundled
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise LaunchError(f"{name!r} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise LaunchError(f"{name!r} is no local folder, and the hub did not give it: {error}") from error


def num_usable_cores() -> int:
    """Cores this process may use: affinity, cut by the cgroup's quota where one is set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.is_file():
        quota, period = quota_file.read_text(encoding="utf-8").split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def load_target(folder: Path, weights: str, num_slots: int, capacity: int, threads: int | None) -> TorchTarget:
    """The target with ``capacity`` rows a slot; ``threads`` None takes every usable core."""
    import torch

    from server.targets.torch_target import TorchTarget

    torch.set_num_threads(threads or num_usable_cores())
    return TorchTarget.load(folder, weights, num_slots, capacity)


def load_drafter(target: TorchTarget, name: str | None, device: str, num_slots: int, capacity: int) -> Drafter | None:
    """``none``: no drafter; ``ngram``: prompt lookup; otherwise a drafter folder (None: the bundled one)."""
    from drafters.ngram import NgramDrafter

    from server.placement.devices import drafter_placement

    if name == "none":
        return None
    if name == "ngram":
        return NgramDrafter()
    from drafters.dovetail import DovetailDrafter

    placement = drafter_placement(device)
    drafter = DovetailDrafter.load(
        resolve_model(name, "drafter"),
        target.embedding(),
        target.lm_head(),
        placement.device,
        placement.dtype,
        num_slots,
        capacity,
    )
    missing = set(drafter.feature_layers) - set(target.info.feature_layers)
    if missing:
        raise LaunchError(
            f"the drafter needs the target's features {', '.join(sorted(missing))}; {target.info.name} gives "
            f"{', '.join(target.info.feature_layers)}"
        )
    return drafter
