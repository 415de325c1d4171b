"""Images with boxes on disk: VOC's XML, COCO's JSON, YOLO's text files, all read into one kind of sample."""

from __future__ import annotations

import json
import logging
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vision.data.sources import IMAGE_SUFFIXES, DataError
from vision.data.view import Boxes
from vision.images import upright_size

logger = logging.getLogger(__name__)

# A box must be wider and higher than this, in pixels: in VOC's inclusive corners a mere point is 1 pixel wide.
MIN_SIDE = 1.0


@dataclass(frozen=True)
class LabelledImage:
    """One image's truth: ``boxes`` [G, 4], x1, y1, x2, y2 in pixels from 0, the right and lower edge exclusive.

    ``labels`` [G] are ids into the source's class names. ``ignored`` [G] marks boxes that are neither to be found nor
    wrong to find: VOC's difficult ones, COCO's crowds. ``areas`` [G] in square pixels, COCO's being those of its
    outlines. ``size`` is width and height where the annotation states them.
    """

    path: Path
    boxes: Boxes
    labels: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    areas: NDArray[np.float32]
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class DetectionSource:
    """The images of one split. ``degenerate`` counts boxes dropped for being at most a pixel wide or high."""

    class_names: tuple[str, ...]
    images: tuple[LabelledImage, ...]
    degenerate: int


@dataclass(frozen=True)
class RawBox:
    """A box as a file has it, its corners already in the convention of ``LabelledImage``."""

    class_name: str
    corners: tuple[float, float, float, float]
    ignored: bool = False
    area: float | None = None


RawImage = tuple[Path, list[RawBox], tuple[int, int] | None]


def label(raw: Iterable[RawImage], class_names: tuple[str, ...], root: Path) -> DetectionSource:
    """Turn names into ids, clip boxes to the size (width, height) where it is known, drop degenerate ones.

    Errors: DataError where a class is not among ``class_names``, or there are no images.
    """
    ids = {name: index for index, name in enumerate(class_names)}
    images, degenerate = [], 0
    for path, raw_boxes, size in raw:
        unknown = sorted({box.class_name for box in raw_boxes} - ids.keys())
        if unknown:
            raise DataError(
                f"the annotation of {path} names the class {', '.join(map(repr, unknown))}; known are "
                f"{', '.join(class_names) or 'none'}"
            )
        corners = np.array([box.corners for box in raw_boxes], dtype=np.float32).reshape(-1, 4)
        if size is not None:
            corners = corners.clip(0, np.array([*size, *size], dtype=np.float32))
        sides = corners[:, 2:] - corners[:, :2]
        whole = (sides > MIN_SIDE).all(axis=1)
        if not whole.all():
            degenerate += int((~whole).sum())
            logger.warning("%s: dropped %d boxes at most a pixel wide or high", path, (~whole).sum())
        areas = [
            box.area if box.area is not None else float(np.prod(side))
            for box, side in zip(raw_boxes, sides, strict=True)
        ]
        images.append(
            LabelledImage(
                path,
                corners[whole],
                np.array([ids[box.class_name] for box in raw_boxes], dtype=np.int64)[whole],
                np.array([box.ignored for box in raw_boxes], dtype=np.bool_)[whole],
                np.array(areas, dtype=np.float32)[whole],
                size,
            )
        )
    if not images:
        raise DataError(f"{root} holds no images of this split")
    return DetectionSource(class_names, tuple(images), degenerate)


def names_of(raw: Sequence[RawImage], given: tuple[str, ...] | None) -> tuple[str, ...]:
    """``given``, or every class that occurs, in alphabetical order."""
    return given or tuple(sorted({box.class_name for _, boxes, _ in raw for box in boxes}))


