"""Boxes in YOLO's text files, one line a box: class id, then centre, width and height as shares, or a polygon."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import yaml

from vision.data.labelled_boxes import (
    DetectionSource,
    RawBox,
    RawImage,
    Size,
    check_names,
    label,
    picture_sizes,
    split_by_seed,
)
from vision.data.sources import DataError, check_stems, image_files, split_folders

logger = logging.getLogger(__name__)

NAME_FILES = ("data.yaml", "dataset.yaml", "data.yml")
CLASSES_FILE = "classes.txt"
LABEL_SUFFIX = ".txt"
# Shares may miss the picture by a rounding; anything further is not a share.
ROUNDING = 0.01
Box = tuple[float, float, float, float]


def open_yolo(root: Path, split: str, class_names: tuple[str, ...] | None) -> DetectionSource:
    """``images/SPLIT`` and ``labels/SPLIT`` (or ``SPLIT/images``, ``SPLIT/labels``), names in ``data.yaml``.

    Label files may also lie beside the images, in ``SPLIT`` or, as labelImg writes them with ``classes.txt``, in
    ``root``, which is then split as VOC's own images are. An image without a label file has no boxes. Images whose
    size cannot be read are left out, with a warning.
    """
    images, labels, divided = _folders(root, split)
    names = read_names(root, images)
    files = image_files(images, besides={".txt", ".cache", ".yaml", ".yml", ".json"}, deep=divided)
    check_stems(files)
    if not divided:
        chosen = set(split_by_seed(sorted(path.stem for path in files), split, root))
        files = [path for path in files if path.stem in chosen]
    found = _label_files(labels, deep=divided)
    raw: list[RawImage] = []
    for path in files:
        file = found.pop(path.relative_to(images).with_suffix(""), None)
        sizes = picture_sizes(path)
        if not sizes:
            logger.warning("skipped: %s is not a readable image", path)
            continue
        raw.append(RawImage(path, [] if file is None else read_labels(file, names, sizes[0]), sizes[0]))
    if found and divided:  # images renamed without their labels train as empty ones
        first = next(iter(found.values())).name
        logger.warning("%d label files in %s belong to no image, the first: %s", len(found), labels, first)
    return label(raw, class_names or tuple(names.values()), root)


def _folders(root: Path, split: str) -> tuple[Path, Path, bool]:
    """Folders of images and labels, and whether they hold this split alone."""
    for folder in split_folders(root / "images", split):
        if folder.is_dir():
            return folder, root / "labels" / folder.name, True
    for folder in split_folders(root, split):
        if (folder / "images").is_dir():
            return folder / "images", folder / "labels", True
        if folder.is_dir():
            return folder, folder, True
    if any(root.glob("*.txt")):
        return root, root, False
    raise DataError(f"{root} has none of the folders images/{split}, {split}/images, {split}")


def _label_files(folder: Path, *, deep: bool) -> dict[Path, Path]:
    """Label files by their path in ``folder`` without suffix, which some tools write in capitals. Errors: DataError."""
    found: dict[Path, Path] = {}
    for file in sorted(folder.rglob("*") if deep else folder.glob("*")):
        if file.suffix.lower() != LABEL_SUFFIX or file.name == CLASSES_FILE:
            continue
        if (other := found.setdefault(file.relative_to(folder).with_suffix(""), file)) is not file:
            raise DataError(f"{other} and {file.name} are labels of the same image; remove one of them")
    return found


def read_names(root: Path, images: Path) -> dict[int, str]:
    """Class names by id, from ``data.yaml`` under ``root`` or labelImg's ``classes.txt``. Errors: DataError."""
    for name in NAME_FILES:
        if (root / name).is_file():
            return _yaml_names(root / name)
    for folder in (images, root):
        file = folder / CLASSES_FILE
        if file.is_file():
            return dict(enumerate(_listed_names(file)))
    raise DataError(f"{root / NAME_FILES[0]} does not exist; it holds the class names under `names`")


