"""Labelled images by how they lie on disk, or are made: one table of all sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vision.data.faces import london_faces, orl_faces
from vision.data.sources import DataError, ImageSource, cifar10_source, cifar100_source, idx_source, open_folder
from vision.data.textures import textures


@dataclass(frozen=True)
class SourceKind:
    """How a kind of data set is opened, and what its two splits are called by default."""

    open: Callable[[Path, str], ImageSource]
    train_split: str
    eval_split: str


SOURCES: dict[str, SourceKind] = {
    "folder": SourceKind(open_folder, "train", "val"),
    "cifar10": SourceKind(cifar10_source, "train", "test"),
    "cifar100": SourceKind(cifar100_source, "train", "test"),
    "idx": SourceKind(idx_source, "train", "t10k"),
    "london_faces": SourceKind(london_faces, "train", "val"),
    "orl_faces": SourceKind(orl_faces, "train", "measure"),
    "textures": SourceKind(textures, "train", "test"),
}


def open_source(kind: str, root: Path, split: str) -> ImageSource:
    """The images of one split. Errors: DataError, also for an unknown ``kind``."""
    if kind not in SOURCES:
        raise DataError(f"data of kind {kind!r} is not known; allowed are {', '.join(SOURCES)}")
    return SOURCES[kind].open(root.expanduser(), split)
