"""Boxes in VOC's XML: the challenge's folders, labelImg's XML beside the images, Roboflow's folder for each split."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path, PureWindowsPath

from vision.data.labelled_boxes import DetectionSource, RawBox, RawImage, Size, label, names_of, split_by_seed
from vision.data.sources import IMAGE_SUFFIXES, DataError, images_by_stem, split_folders

EDGES = ("xmin", "ymin", "xmax", "ymax")
FOLDERS = (("Annotations", "JPEGImages"), ("annotations", "images"))
# A line of a class's own list ends with whether the class is there.
PRESENCE = re.compile(r"^(.*\S)\s+(-1|0|1)$")


def open_voc(root: Path, split: str, class_names: tuple[str, ...] | None) -> DetectionSource:
    """``Annotations``, ``JPEGImages`` and ``ImageSets/Main/SPLIT.txt`` under ``root``.

    Splits of several folders are joined by "+": "VOC2007/trainval+VOC2012/trainval". Own images may lie in ``images``
    beside ``annotations``, or beside their XML files in ``root`` (labelImg) or ``root/SPLIT`` (Roboflow); where there
    are neither lists nor folders of splits, "all" is everything, "val" a fifth of it, drawn once and for all with a
    fixed seed, and "train" the rest.
    """
    raw: list[RawImage] = []
    for part in split.split("+"):
        folder, _, name = part.strip().rpartition("/")
        raw += _voc_images(root / folder, name)
    return label(raw, names_of(raw, class_names), root)


def _voc_images(root: Path, split: str) -> list[RawImage]:
    annotations, images, divided = _folders(root, split)
    files = sorted(path.stem for path in annotations.glob("*.xml"))
    lists = root / "ImageSets" / "Main"
    if lists.is_dir():
        file = lists / f"{split}.txt"
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in lists.glob("*.txt"))) or "none"
            raise DataError(f"{file} does not exist; splits of {root} are {known}")
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        stems = [_stem(line.strip(), annotations) for line in lines if line.strip()]
    else:
        stems = files if divided else split_by_seed(files, split, root)
    pictures = images_by_stem(images)
    raw = [read_voc_file(annotations / f"{stem}.xml", pictures, set(files)) for stem in stems]
    owners: dict[Path, str] = {}
    for stem, entry in zip(stems, raw, strict=True):
        if owners.setdefault(entry.path, stem) != stem:
            raise DataError(f"{owners[entry.path]}.xml and {stem}.xml in {annotations} both claim {entry.path.name}")
    return raw


def _folders(root: Path, split: str) -> tuple[Path, Path, bool]:
    """Folders of annotations and images, and whether they hold this split alone."""
    for drawn, photographs in FOLDERS:
        if (root / drawn).is_dir() and (root / photographs).is_dir():
            return root / drawn, root / photographs, False
    for folder in split_folders(root, split):
        if any(folder.glob("*.xml")):
            return folder, folder, True
    if any(root.glob("*.xml")):
        return root, root, False
    raise DataError(
        f"{root} has none of the folders Annotations, annotations beside JPEGImages or images, no XML files beside "
        f"images, and no such folder {split}"
    )


def _stem(line: str, annotations: Path) -> str:
    """The annotation that a line of a list names: its stem, or a file name, or a stem with the presence of a class."""
    if (annotations / f"{line}.xml").is_file():
        return line
    presence = PRESENCE.match(line)
    name = presence[1] if presence else line
    return Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name


def read_voc_file(file: Path, pictures: dict[str, list[Path]], stems: set[str]) -> RawImage:
    """One annotation. VOC counts pixels from 1 and includes the last: 1 is taken off the first corner alone.

    ``pictures`` are the images by stem, ``stems`` those that have annotations. Errors: DataError.
    """
    try:
        tree = ET.parse(file).getroot()
        boxes = [_box(found, number) for number, found in enumerate(tree.iter("object"), start=1)]
        size = _size(tree)
    except (OSError, ET.ParseError, ValueError) as error:
        raise DataError(f"{file} is not a VOC annotation ({error})") from error
    return RawImage(_picture_of(file, tree.findtext("filename") or "", pictures, stems), boxes, size)


def _box(found: ET.Element, number: int) -> RawBox:
    name = (found.findtext("name") or "").strip()
    if not name:
        raise ValueError(f"object {number} has no name")
    try:
        edges = [float(found.findtext(f"bndbox/{edge}", "")) for edge in EDGES]
    except ValueError as error:
        raise ValueError(f"object {number}, {name!r}, has no bndbox with numbers {', '.join(EDGES)}") from error
    if not all(math.isfinite(edge) for edge in edges):
        raise ValueError(f"object {number}, {name!r}, has the corners {edges}")
    corners = (edges[0] - 1, edges[1] - 1, edges[2], edges[3])
    return RawBox(name, corners, (found.findtext("difficult") or "0").strip() == "1")


def _size(tree: ET.Element) -> Size | None:
    width, height = (int(float(tree.findtext(f"size/{name}") or 0)) for name in ("width", "height"))
    return (width, height) if width > 0 and height > 0 else None


def _picture_of(file: Path, named: str, pictures: dict[str, list[Path]], stems: set[str]) -> Path:
    """The image of an annotation: of its own name with whatever suffix, else the one it names.

    Files are renamed together and keep a stale ``<filename>`` inside, which may by now be another picture's.
    """
    name = PureWindowsPath(named.strip()).name  # understands both kinds of slashes
    own = pictures.get(file.stem, [])
    chosen = own if len(own) < 2 else [path for path in own if path.name == name]
    if len(chosen) == 1:
        return chosen[0]
    if own:
        raise DataError(
            f"{file} could belong to {' or '.join(path.name for path in own)}; rename or remove all but one"
        )
    stem = PureWindowsPath(name).stem
    of_that_name = [path for path in pictures.get(stem, []) if path.name == name]
    if of_that_name and stem not in stems:
        return of_that_name[0]
    folder = next(iter(pictures.values()))[0].parent if pictures else file.parent
    return folder / f"{file.stem}.jpg"  # reading it will fail, and say so
