"""A model on disk: ``model.safetensors`` beside ``config.json``, and ``model.onnx`` where it was exported. No torch.

``format`` and ``version`` in config.json say what kind of model it is; the rest of it is that kind's own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE, ONNX_FILE = "config.json", "model.safetensors", "model.onnx"
# What training calls folders and export files: it tells no model from another.
USUAL_NAMES = re.compile(r"|model|best|seed_\d+")
# Folders of before there was a format are told by a key or a value of theirs.
BACKBONE, SEGMENTER = "dovetail-backbone", "dovetail-segmenter"
SHOWN_KEYS = 5
# What a description that makes no sense raises, wherever it is first used.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RuntimeError)


class ModelError(ValueError):
    """A vision model cannot be found, read or run; the message says what to do."""


class CheckpointError(ModelError):
    """A saved model is missing, unreadable, or belongs to another network; the message names the keys."""


def save_folder(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write weights and description into ``folder``, which is made if need be; each file is whole or as it was."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS_FILE) as file:
        save_file({key: value.contiguous().cpu() for key, value in state.items()}, file, {"format": "pt"})
    with replacing(folder / CONFIG_FILE) as file:
        file.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A file to write, and to check, in the place of ``output``, whose name it takes at the end of the block.

    A server may read an older ``output`` meanwhile; where the block fails that stays, and the new file goes.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_name(f".{output.name}.unchecked")
    try:
        yield file
        file.replace(output)
    finally:
        file.unlink(missing_ok=True)


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``. Errors: CheckpointError."""
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; a model is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds {type(config).__name__}, not an object")
    return config


def format_of(config: Mapping[str, Any]) -> str:
    """What a config.json says it describes; empty where it says nothing."""
    if "format" not in config:
        return BACKBONE if "family" in config else SEGMENTER if config.get("architecture") == "pspnet" else ""
    return str(config["format"])


def read_described(folder: Path, wanted: str, noun: str) -> dict[str, Any]:
    """The config of a folder of the format ``wanted``, without ``format`` and ``version``. Errors: CheckpointError."""
    config = read_config(folder / CONFIG_FILE)
    if format_of(config) != wanted:
        raise CheckpointError(f"{folder / CONFIG_FILE} does not describe a {noun}")
    return {key: value for key, value in config.items() if key not in ("format", "version")}


def read_weights(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Errors: CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


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


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content. Errors: ModelError."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error


def name_of(path: Path) -> str:
    """What a model is called: its folder or file, or the run or variant whose folder ``model`` or ``seed_N`` it is."""
    path = path.resolve()
    names = [path.stem if path.suffix == ".onnx" else path.name, *(parent.name for parent in path.parents)]
    return next((name for name in names if not USUAL_NAMES.fullmatch(name)), "model")
