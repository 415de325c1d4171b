"""Backbones on disk: ``model.safetensors`` beside ``config.json``, which holds what the weights need to be used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vision.backbones import BACKBONES, backbone_class
from vision.backbones.backbone import Backbone, BackboneError
from vision.backbones.preprocessing import Preprocessing

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
SHOWN_KEYS = 5


class CheckpointError(BackboneError):
    """A checkpoint is missing, unreadable, or belongs to another network; the message names the keys."""


def save_backbone(model: Backbone, folder: Path) -> None:
    """Write weights and configuration into ``folder``, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "family": type(model).__module__.rpartition(".")[2],
        "name": model.name,
        "config": dataclasses.asdict(model.config),
        "num_classes": model.num_classes,
        "class_names": list(model.class_names),
        "preprocessing": dataclasses.asdict(model.preprocessing),
    }
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_backbone(folder: Path) -> Backbone:
    """The network saved in ``folder``, in evaluation mode. Errors: CheckpointError."""
    config = read_config(folder / CONFIG_FILE)
    families = {path.partition(":")[0].rpartition(".")[2]: path for path in BACKBONES.values()}
    try:
        network = backbone_class(families[config["family"]])
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in config["config"].items()}
        model = network(network.config_type(**values), config["num_classes"])
        model.preprocessing = Preprocessing.from_json(config["preprocessing"])
        model.class_names = tuple(config["class_names"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} does not describe a backbone ({type(error).__name__}: {error}); families are "
            f"{', '.join(sorted(families))}"
        ) from error
    load_state(model, read_weights(folder / WEIGHTS_FILE), source=str(folder))
    return model.eval()


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``."""
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; a backbone is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds {type(config).__name__}, not an object")
    return config


def read_weights(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def load_state(model: Backbone, state: Mapping[str, Tensor], source: str) -> None:
    """Load ``state`` into ``model``; every key and shape must fit, and the error names those that do not."""
    check_state(model.state_dict(), state, source, model.name)
    model.load_state_dict(dict(state))


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str, network: str) -> None:
    """Refuse a ``state`` whose keys or shapes are not those of ``own``. Errors: CheckpointError naming them."""
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    found = [f"{len(keys)} {kind}: {shorten(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"{source} is not a checkpoint of {network}; keys {'; '.join(found)}")


def shorten(keys: list[str]) -> str:
    """The first few of ``keys``."""
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return ", ".join(keys[:SHOWN_KEYS]) + more


def load_author_weights(model: Backbone, state: Mapping[str, Tensor]) -> None:
    """Load a state dict published by the networks' authors, and take over the preprocessing it was trained with.

    Counters of batches, which old checkpoints lack, start at zero, and so does the bias of the classifier where the
    authors have none. Errors: CheckpointError naming the keys in this layout.
    """
    renamed = {model.rename_author_key(key.removeprefix("module.")): tensor for key, tensor in state.items()}
    for key, own in model.state_dict().items():
        if key == "head.bias" or key.endswith(".num_batches_tracked"):
            renamed.setdefault(key, torch.zeros_like(own))
    load_state(model, renamed, source="the authors' checkpoint")
    model.preprocessing = dataclasses.replace(model.preprocessing, normalization=model.author_normalization)
