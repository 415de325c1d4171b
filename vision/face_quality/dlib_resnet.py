"""dlib's face recognition network, read from its weights file: a strong recogniser that takes no build of dlib.

29 convolutions in residual blocks (King's ``dnn_face_recognition_ex.cpp``; the weights are in the public domain and lie
in the PyPI package ``face-recognition-models``). The file is a walk through the network from its input on; its tensors
are told by their sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vision.face_quality.alignment import TEMPLATE
from vision.serving.folder import file_digest

SIDE, FEATURES, STEM = 150, 128, 32
# Width and whether the block halves the map, from the input on.
BLOCKS = (
    (32, False), (32, False), (32, False), (64, True), (64, False), (64, False), (64, False), (128, True), (128, False),
    (128, False), (256, True), (256, False), (256, False), (256, True),
)  # fmt: skip
MEAN, SCALE = (122.782, 117.001, 104.298), 256.0
# Where the eyes lie in dlib's crop of 150 pixels (padding 0.25).
CROP_EYES = ((47.73, 46.34), (100.28, 46.34))
TENSOR_VERSION = 2


class DlibFileError(ValueError):
    """A file that is not dlib's face recognition network."""


class Block(nn.Module):
    """Two 3 x 3 convolutions beside the input, which is halved by averages where the block halves.

    dlib adds maps of different sizes by filling the smaller up with zeros, in width, height and channels.
    """

    def __init__(self, channels: int, width: int, halves: bool) -> None:
        super().__init__()
        stride, padding = (2, 0) if halves else (1, 1)
        self.first, self.first_affine = nn.Conv2d(channels, width, 3, stride, padding), Affine(width)
        self.second, self.second_affine = nn.Conv2d(width, width, 3, 1, 1), Affine(width)
        self.halves = halves

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, max(C, width), H', W']."""
        own = self.second_affine(self.second(functional.relu(self.first_affine(self.first(x)))))
        beside = functional.avg_pool2d(x, 2) if self.halves else x
        shape = [max(pair) for pair in zip(own.shape[1:], beside.shape[1:], strict=True)]
        return functional.relu(filled(own, shape) + filled(beside, shape))


class Affine(nn.Module):
    """A factor and an offset a channel: batch normalisation when training is over."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class DlibResNet(nn.Module):
    """Crops of 150 x 150 as dlib aligns them, RGB from 0 to 255, to features [B, 128] of about unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_affine = nn.Conv2d(3, STEM, 7, 2), Affine(STEM)
        widths = [STEM, *(width for width, _ in BLOCKS)]
        self.blocks = nn.Sequential(
            *(Block(before, width, halves) for before, (width, halves) in zip(widths, BLOCKS, strict=False))
        )
        self.head = nn.Linear(widths[-1], FEATURES, bias=False)

    def forward(self, crops: Tensor) -> Tensor:
        """Crops [B, 3, 150, 150] to features."""
        x = (crops - crops.new_tensor(MEAN)[:, None, None]) / SCALE
        x = functional.max_pool2d(functional.relu(self.stem_affine(self.stem(x))), 3, 2)
        features: Tensor = self.head(self.blocks(x).mean(dim=(2, 3)))
        return features

    def parameters_in_order(self) -> Iterator[tuple[Tensor, ...]]:
        """The parameters that share a tensor of the file, in the file's order."""
        layers: list[Any] = [self.stem, self.stem_affine]
        for block in self.blocks:
            layers += [block.first, block.first_affine, block.second, block.second_affine]
        for layer in layers:
            yield layer.weight, layer.bias
        yield (self.head.weight,)


class DlibRecogniser:
    """A ``Recogniser``: aligned faces are cropped to what dlib's network was trained with.

    Its crop reaches nine rows below an aligned face; the last row is repeated there.
    """

    def __init__(self, file: Path) -> None:
        self.model, self.name, self.digest = read_dlib_resnet(file).eval(), file.stem, file_digest(file)

    @torch.inference_mode()
    def embed(self, faces: Tensor) -> Tensor:
        """See ``vision.face_quality.recognition.Recogniser``."""
        features: Tensor = self.model(crop_as_dlib(faces.float()))
        return features


def read_dlib_resnet(file: Path) -> DlibResNet:
    """The network of ``file`` (``dlib_face_recognition_resnet_model_v1.dat``). Errors: DlibFileError."""
    data, place, model = file.read_bytes(), 0, DlibResNet()
    for parameters in model.parameters_in_order():
        count = sum(each.numel() for each in parameters)
        # The head is kept as inputs x outputs, all others as one long row.
        shape = (FEATURES * 2, FEATURES, 1, 1) if len(parameters) == 1 else (count, 1, 1, 1)
        header = tensor_header(shape)
        found = data.find(header, place)
        start, place = found + len(header), found + len(header) + 4 * count
        if found < 0 or place > len(data):
            raise DlibFileError(f"{file} lacks a tensor of shape {shape}; it is not dlib's face recognition network")
        values = torch.from_numpy(np.frombuffer(data, "<f4", count, start).copy())
        if not torch.isfinite(values).all():
            raise DlibFileError(f"{file} holds weights that are not finite")
        fill(parameters, values)
    return model


@torch.no_grad()
def fill(parameters: Sequence[Tensor], values: Tensor) -> None:
    """Put ``values`` into the parameters, one after the other; a lone one is kept transposed."""
    if len(parameters) == 1:
        parameters[0].copy_(values.view(parameters[0].shape[::-1]).T)
        return
    parts = torch.split(values, [each.numel() for each in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view_as(parameter))


def tensor_header(shape: Sequence[int]) -> bytes:
    """What stands before a tensor's values: a version and four sizes, each the count of its bytes and these."""
    return b"".join(packed_int(number) for number in (TENSOR_VERSION, *shape))


def packed_int(number: int) -> bytes:
    """dlib's way to write a number that is not negative."""
    length = (number.bit_length() + 7) // 8
    return bytes([length]) + number.to_bytes(length, "little")


def crop_as_dlib(faces: Tensor) -> Tensor:
    """Aligned faces [B, 3, 112, 112] to dlib's crops [B, 3, 150, 150]: both eyes come to lie where dlib has them."""
    face, crop = TEMPLATE[:2], np.array(CROP_EYES)
    scale = np.linalg.norm(face[1] - face[0]) / np.linalg.norm(crop[1] - crop[0])
    offset = face.mean(axis=0) - scale * crop.mean(axis=0)
    places = torch.arange(SIDE, dtype=torch.float32) * float(scale)
    size = faces.shape[-1]
    x, y = (2 * (places + float(each)) / (size - 1) - 1 for each in offset)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None].expand(len(faces), -1, -1, -1)
    return functional.grid_sample(faces, grid, mode="bilinear", padding_mode="border", align_corners=True)


def filled(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x`` [B, C, H, W] with zeros up to channels, height and width of ``shape``."""
    channels, height, width = (whole - part for whole, part in zip(shape, x.shape[1:], strict=True))
    return functional.pad(x, (0, width, 0, height, 0, channels)) if channels or height or width else x
