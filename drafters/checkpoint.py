"""Drafter folders: ``config.json`` and ``model.safetensors``, no pickle.

The embedding is not in the file, and the LM head only where a drafter has its own: they are the target's, frozen, and
come from the target at load.
The authors' checkpoints carry a copy of the embedding; ours are smaller by it and cannot disagree with the target.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafters.drafter import DrafterError
from drafters.eagle import EagleConfig, EagleNetwork
from drafters.network import BlockConfig, DovetailConfig, DovetailNetwork, FeatureNetwork

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
NETWORKS: dict[str, tuple[type[BlockConfig], Callable[[Any], FeatureNetwork]]] = {
    "dovetail_drafter": (DovetailConfig, DovetailNetwork),
    "eagle3_drafter": (EagleConfig, EagleNetwork),
}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def save_drafter(network: FeatureNetwork, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the network in ``dtype`` beside its configuration; ids stay whole numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    model_type = next(name for name, (config, _) in NETWORKS.items() if type(network.config) is config)
    fields = {"model_type": model_type, **dataclasses.asdict(network.config)}
    (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    state = {name: as_type(tensor.detach().cpu(), dtype) for name, tensor in network.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights in ``dtype``; ids and other whole numbers as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def read_fields(folder: Path) -> dict[str, Any]:
    """The object in a folder's ``config.json``, a drafter's or a language model's; ``model_type`` says which."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise DrafterError(f"{file} does not exist; a drafter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        fields: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DrafterError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise DrafterError(f"{file} must hold a JSON object, not {type(fields).__name__}")
    if not isinstance(fields.get("model_type", ""), str):
        raise DrafterError(f"{file}: model_type is {fields['model_type']!r}, which is no text")
    return fields


def read_config(folder: Path) -> BlockConfig:
    """The configuration of a drafter folder; DrafterError names what is missing, unknown or malformed."""
    file, fields = folder / CONFIG_FILE, read_fields(folder)
    model_type = fields.pop("model_type", None)
    if model_type not in NETWORKS:
        raise DrafterError(
            f"{file} describes no Dovetail drafter: model_type is {model_type!r}, allowed are {', '.join(NETWORKS)}"
        )
    config_type, _ = NETWORKS[model_type]
    known = {field.name for field in dataclasses.fields(config_type)}
    if unknown := sorted(set(fields) - known):
        raise DrafterError(f"{file} has unknown keys {', '.join(unknown)}; allowed are {', '.join(sorted(known))}")
    try:
        return config_type(**fields)
    except (TypeError, DrafterError) as error:
        raise DrafterError(f"{file}: {error}") from error


def read_network(folder: Path, device: torch.device, dtype: torch.dtype) -> FeatureNetwork:
    """The network of a drafter folder, frozen, on ``device`` in ``dtype``; DrafterError names what does not fit."""
    config = read_config(folder)
    create = next(create for config_type, create in NETWORKS.values() if type(config) is config_type)
    with torch.device("meta"):
        network = create(config)
    state = {name: as_type(tensor.to(device), dtype) for name, tensor in read_weights(folder / WEIGHTS_FILE).items()}
    check_weights(folder / WEIGHTS_FILE, state, network)
    network.load_state_dict(state, assign=True)
    check_draft_ids(folder / WEIGHTS_FILE, network)
    return network.eval().requires_grad_(False)


def check_draft_ids(file: Path, network: FeatureNetwork) -> None:
    """Refuse a draft vocabulary that names tokens twice or that the target does not have."""
    ids = network.draft_ids
    if ids is None:
        return
    size = network.config.vocab_size
    if ids.is_floating_point() or not bool((ids[1:] > ids[:-1]).all()) or not 0 <= int(ids[0]) <= int(ids[-1]) < size:
        raise DrafterError(f"{file}: draft_ids must be whole numbers in rising order, at least 0 and below {size}")


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file on the CPU; pickles are refused."""
    if not file.is_file():
        raise DrafterError(f"{file} does not exist{refuse_pickles(file.parent)}")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise DrafterError(f"{file} cannot be read as safetensors, it may be truncated: {error}") from error


def refuse_pickles(folder: Path) -> str:
    """What to say behind a message about missing weights where the folder holds a pickle instead."""
    pickles = sorted(found.name for pattern in PICKLES for found in folder.glob(pattern))
    if not pickles:
        return ""
    return (
        f"; {pickles[0]} is a pickle, which can run code when it is read: convert it to safetensors on a machine you "
        "trust with it (torch.load with weights_only=True, then safetensors.torch.save_file)"
    )


def check_weights(file: Path, state: dict[str, Tensor], network: FeatureNetwork) -> None:
    """Refuse a file whose tensors are not exactly those its configuration asks for."""
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if missing := sorted(wanted.keys() - state.keys()):
        raise DrafterError(f"{file} lacks {', '.join(missing)}; {CONFIG_FILE} describes another network")
    if unknown := sorted(state.keys() - wanted.keys()):
        raise DrafterError(f"{file} has tensors that {CONFIG_FILE} does not describe: {', '.join(unknown)}")
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise DrafterError(f"{file}: {name} has shape {tuple(state[name].shape)}; {CONFIG_FILE} describes {shape}")
