"""Labelled images on disk: class folders (as ImageNet is kept), CIFAR's binary files, idx files (as MNIST's)."""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vision.images import DAMAGE, orientation_of, to_rgb, turn_upright, upright_size

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
)
# Names of one split: recipes say val, Roboflow's exports valid.
SPLIT_NAMES = {"val": ("valid", "validation"), "valid": ("val", "validation"), "validation": ("val", "valid")}
IDX_IMAGES, IDX_LABELS = 0x803, 0x801


class DataError(ValueError):
    """A data set is missing, empty, or not of the kind it should be."""


class UnreadableImageError(DataError):
    """One image cannot be decoded; the message names the file."""


class ImageSource(Protocol):
    """Labelled images. ``read`` returns RGB whatever is stored; grey images get three equal channels."""

    class_names: tuple[str, ...]
    labels: NDArray[np.int64]

    def read(self, index: int) -> Image.Image:
        """The image; UnreadableImageError where it cannot be decoded."""


def read_image(path: Path, annotated: tuple[int, int] | None = None) -> Image.Image:
    """Decode ``path`` completely, as RGB and upright, as the server decodes it (``vision.images``).

    ``annotated`` is the width and height that boxes or masks of the image were drawn at. Tools disagree about EXIF
    rotation: where these are the sides as stored and not as turned, the image stays as stored. Errors:
    UnreadableImageError for anything that is not a whole image.
    """
    try:
        with Image.open(path) as image:
            orientation = orientation_of(image)
            if annotated == image.size != upright_size(image):
                return to_rgb(image)
            return turn_upright(to_rgb(image), orientation)
    except FileNotFoundError as error:
        others = images_by_stem(path.parent).get(path.stem, []) if path.parent.is_dir() else []
        hint = f"; {others[0].name} lies there, under another suffix" if others else ""
        raise UnreadableImageError(f"{path} does not exist{hint}") from error
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{path} is not a readable image ({error})") from error


def split_folders(root: Path, split: str) -> list[Path]:
    """The folders a split may lie in, by preference; none of them need exist."""
    return [root / name for name in (split, *SPLIT_NAMES.get(split, ()))]


def image_files(folder: Path, besides: Collection[str] = (), *, deep: bool = True) -> list[Path]:
    """Images in ``folder``, in order of their paths; with ``deep`` also in folders below.

    Other files are named in a warning, but hidden ones and those with the suffixes ``besides``.
    """
    files = [
        file
        for file in (folder.rglob("*") if deep else folder.glob("*"))
        if file.is_file() and not file.name.startswith(".")  # macOS puts ._NAME beside every NAME in an archive
    ]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    known = {*IMAGE_SUFFIXES, *besides}
    others = [file for file in files if file.suffix.lower() not in known]
    if others:
        logger.warning(
            "%d files in %s are no images of a known kind, the first: %s; known suffixes are %s",
            len(others), folder, min(others).name, ", ".join(sorted(IMAGE_SUFFIXES)),
        )  # fmt: skip
    return sorted(images, key=lambda file: file.parts)  # paths compare by their parts too, taken apart every time


def check_stems(images: Iterable[Path]) -> None:
    """Errors: DataError where two images would take their labels or mask from one file."""
    seen: dict[Path, Path] = {}
    for path in images:
        if (other := seen.setdefault(path.with_suffix(""), path)) is not path:
            raise DataError(f"{other} and {path.name} would share the labels of {path.stem}; rename one of them")


