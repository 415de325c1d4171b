"""Image in, result out: what the server and ``dovetail detect`` call. torch is imported only where it must compute.

A detector whose folder holds an exported model.onnx runs on ONNX Runtime, which is faster on a CPU and spares torch's
memory; any other runs in torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from vision.images import Picture

logger = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE, ONNX_FILE = "config.json", "model.safetensors", "model.onnx"
# What training calls every folder and export every file: it tells no model from another.
USUAL_NAME = "model"


class ModelError(ValueError):
    """A vision model cannot be found, read or run; the message says what to do."""


@dataclass(frozen=True)
class ModelInfo:
    """What a model says of itself. ``kind``: what it answers ("detector"); ``runtime``: onnxruntime or torch.

    ``full_size``: it looks at parts of the image, so that a large one must not be decoded smaller.
    """

    name: str
    kind: str
    class_names: tuple[str, ...]
    licence: str
    image_size: int
    runtime: str
    description: str = ""
    full_size: bool = False

    def json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


class VisionModel(Protocol):
    """Any model that answers for single images. Options and answers are JSON objects; ``kind`` says which keys."""

    @property
    def info(self) -> ModelInfo:
        """What it is."""

    def prepare(self, picture: Picture, options: Mapping[str, Any]) -> Any:
        """The small input that is kept of a decoded image. Errors: ModelError for options that are not its own."""

    def predict(self, prepared: Sequence[Any]) -> list[dict[str, Any]]:
        """One answer for each of the prepared inputs, which run as one batch."""

    def draw(self, image: Image.Image, answer: Mapping[str, Any]) -> Image.Image:
        """The upright image with its answer drawn on it."""


def load_vision_model(path: Path, num_threads: int = 1, name: str | None = None) -> VisionModel:
    """The model in a folder, or in an exported .onnx file; ``name`` None takes ``name_of`` the path.

    Errors: ModelError; CheckpointError of ``vision.backbones.checkpoint``.
    """
    from vision.assess import FACE_QUALITY, FORMAT, load_onnx_scorer, load_scorer_folder
    from vision.onnx_runtime import belongs_to, load_onnx, read_metadata

    name = name or name_of(path)
    if path.is_file() and path.suffix == ".onnx":
        is_scorer = FACE_QUALITY in read_metadata(path)
        return (load_onnx_scorer if is_scorer else load_onnx)(path, num_threads, name)
    if not (path / CONFIG_FILE).is_file():
        raise ModelError(f"{path} is no vision model: neither a folder with {CONFIG_FILE} nor an .onnx file")
    exported = path / ONNX_FILE
    use_onnx = exported.is_file() and find_spec("onnxruntime") is not None
    if use_onnx and not belongs_to(exported, path / WEIGHTS_FILE):
        logger.warning("%s was made from other weights than lie beside it; export the model again", exported)
        use_onnx = False
    if format_of(path / CONFIG_FILE) == FORMAT:
        return load_scorer_folder(path, num_threads, name, use_onnx)
    if use_onnx:
        return load_onnx(exported, num_threads, name)
    from vision.detection.predict import load_torch

    return load_torch(path, num_threads, name)


def name_of(path: Path) -> str:
    """What a model is called: its folder's or file's name, or that of the run whose folder ``model`` it lies in."""
    path = path.resolve()
    names = [path.stem if path.suffix == ".onnx" else path.name, *(parent.name for parent in path.parents)]
    return next((name for name in names if name not in ("", USUAL_NAME)), USUAL_NAME)


def format_of(file: Path) -> str:
    """What a config.json says it describes; empty where it says nothing. Errors: ModelError."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    return str(values.get("format", "")) if isinstance(values, dict) else ""