def first_folder(root: Path, names: Sequence[str]) -> Path:
    """The first of ``names`` that is a folder in ``root``."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{root} has none of the folders {', '.join(names)}")


# --- VOC -------------------------------------------------------------------------------------------------------------


def open_voc(root: Path, split: str, class_names: tuple[str, ...] | None) -> DetectionSource:
    """``Annotations``, ``JPEGImages`` and ``ImageSets/Main/SPLIT.txt`` under ``root``.

    Splits of several folders are joined by "+": "VOC2007/trainval+VOC2012/trainval". Own images may lie in ``images``
    beside ``annotations``; where there are no lists, "all" is everything, "val" a fifth of it, drawn once and for all
    with a fixed seed, and "train" the rest.
    """
    raw: list[RawImage] = []
    for part in split.split("+"):
        folder, _, name = part.strip().rpartition("/")
        raw += _voc_images(root / folder, name)
    return label(raw, names_of(raw, class_names), root)


def _voc_images(root: Path, split: str) -> list[RawImage]:
    annotations = first_folder(root, ("Annotations", "annotations"))
    images = first_folder(root, ("JPEGImages", "images"))
    lists = root / "ImageSets" / "Main"
    if lists.is_dir():
        file = lists / f"{split}.txt"
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in lists.glob("*.txt"))) or "none"
            raise DataError(f"{file} does not exist; splits of {root} are {known}")
        stems = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        stems = _split_by_seed(sorted(path.stem for path in annotations.glob("*.xml")), split, root)
    return [read_voc_file(annotations / f"{stem}.xml", images) for stem in stems]


def _split_by_seed(stems: list[str], split: str, root: Path) -> list[str]:
    if split not in ("train", "val", "all"):
        raise DataError(f"{root} has no lists in ImageSets/Main; its splits are train, val and all, not {split!r}")
    order = np.random.default_rng(0).permutation(len(stems))
    held_out = {stems[place] for place in order[: len(stems) // 5]}
    return [stem for stem in stems if split == "all" or (stem in held_out) == (split == "val")]


def read_voc_file(file: Path, images: Path) -> RawImage:
    """One annotation. VOC counts pixels from 1 and includes the last: 1 is taken off the first corner alone."""
    try:
        tree = ET.parse(file).getroot()
        size = _voc_size(tree)
        boxes = []
        for found in tree.iter("object"):
            edges = {name: float(found.findtext(f"bndbox/{name}", "")) for name in ("xmin", "ymin", "xmax", "ymax")}
            corners = (edges["xmin"] - 1, edges["ymin"] - 1, edges["xmax"], edges["ymax"])
            name = (found.findtext("name") or "").strip()
            boxes.append(RawBox(name, corners, found.findtext("difficult", "0").strip() == "1"))
    except (OSError, ET.ParseError, ValueError) as error:
        raise DataError(f"{file} is not a VOC annotation ({error})") from error
    return _image_of(images, file.stem, tree.findtext("filename") or ""), boxes, size


def _voc_size(tree: ET.Element) -> tuple[int, int] | None:
    width, height = (int(float(tree.findtext(f"size/{name}") or 0)) for name in ("width", "height"))
    return (width, height) if width > 0 and height > 0 else None


def _image_of(images: Path, stem: str, named: str) -> Path:
    """The image of an annotation: of its own name with whatever suffix, else the one it names."""
    for name in (f"{stem}.jpg", Path(named).name, f"{stem}.png", f"{stem}.jpeg", f"{stem}.JPG"):
        if name and (images / name).is_file():
            return images / name
    return images / f"{stem}.jpg"  # reading it will fail, and say so


# --- COCO ------------------------------------------------------------------------------------------------------------


def open_coco(root: Path, split: str, class_names: tuple[str, ...] | None) -> DetectionSource:
    """``annotations/instances_SPLIT.json`` (or beside the images) with images in ``SPLIT`` or ``images``.

    Class names are the file's categories by rising id, also those without boxes.
    """
    candidates = [root / "annotations" / f"instances_{split}.json", root / f"instances_{split}.json"]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise DataError(f"neither {candidates[0]} nor {candidates[1]} exists")
    folder = first_folder(root, (split, f"images/{split}", "images"))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        categories = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        raw = _coco_images(content, categories, folder)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a COCO annotation file ({type(error).__name__}: {error})") from error
    return label(raw, class_names or tuple(categories[key] for key in sorted(categories)), root)


def _coco_images(content: Mapping[str, Any], categories: Mapping[int, str], folder: Path) -> list[RawImage]:
    boxes: dict[int, list[RawBox]] = {entry["id"]: [] for entry in content["images"]}
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        boxes[entry["image_id"]].append(
            RawBox(
                categories[entry["category_id"]],
                (x, y, x + width, y + height),
                bool(entry.get("iscrowd", 0)),
                entry.get("area"),
            )
        )
    return [
        (folder / entry["file_name"], boxes[entry["id"]], (entry["width"], entry["height"]))
        for entry in content["images"]
    ]


# --- YOLO ------------------------------------------------------------------------------------------------------------


def open_yolo(root: Path, split: str, class_names: tuple[str, ...] | None) -> DetectionSource:
    """``images/SPLIT`` and ``labels/SPLIT`` (or ``SPLIT/images``, ``SPLIT/labels``), names in ``data.yaml``.

    An image without a label file has no boxes. Images whose size cannot be read are left out, with a warning.
    """
    images = first_folder(root, (f"images/{split}", f"{split}/images"))
    labels = first_folder(root, (f"labels/{split}", f"{split}/labels"))
    names = _yolo_names(root)
    raw: list[RawImage] = []
    for path in sorted(file for file in images.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES):
        try:
            with Image.open(path) as image:
                size = upright_size(image)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            logger.warning("skipped: %s is not a readable image (%s)", path, error)
            continue
        file = (labels / path.relative_to(images)).with_suffix(".txt")
        raw.append((path, _yolo_boxes(file, names, size) if file.is_file() else [], size))
    return label(raw, class_names or names, root)


def _yolo_names(root: Path) -> tuple[str, ...]:
    file = root / "data.yaml"
    if not file.is_file():
        raise DataError(f"{file} does not exist; it holds the class names under `names`")
    try:
        names = yaml.safe_load(file.read_text(encoding="utf-8"))["names"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(f"{file} has no list of class names under `names` ({error})") from error
    return tuple(str(names[key]) for key in sorted(names)) if isinstance(names, dict) else tuple(map(str, names))


def _yolo_boxes(file: Path, names: tuple[str, ...], size: tuple[int, int]) -> list[RawBox]:
    boxes = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            class_id, x, y, width, height = (float(value) for value in line.split())
        except ValueError as error:
            raise DataError(f"{file}, line {number}: expected a class id and four numbers, got {line!r}") from error
        if not 0 <= class_id < len(names):
            raise DataError(
                f"{file}, line {number}: class {class_id:.0f} is beyond the {len(names)} names of data.yaml"
            )
        corners = (
            (x - width / 2) * size[0],
            (y - height / 2) * size[1],
            (x + width / 2) * size[0],
            (y + height / 2) * size[1],
        )
        boxes.append(RawBox(names[int(class_id)], corners))
    return boxes


OpenDetection = Callable[[Path, str, tuple[str, ...] | None], DetectionSource]

DETECTION_SOURCES: dict[str, OpenDetection] = {"voc": open_voc, "coco": open_coco, "yolo": open_yolo}


def open_detection(kind: str, root: Path, split: str, class_names: tuple[str, ...] | None = None) -> DetectionSource:
    """The images of one split. With ``class_names`` any other class in the data is an error, without it all are taken.

    Errors: DataError, also for an unknown ``kind``.
    """
    if kind not in DETECTION_SOURCES:
        raise DataError(f"data of kind {kind!r} is not known; allowed are {', '.join(DETECTION_SOURCES)}")
    root = root.expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    return DETECTION_SOURCES[kind](root, split, class_names)
