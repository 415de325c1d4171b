"""Boxes in COCO's JSON, as the authors lay it out and as Roboflow does."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from vision.data.labelled_boxes import DetectionSource, RawBox, RawImage, check_names, label
from vision.data.sources import DataError, split_folders

logger = logging.getLogger(__name__)

ROBOFLOW_FILE = "_annotations.coco.json"


def open_coco(root: Path, split: str, class_names: tuple[str, ...] | None) -> DetectionSource:
    """``annotations/instances_SPLIT.json`` (or beside the images) with images in ``SPLIT`` or ``images``.

    Roboflow's ``SPLIT/_annotations.coco.json`` with the images beside it reads as well. Class names are the file's
    categories by rising id, also those without boxes.
    """
    file, folders = _files(root, split)
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        categories = _by_id(content["categories"], "category", "name")
        names = tuple(str(categories[key]) for key in sorted(categories))
        check_names(names, str(file))
        raw = _coco_images(content, {key: str(name) for key, name in categories.items()}, folders, file)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{file} is not a COCO annotation file ({type(error).__name__}: {error})") from error
    return label(raw, class_names or names, root)


def _files(root: Path, split: str) -> tuple[Path, list[Path]]:
    """The annotation file and the folders in which its images may lie."""
    candidates = [root / "annotations" / f"instances_{split}.json", root / f"instances_{split}.json"]
    candidates += [folder / ROBOFLOW_FILE for folder in split_folders(root, split)]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise DataError(f"neither {candidates[0]} nor {candidates[1]} nor {root / split / ROBOFLOW_FILE} exists")
    folders = [*split_folders(root, split), *split_folders(root / "images", split), root / "images", file.parent]
    there = [folder for folder in folders if folder.is_dir()]
    return file, [*there, root]


def _by_id(entries: list[dict[str, Any]], what: str, key: str) -> dict[Any, Any]:
    """``key`` of each entry by its id. Errors: ValueError where an id stands twice."""
    found: dict[Any, Any] = {}
    for entry in entries:
        if entry["id"] in found:
            raise ValueError(f"the {what} id {entry['id']!r} belongs to {found[entry['id']]!r} and to {entry[key]!r}")
        if not isinstance(entry[key], str):
            raise ValueError(f"the {what} with the id {entry['id']!r} has the {key} {entry[key]!r}, which is no text")
        found[entry["id"]] = entry[key]
    if len({type(key) for key in found}) > 1:
        raise ValueError(f"the {what} ids {', '.join(map(repr, found))} are of several types; write all as numbers")
    return found


def _coco_images(
    content: Mapping[str, Any], categories: Mapping[Any, str], folders: list[Path], file: Path
) -> list[RawImage]:
    names = _by_id(content["images"], "image", "file_name")
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise ValueError(f"the image {twice[0]!r} stands under several ids")
    boxes: dict[Any, list[RawBox]] = {key: [] for key in names}
    strays = []
    for number, entry in enumerate(content["annotations"], start=1):
        if entry["image_id"] not in boxes:
            strays.append(entry["image_id"])
            continue
        boxes[entry["image_id"]].append(_box(entry, categories, number))
    if strays:
        logger.warning(
            "%s: %d annotations are of images that it does not list, the first of image id %r; they are left out",
            file, len(strays), strays[0],
        )  # fmt: skip
    return [
        RawImage(_picture(folders, str(entry["file_name"])), boxes[entry["id"]], _size(entry))
        for entry in content["images"]
    ]


def _box(entry: Mapping[str, Any], categories: Mapping[Any, str], number: int) -> RawBox:
    if entry["category_id"] not in categories:
        known = ", ".join(repr(key) for key in categories) or "none"
        raise ValueError(f"annotation {number} has the category_id {entry['category_id']!r}; categories are {known}")
    if entry.get("bbox"):
        x, y, width, height = (float(value) for value in entry["bbox"])
    else:
        x, y, width, height = _around(entry.get("segmentation"), number)
    if not all(math.isfinite(value) for value in (x, y, width, height)):
        raise ValueError(f"annotation {number} has the bbox {entry['bbox']}")
    return RawBox(
        categories[entry["category_id"]],
        (x, y, x + width, y + height),
        _number(entry, "iscrowd", number) != 0,
        _number(entry, "area", number) if "area" in entry else None,
    )


def _number(entry: Mapping[str, Any], key: str, number: int) -> float:
    """A number of an annotation, 0 where there is none; tools write some as texts."""
    try:
        return float(entry.get(key) or 0)
    except (ValueError, TypeError) as error:
        raise ValueError(f"annotation {number} has the {key} {entry[key]!r}, which is no number") from error


def _around(outlines: Any, number: int) -> tuple[float, float, float, float]:
    """x, y, width and height around polygons [x1, y1, x2, y2, ...]."""
    if not isinstance(outlines, list) or not any(outlines):
        raise ValueError(f"annotation {number} has neither a bbox nor polygons; give it a bbox [x, y, width, height]")
    xs = [float(x) for outline in outlines for x in outline[::2]]
    ys = [float(y) for outline in outlines for y in outline[1::2]]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def _size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = entry.get("width"), entry.get("height")
    return (int(width), int(height)) if width and height else None


def _picture(folders: list[Path], name: str) -> Path:
    """The file of that name in the first folder that has it; tools write paths of other machines before the name."""
    for candidate in (name, PureWindowsPath(name).name):
        for folder in folders:
            if (folder / candidate).is_file():
                return folder / candidate
    return folders[0] / name  # reading it will fail, and say so
