"""Backbones on disk: ``model.safetensors`` beside ``config.json``, which holds what the weights need to be used."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision.backbones import BACKBONES, backbone_class, create_backbone
from vision.backbones.backbone import Backbone
from vision.backbones.preprocessing import Preprocessing
from vision.serving.folder import (
    BACKBONE,
    CONFIG_FILE,
    MALFORMED,
    WEIGHTS_FILE,
    CheckpointError,
    check_state,
    read_described,
    read_weights,
    save_folder,
)


def save_backbone(model: Backbone, folder: Path) -> None:
    """Write weights and configuration into ``folder``, which is made if need be."""
    save_folder(folder, describe(model), model.state_dict())


def describe(model: Backbone) -> dict[str, Any]:
    """What config.json holds of a backbone."""
    return {
        "format": BACKBONE,
        "version": 1,
        "family": type(model).__module__.rpartition(".")[2],
        "name": model.name,
        "config": dataclasses.asdict(model.config),
        "num_classes": model.num_classes,
        "class_names": list(model.class_names),
        "preprocessing": dataclasses.asdict(model.preprocessing),
    }


def load_backbone(folder: Path) -> Backbone:
    """The network saved in ``folder``, in evaluation mode. Errors: CheckpointError."""
    config = read_described(folder, BACKBONE, "backbone")
    families = {path.partition(":")[0].rpartition(".")[2]: path for path in BACKBONES.values()}
    try:
        network = backbone_class(families[config["family"]])
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in config["config"].items()}
        model = network(network.config_type(**values), config["num_classes"])
        model.preprocessing = Preprocessing.from_json(config["preprocessing"])
        model.class_names = tuple(config["class_names"])
    except MALFORMED as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} does not describe a backbone ({type(error).__name__}: {error}); families are "
            f"{', '.join(sorted(families))}"
        ) from error
    load_state(model, read_weights(folder / WEIGHTS_FILE), source=str(folder))
    return model.eval()


def load_state(model: Backbone, state: Mapping[str, Tensor], source: str) -> None:
    """Load ``state`` into ``model``; every key and shape must fit, and the error names those that do not."""
    check_state(model.state_dict(), state, source, model.name)
    model.load_state_dict(dict(state))


def convert_author_weights(file: Path, name: str, output: Path) -> Backbone:
    """A state dict that a network's authors published, .safetensors or torch's, as a saved backbone in ``output``.

    Nothing is unpickled but tensors. Classes go by their numbers; edit ``class_names`` in its config.json to name them.
    Errors: UnknownBackboneError; CheckpointError where the file cannot be read or is another network's.
    """
    if file.suffix == ".safetensors":
        state: Any = read_weights(file)
    else:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
            raise CheckpointError(f"{file} is no file of tensors alone: {error}") from error
        state = next((state[key] for key in ("state_dict", "model") if key in state), state)
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    model = create_backbone(name)
    heads = [v for key, v in state.items() if model.rename_author_key(key.removeprefix("module.")) == "head.weight"]
    if heads and len(heads[0]) != model.num_classes:
        model = create_backbone(name, len(heads[0]))
    load_author_weights(model, state)
    save_backbone(model, output)
    return model


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