def _listed_names(file: Path) -> list[str]:
    """One class name a line; a class's id is its line, so that none but the last may be empty. Errors: DataError."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except ValueError as error:
        raise DataError(f"{file} is not UTF-8 text ({error})") from error
    if not all(names):
        raise DataError(f"{file}, line {names.index('') + 1} is empty: the ids of the names after it could be meant so")
    check_names(names, str(file))
    return names


def _yaml_names(file: Path) -> dict[int, str]:
    """Read from the file's nodes: loaded values would turn a class `no` into False and drop an id that stands twice."""
    try:
        top = yaml.compose(file.read_text(encoding="utf-8-sig"), yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise DataError(f"{file} is not YAML ({error})") from error
    entries = {key.value: value for key, value in top.value} if isinstance(top, yaml.MappingNode) else {}
    if "kpt_shape" in entries:
        raise DataError(f"{file} describes poses (kpt_shape); keep a line's first five numbers and remove kpt_shape")
    names = entries.get("names")
    if isinstance(names, yaml.SequenceNode):
        found = [(str(place), _name_of(value, file)) for place, value in enumerate(names.value)]
    elif isinstance(names, yaml.MappingNode):
        found = [(str(key.value), _name_of(value, file)) for key, value in names.value]
    else:
        given = f"; {names.value!r} is one text" if isinstance(names, yaml.ScalarNode) else ""
        raise DataError(f"{file} has no list of class names under `names`{given}; write names: [cat, dog]")
    ids = [_id_of(key, file) for key, _ in found]
    if len(set(ids)) < len(ids):
        raise DataError(f"{file} gives one class id two names: ids are {', '.join(map(str, sorted(ids)))}")
    count = entries["nc"].value if "nc" in entries else str(len(found))
    if count != str(len(found)):
        raise DataError(f"{file} says nc: {count} and names {len(found)} classes; mend one of them")
    by_id = dict(sorted(zip(ids, (name for _, name in found), strict=True)))
    check_names(list(by_id.values()), str(file))
    return by_id


def _name_of(node: yaml.Node, file: Path) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise DataError(f"{file} has a list or a map as a class name under `names`; every name must be one text")
    return str(node.value)


def _id_of(key: str, file: Path) -> int:
    if not key.isascii() or not key.isdigit():
        raise DataError(f"{file} has the class id {key!r} under `names`; ids are whole numbers from 0")
    return int(key)


def read_labels(file: Path, names: Mapping[int, str], size: Size) -> list[RawBox]:
    """The boxes of one label file in pixels of a picture of ``size``. Errors: DataError naming the line."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except ValueError as error:
        raise DataError(f"{file} is not UTF-8 text ({error})") from error
    boxes = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            class_id, box = _parse(line, f"{file}, line {number}")
            if class_id not in names:
                ids = ", ".join(map(str, names)) if len(names) <= 20 else f"{min(names)} to {max(names)}"
                raise DataError(
                    f"{file}, line {number}: class {class_id} is beyond the {len(names)} names; ids are {ids}"
                )
            corners = (box[0] * size[0], box[1] * size[1], box[2] * size[0], box[3] * size[1])
            boxes.append(RawBox(names[class_id], corners))
    return boxes


def _parse(line: str, where: str) -> tuple[int, Box]:
    """Class id and corners as shares. Three points or more are a polygon, whose box is taken."""
    try:
        first, *values = (float(value) for value in line.split())
    except ValueError as error:
        raise DataError(f"{where}: expected a class id and four numbers, got {line!r}") from error
    polygon = len(values) >= 6 and len(values) % 2 == 0
    if len(values) != 4 and not polygon:
        raise DataError(f"{where}: expected a class id and four numbers, or a polygon's points, got {line!r}")
    if not first.is_integer():
        raise DataError(f"{where}: the class id {line.split()[0]} is not a whole number")
    if not all(math.isfinite(value) and -ROUNDING <= value <= 1 + ROUNDING for value in values):
        raise DataError(
            f"{where}: coordinates must be shares of the picture's width and height, from 0 to 1, got {line!r}; "
            "pixels must be divided by the picture's sides"
        )
    if polygon:
        return int(first), (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    x, y, width, height = values
    return int(first), (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
