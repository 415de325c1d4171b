"""Recognition networks that judge faces: one trained here by ``dovetail train embedding``, dlib's, or any ONNX file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vision.backbones.backbone import Backbone
from vision.backbones.checkpoint import load_backbone
from vision.backbones.preprocessing import CHANNEL_ORDERS
from vision.face_quality.dlib_resnet import DlibRecogniser
from vision.measure.classification import default_device
from vision.serving.folder import WEIGHTS_FILE, file_digest, name_of
from vision.serving.networks import open_session


class RecogniserError(ValueError):
    """A recognition network cannot be read, or does not answer with one vector a face."""


@dataclass(frozen=True)
class RecogniserOptions:
    """Where a recognition network lies: a folder of ``dovetail train embedding``, dlib's weights (.dat), an ONNX file.

    An ONNX file gets aligned faces as (x - ``mean``) / ``std`` with x from 0 to 255 in ``channel_order``; 127.5 twice
    and "rgb" suit most models of the ArcFace family, 127.5, 128 or "bgr" some; OpenCV's SFace scales by itself and
    wants 0 and 1. A folder and dlib's file have their own preprocessing.
    """

    path: str
    mean: float = 127.5
    std: float = 127.5
    channel_order: str = "rgb"

    def __post_init__(self) -> None:
        if self.channel_order not in CHANNEL_ORDERS or not self.std > 0:
            raise RecogniserError(
                f"recogniser.channel_order is {self.channel_order!r} and std {self.std}; allowed are "
                f"{', '.join(CHANNEL_ORDERS)}, and numbers above 0"
            )


class Recogniser(Protocol):
    """A frozen recognition network."""

    @property
    def name(self) -> str:
        """For reports."""

    @property
    def digest(self) -> str:
        """SHA-256 of its file and settings: labels made by another one are not its own."""

    def embed(self, faces: Tensor) -> Tensor:
        """Aligned RGB faces uint8 [B, 3, 112, 112] to features [B, D], not normalised, on the CPU."""


class BackboneRecogniser:
    """The pooled last map of a backbone, with its own test-time preprocessing."""

    def __init__(self, folder: Path) -> None:
        self.model: Backbone = load_backbone(folder).to(default_device())
        self.name = name_of(folder)
        self.digest = file_digest(folder / WEIGHTS_FILE)

    @torch.inference_mode()
    def embed(self, faces: Tensor) -> Tensor:
        """See ``Recogniser``."""
        preprocessing = self.model.preprocessing
        resized = resize_faces(faces.to(self.model.head.weight.device).float(), preprocessing.resize)
        margin = (preprocessing.resize - preprocessing.image_size) // 2
        end = margin + preprocessing.image_size
        return self.model.embed(self.model.normalization(resized[..., margin:end, margin:end] / 255)).cpu()


class OnnxRecogniser:
    """An ONNX file with one image input [B, 3, S, S] whose first output is the feature [B, D]."""

    def __init__(self, file: Path, options: RecogniserOptions) -> None:
        self.session: Any = open_session(file, torch.get_num_threads())
        if len(self.session.get_inputs()) > 1:
            self.session = open_session(without_unused_inputs(file), torch.get_num_threads())
        self.options, self.name = options, file.stem
        settings = f"{options.mean} {options.std} {options.channel_order}"
        self.digest = hashlib.sha256(f"{file_digest(file)} {settings}".encode()).hexdigest()
        inputs = self.session.get_inputs()
        shape = list(inputs[0].shape)
        if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3:
            raise RecogniserError(
                f"{file} takes {len(inputs)} inputs, the first {shape}; it must take one [B, 3, S, S]"
            )
        self.input = inputs[0].name
        self.side = shape[2] if isinstance(shape[2], int) else None
        self.one_by_one = shape[0] == 1

    def embed(self, faces: Tensor) -> Tensor:
        """See ``Recogniser``. Errors: RecogniserError where the answer is not one vector a face."""
        images = faces.float() if self.side is None else resize_faces(faces.float(), self.side)
        if self.options.channel_order == "bgr":
            images = images.flip(1)
        array = ((images - self.options.mean) / self.options.std).numpy()
        batches = np.split(array, len(array)) if self.one_by_one else [array]
        features = np.concatenate([self.session.run(None, {self.input: batch})[0] for batch in batches])
        if features.ndim != 2 or len(features) != len(faces):
            raise RecogniserError(f"{self.name} answered {features.shape} for {len(faces)} faces; expected [B, D]")
        return torch.from_numpy(features)


def load_recogniser(options: RecogniserOptions) -> Recogniser:
    """The network of ``options``. Errors: RecogniserError, CheckpointError, ModelError."""
    path = Path(options.path).expanduser()
    if path.is_dir():
        return BackboneRecogniser(path)
    if path.is_file() and path.suffix == ".onnx":
        return OnnxRecogniser(path, options)
    if path.is_file() and path.suffix == ".dat":
        return DlibRecogniser(path)
    raise RecogniserError(
        f"{path} is no recognition network: neither a folder of `dovetail train embedding`, nor an .onnx file, "
        "nor dlib's dlib_face_recognition_resnet_model_v1.dat"
    )


def without_unused_inputs(file: Path) -> bytes:
    """The ONNX file without inputs that no node reads: quantisers leave the old weights among them (OpenCV's SFace)."""
    import onnx

    model = onnx.load(file)
    read = {name for node in model.graph.node for name in node.input}
    used = [each for each in model.graph.input if each.name in read]
    del model.graph.input[:]
    model.graph.input.extend(used)
    serialized: bytes = model.SerializeToString()
    return serialized


def resize_faces(faces: Tensor, side: int) -> Tensor:
    """Float faces [B, 3, H, W] as squares of ``side`` pixels."""
    if faces.shape[-2:] == (side, side):
        return faces
    return functional.interpolate(faces, (side, side), mode="bilinear", antialias=True, align_corners=False)
