"""Drafter folders: ``config.json`` and ``model.safetensors`` (bf16), no pickle.

The embedding and the LM head are not in the file: they are the target's, frozen, and come from the target at load.
The authors' checkpoints carry a copy of the embedding; ours are smaller by it and cannot disagree with the target.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafters.drafter import DrafterError
from drafters.network import DovetailConfig, DovetailNetwork

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "dovetail_drafter"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def save_drafter(network: DovetailNetwork, folder: Path) -> None:
    """Write the network in bf16 beside its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"model_type": MODEL_TYPE, **dataclasses.asdict(network.config)}
    (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in network.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read_fields(folder: Path) -> dict[str, Any]:
    """The object in a folder's ``config.json``, a drafter's or a language model's; ``model_type`` says which."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise DrafterError(f"{file} does not exist; a drafter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        fields: Any = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DrafterError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise DrafterError(f"{file} must hold a JSON object, not {type(fields).__name__}")
    return fields


def read_config(folder: Path) -> DovetailConfig:
    """The configuration of a drafter folder; DrafterError names what is missing, unknown or malformed."""
    file, fields = folder / CONFIG_FILE, read_fields(folder)
    if fields.pop("model_type", None) != MODEL_TYPE:
        raise DrafterError(f'{file} does not say "model_type": "{MODEL_TYPE}"; it describes no Dovetail drafter')
    known = {field.name for field in dataclasses.fields(DovetailConfig)}
    if unknown := sorted(set(fields) - known):
        raise DrafterError(f"{file} has unknown keys {', '.join(unknown)}; allowed are {', '.join(sorted(known))}")
    try:
        return DovetailConfig(**fields)
    except (TypeError, DrafterError) as error:
        raise DrafterError(f"{file}: {error}") from error


def read_network(folder: Path, device: torch.device, dtype: torch.dtype) -> DovetailNetwork:
    """The network of a drafter folder, frozen, on ``device`` in ``dtype``; DrafterError names what does not fit."""
    config = read_config(folder)
    with torch.device("meta"):
        network = DovetailNetwork(config)
    state = {name: tensor.to(device, dtype) for name, tensor in read_weights(folder / WEIGHTS_FILE).items()}
    check_weights(folder / WEIGHTS_FILE, state, network)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


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


def check_weights(file: Path, state: dict[str, Tensor], network: DovetailNetwork) -> None:
    """Refuse a file whose tensors are not exactly those its configuration asks for."""
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if missing := sorted(wanted.keys() - state.keys()):
        raise DrafterError(f"{file} lacks {', '.join(missing)}; {CONFIG_FILE} describes another network")
    if unknown := sorted(state.keys() - wanted.keys()):
        raise DrafterError(f"{file} has tensors that {CONFIG_FILE} does not describe: {', '.join(unknown)}")
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise DrafterError(f"{file}: {name} has shape {tuple(state[name].shape)}; {CONFIG_FILE} describes {shape}")
