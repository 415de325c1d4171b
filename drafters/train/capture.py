"""Features written to disk once and read by every epoch: sharded safetensors in fp16.

A folder holds ``manifest.json`` (whose features, of which samples) and ``shard-00000.safetensors`` ... Each shard is
written whole under another name and then renamed, so a run that was cut short goes on behind its last whole shard.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from kernels.training.heartbeat import Heartbeat

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
SHARD_SAMPLES = 64
FEATURE_BYTES, MASK_BYTES, ID_BYTES = 2, 1, 8


class CaptureError(ValueError):
    """Captured features are of another target or other samples, or the disk cannot hold them."""


@dataclass(frozen=True)
class Manifest:
    """What a folder of captured features holds.

    ``samples`` is a digest of all token ids and masks; ``layers`` names the target's layers side by side, each
    ``hidden_size`` wide.
    """

    target: str
    samples: str
    num_samples: int
    num_tokens: int
    hidden_size: int
    layers: str = "last"
    shard_samples: int = SHARD_SAMPLES

    @property
    def num_bytes(self) -> int:
        """Disk size of all shards, their headers aside."""
        width = self.hidden_size * len(self.layers.split("+"))
        return self.num_tokens * (width * FEATURE_BYTES + MASK_BYTES + ID_BYTES)

    @property
    def num_shards(self) -> int:
        """Files of up to ``shard_samples`` samples."""
        return -(-self.num_samples // self.shard_samples)


def describe(samples: Any, target: str, hidden_size: int, layers: Sequence[str] = ("last",)) -> Manifest:
    """The manifest of a data set of ``input_ids`` [T] and ``loss_mask`` [T], before anything is computed."""
    digest = hashlib.sha256()
    num_tokens = 0
    for index in range(len(samples)):
        sample = samples[index]
        digest.update(sample["input_ids"].numpy().tobytes())
        digest.update(sample["loss_mask"].numpy().tobytes())
        num_tokens += len(sample["input_ids"])
    return Manifest(target, digest.hexdigest()[:16], len(samples), num_tokens, hidden_size, "+".join(layers))


def shard_file(folder: Path, shard: int) -> Path:
    """The file of one shard."""
    return folder / f"shard-{shard:05}.safetensors"


def capture(samples: Any, compute: Callable[[Tensor], Tensor], folder: Path, manifest: Manifest) -> CapturedSamples:
    """Write the features of all samples, or of those that are missing; returns the data set that reads them.

    ``compute`` maps token ids [1, T] to features [1, T, W]. The size is logged, and compared with the free space,
    before anything is written. Errors: CaptureError for a folder of another target or other samples, and for a disk
    that is, or becomes, too full; whole shards stay in every case.
    """
    missing = prepare(folder, manifest)
    if missing:
        wanted = manifest.num_bytes * len(missing) // manifest.num_shards
        free = shutil.disk_usage(folder).free
        logger.info(
            "capturing features of %d samples (%d tokens) into %s: %.1f MB on disk, %.1f MB of it still to write",
            manifest.num_samples, manifest.num_tokens, folder, manifest.num_bytes / 1e6, wanted / 1e6,
        )  # fmt: skip
        if wanted > free:
            raise CaptureError(
                f"capturing into {folder} takes {wanted / 1e6:.1f} MB more and {free / 1e6:.1f} MB are free; free some "
                "space, name another folder, or leave data.captured out to compute features on the fly"
            )
    console = Console(stderr=True)
    total, done = manifest.num_shards, manifest.num_shards - len(missing)
    with Heartbeat(
        "capturing features (shards)", total, done, enabled=bool(missing) and not console.is_terminal
    ) as beat:
        for shard in track(missing, "capturing features", console=console, disable=not console.is_terminal):
            first = shard * manifest.shard_samples
            indices = range(first, min(first + manifest.shard_samples, manifest.num_samples))
            write_shard(shard_file(folder, shard), [with_features(samples[index], compute) for index in indices])
            beat.done += 1
    return CapturedSamples(folder, manifest)


def prepare(folder: Path, manifest: Manifest) -> list[int]:
    """The shards that are missing. Errors: CaptureError naming what the folder's features are of instead."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / MANIFEST_FILE
    if file.is_file():
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise CaptureError(f"{file} is not JSON: {error}; name another folder") from error
        kept = {"layers": "last"} | kept  # the one layer of folders that do not say
        differing = [name for name, value in asdict(manifest).items() if kept.get(name) != value]
        if differing:
            raise CaptureError(
                f"{folder} holds features captured with another {differing[0]}: {kept.get(differing[0])!r} there, "
                f"{getattr(manifest, differing[0])!r} asked for; name another folder for data.captured"
            )
    else:
        file.write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    return missing_shards(folder, manifest)


def missing_shards(folder: Path, manifest: Manifest) -> list[int]:
    """The shards that are still to be captured."""
    return [shard for shard in range(manifest.num_shards) if not shard_file(folder, shard).is_file()]


def with_features(sample: dict[str, Tensor], compute: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """A sample as it is stored."""
    with torch.no_grad():
        features = compute(sample["input_ids"][None])[0]
    return {
        "input_ids": sample["input_ids"],
        "loss_mask": sample["loss_mask"] > 0,
        "features": features.to("cpu", torch.float16),
    }


def write_shard(file: Path, samples: list[dict[str, Tensor]]) -> None:
    """All samples of a shard behind one another; the file appears when it is whole."""
    state = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
    state["lengths"] = torch.tensor([len(sample["input_ids"]) for sample in samples])
    unfinished = file.with_suffix(".unfinished")
    try:
        save_file(state, unfinished)
        unfinished.replace(file)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise CaptureError(
            f"{file} could not be written ({error}); the shards before it are whole, and the same command goes on from "
            "there once there is room"
        ) from error


class CapturedSamples(Dataset[dict[str, Tensor]]):
    """Samples with their ``features`` [T, W] in fp32, read from disk when asked for."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        shard, place = divmod(index, self.manifest.shard_samples)
        first, last = self.bounds[shard][place : place + 2]
        file = shard_file(self.folder, shard)
        try:
            with safe_open(file, framework="pt") as stored:
                names = ("input_ids", "loss_mask", "features")
                input_ids, loss_mask, features = (stored.get_slice(name)[first:last] for name in names)
        except (OSError, SafetensorError) as error:
            raise CaptureError(f"{file} cannot be read ({error}); remove it and it is captured again") from error
        return {"input_ids": input_ids, "loss_mask": loss_mask.float(), "features": features.float()}

    @cached_property
    def bounds(self) -> list[list[int]]:
        """For every shard the first row of each of its samples, and the end of the last."""
        bounds: list[list[int]] = []
        for shard in range(self.manifest.num_shards):
            file = shard_file(self.folder, shard)
            try:
                with safe_open(file, framework="pt") as stored:
                    lengths = stored.get_tensor("lengths")
            except (OSError, SafetensorError) as error:
                raise CaptureError(f"{file} cannot be read ({error}); remove it and it is captured again") from error
            bounds.append([0, *lengths.cumsum(0).tolist()])
        return bounds