def images_by_stem(folder: Path) -> dict[str, list[Path]]:
    """Images directly in ``folder``, by their names without suffix."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            found.setdefault(file.stem, []).append(file)
    return found


class FolderSource:
    """``root/<class>/**/image``; classes in alphabetical order of their folders."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"{root} is not a folder; expected one folder for each class in it")
        folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
        if not folders:
            raise DataError(
                f"{root} holds no class folders; expected {root}/CLASS/IMAGE (a flat folder of images has no labels)"
            )
        self.paths: list[Path] = []
        labels: list[int] = []
        empty: list[str] = []
        for label, folder in enumerate(folders):
            files = image_files(folder)
            if not files:
                empty.append(folder.name)
            self.paths += files
            labels += [label] * len(files)
        if empty:
            raise DataError(f"class folders without images in {root}: {', '.join(empty)}; fill or remove them")
        self.class_names = tuple(folder.name for folder in folders)
        self.labels = np.array(labels, dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        """The image at ``paths[index]``."""
        return read_image(self.paths[index])


class ArraySource:
    """Images in memory, uint8 [N, H, W] or [N, H, W, 3]."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], class_names: tuple[str, ...]) -> None:
        if len(images) != len(labels) or not len(images):
            raise DataError(
                f"{len(images)} images and {len(labels)} labels; expected the same number, and at least one"
            )
        if labels.max() >= len(class_names):
            raise DataError(f"label {labels.max()} is beyond the {len(class_names)} classes")
        self.images, self.labels, self.class_names = images, labels, class_names

    def read(self, index: int) -> Image.Image:
        """The image at ``images[index]``."""
        return Image.fromarray(self.images[index]).convert("RGB")


class InMemorySource:
    """The images of another source, decoded once. Each loader worker keeps its own."""

    def __init__(self, source: ImageSource) -> None:
        self.source, self.labels, self.class_names = source, source.labels, source.class_names
        self.decoded: dict[int, Image.Image] = {}

    def read(self, index: int) -> Image.Image:
        """The image, which the caller must not change."""
        image = self.decoded.get(index)
        if image is None:
            image = self.decoded[index] = self.source.read(index)
        return image


class FirstClasses:
    """The images of another source of the first ``count`` classes. Errors: DataError for a count that it has not."""

    def __init__(self, source: ImageSource, count: int) -> None:
        names = source.class_names
        if not 2 <= count <= len(names):
            raise DataError(
                f"data.classes is {count}; the data has {len(names)} classes, so allowed are 2 to {len(names)}"
            )
        self.source, self.class_names = source, names[:count]
        self.indices = np.flatnonzero(source.labels < count)
        self.labels = source.labels[self.indices]

    def read(self, index: int) -> Image.Image:
        """The image at ``indices[index]`` of the whole."""
        return self.source.read(int(self.indices[index]))


def read_bytes(path: Path) -> bytes:
    """The content of ``path`` or of its gzip ``path.gz``."""
    packed = path.with_name(path.name + ".gz")
    try:
        if path.is_file():
            return path.read_bytes()
        if packed.is_file():
            return gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    raise DataError(f"neither {path} nor {packed.name} exists")


def read_idx(path: Path, magic: int) -> NDArray[np.uint8]:
    """One idx file of unsigned bytes: a magic number with the count of dimensions, the dimensions, the data."""
    content = read_bytes(path)
    if int.from_bytes(content[:4], "big") != magic:
        raise DataError(f"{path} is not an idx file of the expected kind (first bytes {content[:4].hex()})")
    start = 4 + 4 * (magic & 0xFF)
    shape = tuple(int.from_bytes(content[place : place + 4], "big") for place in range(4, start, 4))
    data = np.frombuffer(content[start:], dtype=np.uint8)
    if data.size != math.prod(shape) or len(content) < start:
        raise DataError(f"{path} is truncated: its header says {shape}, it holds {data.size} bytes")
    return data.reshape(shape)


def idx_source(root: Path, split: str) -> ArraySource:
    """``root/{split}-images-idx3-ubyte`` with its labels, gzip or not. Classes are the digits 0 to 9."""
    images = read_idx(root / f"{split}-images-idx3-ubyte", IDX_IMAGES)
    labels = read_idx(root / f"{split}-labels-idx1-ubyte", IDX_LABELS)
    return ArraySource(images, labels.astype(np.int64), tuple(str(digit) for digit in range(10)))


def cifar_records(files: list[Path], label_bytes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [N, 32, 32, 3] and the last label byte of every record of CIFAR's binary files."""
    record = label_bytes + 3 * 32 * 32
    contents = []
    for file in files:
        data = np.frombuffer(read_bytes(file), dtype=np.uint8)
        if data.size == 0 or data.size % record:
            raise DataError(
                f"{file} holds {data.size} bytes, not a multiple of {record}: truncated, or another version"
            )
        contents.append(data.reshape(-1, record))
    records = np.concatenate(contents)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, label_bytes - 1].astype(np.int64)


def names_in(path: Path) -> tuple[str, ...]:
    """Class names, one a line."""
    return tuple(line.strip() for line in read_bytes(path).decode().splitlines() if line.strip())


def cifar10_source(root: Path, split: str) -> ArraySource:
    """CIFAR-10's binary version (never its pickles). ``split`` is ``train`` or ``test``."""
    files = [root / f"data_batch_{n}.bin" for n in range(1, 6)] if split == "train" else [root / f"{split}_batch.bin"]
    return ArraySource(*cifar_records(files, label_bytes=1), names_in(root / "batches.meta.txt"))


def cifar100_source(root: Path, split: str) -> ArraySource:
    """CIFAR-100's binary version with its fine labels. ``split`` is ``train`` or ``test``."""
    return ArraySource(*cifar_records([root / f"{split}.bin"], label_bytes=2), names_in(root / "fine_label_names.txt"))


def open_folder(root: Path, split: str) -> FolderSource:
    """``FolderSource`` of the split's folder; the first of its names where none exists, for the message."""
    folders = split_folders(root, split)
    return FolderSource(next((folder for folder in folders if folder.is_dir()), folders[0]))
