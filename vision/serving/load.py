"""A model from its folder, or from an exported file."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vision.serving.folder import (
    CONFIG_FILE,
    MALFORMED,
    ONNX_FILE,
    WEIGHTS_FILE,
    ModelError,
    file_digest,
    name_of,
    read_config,
)
from vision.serving.networks import OnnxNetwork, TorchNetwork, open_session
from vision.serving.protocol import Kind, Model, ModelInfo, Network
from vision.serving.registry import all_kinds, kind_of

logger = logging.getLogger(__name__)

DIGEST_KEY = "weights_sha256"
MAX_IMAGE_SIZE = 4096  # pixels of a side that a network looks at


def load_model(path: Path, num_threads: int = 1, name: str | None = None) -> Model:
    """The model in a folder, or in an .onnx file; ``name`` None takes ``name_of`` the path.

    A folder whose model.onnx was made from its weights runs on ONNX Runtime, which is faster on a CPU and spares
    torch's memory; any other runs in torch. Errors: ModelError.
    """
    name = name or name_of(path)
    if path.is_file() and path.suffix == ".onnx":
        return from_file(path, num_threads, name)
    if not (path / CONFIG_FILE).is_file():
        raise ModelError(f"{path} is no vision model: neither a folder with {CONFIG_FILE} nor an .onnx file")
    config = read_config(path / CONFIG_FILE)
    kind = kind_of(config, str(path / CONFIG_FILE))
    exported, weights = path / ONNX_FILE, path / WEIGHTS_FILE
    if exported.is_file() and find_spec("onnxruntime") is not None:
        if not weights.is_file() or digest_in(exported) == file_digest(weights):
            return from_file(exported, num_threads, name)
        logger.warning("%s was made from other weights than lie beside it; export the model again", exported)
    network = TorchNetwork(kind.module(path), num_threads)
    return described(kind, name, config, file_digest(weights), network, str(path))


def from_file(file: Path, num_threads: int, name: str) -> Model:
    """A model from a file that ``dovetail export`` wrote, or of a network that a kind knows. Errors: ModelError."""
    session = open_session(file, num_threads)
    metadata = session.get_modelmeta().custom_metadata_map
    for kind in all_kinds().values():
        if kind.name in metadata:
            digest, config = metadata.get(DIGEST_KEY, ""), json.loads(metadata[kind.name])
            return described(kind, name, config, digest, OnnxNetwork(session), str(file))
        if (adopted := kind.adopt(file, session, num_threads)) is not None:
            config, network = adopted
            return described(kind, name, config, file_digest(file), network, str(file))
    raise ModelError(f"{file} was not written by `dovetail export`: its description is missing")


def described(kind: Kind, name: str, config: Mapping[str, Any], digest: str, network: Network, source: str) -> Model:
    """A model with what it says of itself. Errors: ModelError where ``config`` does not describe one."""
    try:
        card = kind.read_card(config, digest)
    except MALFORMED as error:
        raise ModelError(f"{source} does not describe a {kind.name} ({type(error).__name__}: {error})") from error
    if type(card.image_size) is not int or not 1 <= card.image_size <= MAX_IMAGE_SIZE:
        allowed = f"a whole number from 1 to {MAX_IMAGE_SIZE}"
        raise ModelError(f"{source}: image_size is {card.image_size!r}; it must be {allowed}")
    info = ModelInfo(
        name, kind.name, card.class_names, card.licence, card.image_size, network.runtime, card.description,
        kind.full_size({}),
    )  # fmt: skip
    return Model(kind, info, card, network)


def load_models(paths: Mapping[str, Path], num_threads: int = 1) -> dict[str, Model]:
    """Models by name, each with the first of every kind that its own asks. Errors: ModelError."""
    models = {name: load_model(path, num_threads, name) for name, path in paths.items()}
    first: dict[str, Model] = {}
    for model in models.values():
        first.setdefault(model.kind.name, model)
    return {
        name: dataclasses.replace(model, companions={kind: first[kind] for kind in model.kind.asks if kind in first})
        for name, model in models.items()
    }


def digest_in(exported: Path) -> str:
    """The digest of the weights that an exported file was made from; empty where it holds none. Errors: ModelError."""
    metadata: dict[str, str] = open_session(exported, 1).get_modelmeta().custom_metadata_map
    return metadata.get(DIGEST_KEY, "")
