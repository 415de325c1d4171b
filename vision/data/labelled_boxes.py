"""Pictures with labelled boxes: what every reader of annotations hands over, and how its boxes are checked."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vision.data.sources import DataError, read_image
from vision.data.view import Boxes
from vision.images import upright_size

logger = logging.getLogger(__name__)

# A box must be wider and higher than this, in pixels: in VOC's inclusive corners a mere point is 1 pixel wide.
MIN_SIDE = 1.0
# Tools round corners outwards; only what reaches further beyond the picture is worth a word.
BORDER = 2.0

Size = tuple[int, int]


@dataclass(frozen=True)
class LabelledImage:
    """One image's truth: ``boxes`` [G, 4], x1, y1, x2, y2 in pixels from 0, the right and lower edge exclusive.

    ``labels`` [G] are ids into the source's class names. ``ignored`` [G] marks boxes that are neither to be found nor
    wrong to find: VOC's difficult ones, COCO's crowds. ``areas`` [G] in square pixels, COCO's being those of its
    outlines. ``size`` is width and height where the annotation or the file states them. ``made`` is the picture itself
    where it lies in no file; ``path`` is then only its name.
    """

    path: Path
    boxes: Boxes
    labels: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    areas: NDArray[np.float32]
    size: Size | None = None
    made: Image.Image | None = None

    def read(self) -> Image.Image:
        """The image as RGB, as its boxes were drawn on it. Errors: UnreadableImageError."""
        return self.made or read_image(self.path, self.size)


@dataclass(frozen=True)
class DetectionSource:
    """The images of one split. ``degenerate`` counts boxes dropped for showing at most a pixel of the picture."""

    class_names: tuple[str, ...]
    images: tuple[LabelledImage, ...]
    degenerate: int

    def count_boxes(self, *, difficult: bool = False) -> int:
        """Boxes that count, of all images; with ``difficult`` also the ignored ones."""
        return sum(len(image.labels) if difficult else int((~image.ignored).sum()) for image in self.images)


@dataclass(frozen=True)
class RawBox:
    """A box as a file has it, its corners already in the convention of ``LabelledImage``."""

    class_name: str
    corners: tuple[float, float, float, float]
    ignored: bool = False
    area: float | None = None


@dataclass(frozen=True)
class RawImage:
    """A picture and its boxes as a file has them; ``size`` is the width and height that the annotation states."""

    path: Path
    boxes: list[RawBox]
    size: Size | None


def label(raw: Iterable[RawImage], class_names: tuple[str, ...], root: Path) -> DetectionSource:
    """Turn names into ids, clip boxes to the picture, drop degenerate ones.

    A picture whose annotation states another size is left out: nobody can say where its boxes lie. Errors: DataError
    where names occur twice, a class is not among ``class_names``, or no picture is left.
    """
    check_names(class_names, str(root))
    ids = {name: index for index, name in enumerate(class_names)}
    images, degenerate, contradicting = [], 0, 0
    for entry in raw:
        unknown = sorted({box.class_name for box in entry.boxes} - ids.keys())
        if unknown:
            raise DataError(
                f"the annotation of {entry.path} names the class {', '.join(map(repr, unknown))}; known are "
                f"{', '.join(class_names) or 'none'}"
            )
        sizes = picture_sizes(entry.path)
        if sizes and entry.size is not None and entry.size not in sizes:
            contradicting += 1
            logger.warning(
                "left out: %s has %dx%d pixels, its annotation was drawn on %dx%d; scale one of them to the other",
                entry.path, *sizes[0], *entry.size,
            )  # fmt: skip
            continue
        image, dropped = _checked(entry, ids, entry.size or (sizes[0] if sizes else None))
        degenerate += dropped
        images.append(image)
    if not images:
        reason = f": {contradicting} were left out for another size than their annotations state (see above)"
        raise DataError(f"{root} holds no images of this split{reason if contradicting else ''}")
    if contradicting:
        logger.warning("%d pictures of %s were left out for another size than annotated", contradicting, root)
    return DetectionSource(class_names, tuple(images), degenerate)


def of_classes(source: DetectionSource, wanted: Sequence[str], class_names: tuple[str, ...]) -> DetectionSource:
    """``source`` with the boxes of the classes ``wanted`` alone, their ids those of ``class_names``.

    Images that show none of them stay, as images without boxes. Errors: DataError for a class that the data lack.
    """
    unknown = [name for name in wanted if name not in source.class_names or name not in class_names]
    if unknown:
        known = ", ".join(name for name in source.class_names if name in class_names)
        raise DataError(f"the classes {', '.join(map(repr, unknown))} are not among the data's; known are {known}")
    ids = np.array([class_names.index(name) if name in wanted else -1 for name in source.class_names], dtype=np.int64)
    images = []
    for image in source.images:
        labels = ids[image.labels]
        kept = labels >= 0
        images.append(
            dataclasses.replace(
                image,
                boxes=image.boxes[kept],
                labels=labels[kept],
                ignored=image.ignored[kept],
                areas=image.areas[kept],
            )
        )
    return DetectionSource(class_names, tuple(images), source.degenerate)


def _checked(entry: RawImage, ids: dict[str, int], size: Size | None) -> tuple[LabelledImage, int]:
    """The picture with its boxes clipped to ``size``, and how many had to go; both are said."""
    given = np.array([box.corners for box in entry.boxes], dtype=np.float32).reshape(-1, 4)
    corners = given
    if size is not None:
        corners = given.clip(0, np.array([*size, *size], dtype=np.float32))
    sides = corners[:, 2:] - corners[:, :2]
    whole = (sides > MIN_SIDE).all(axis=1)
    cut = whole & (np.abs(corners - given) > BORDER).any(axis=1)
    for chosen, what in ((~whole, "dropped"), (cut, "cut at the picture's border")):
        if chosen.any():
            first = given[chosen][0]
            logger.warning(
                "%s: %s %d boxes%s, the first from (%g, %g) to (%g, %g), %s",
                entry.path, what, chosen.sum(), " at most a pixel wide or high" if chosen is not cut else "",
                *first, _cause(first, size),
            )  # fmt: skip
    areas = [
        box.area if box.area is not None else float(np.prod(side)) for box, side in zip(entry.boxes, sides, strict=True)
    ]
    image = LabelledImage(
        entry.path,
        corners[whole],
        np.array([ids[box.class_name] for box in entry.boxes], dtype=np.int64)[whole],
        np.array([box.ignored for box in entry.boxes], dtype=np.bool_)[whole],
        np.array(areas, dtype=np.float32)[whole],
        size,
    )
    return image, int((~whole).sum())


def _cause(box: NDArray[np.float32], size: Size | None) -> str:
    """Why a box is not as it should be."""
    left, top, right, bottom = box.tolist()
    if right < left or bottom < top:
        return "its corners are swapped"
    if size is not None and (left < -BORDER or top < -BORDER or right > size[0] + BORDER or bottom > size[1] + BORDER):
        return f"beyond the picture of {size[0]}x{size[1]} pixels"
    if max(right, bottom) <= MIN_SIDE:
        return "which look like shares of the picture; pixels are expected"
    return "which is hardly a pixel"


def picture_sizes(path: Path) -> tuple[Size, ...]:
    """Width and height of a file as it is seen upright, then as stored; () where it is missing or no picture."""
    try:
        with Image.open(path) as image:
            return upright_size(image), image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return ()


def names_of(raw: Sequence[RawImage], given: tuple[str, ...] | None) -> tuple[str, ...]:
    """``given``, or every class that occurs, in alphabetical order."""
    return given or tuple(sorted({box.class_name for entry in raw for box in entry.boxes}))


def check_names(names: Sequence[str], where: str) -> None:
    """Errors: DataError where a class name stands twice, since its labels could mean either."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{where} names the class {', '.join(map(repr, twice))} more than once; names must differ")


def split_by_seed(stems: list[str], split: str, root: Path) -> list[str]:
    """Those of ``stems`` in "train", "val" (a fifth, drawn once and for all with a fixed seed) or "all"."""
    if split not in ("train", "val", "all"):
        raise DataError(f"{root} has no splits of its own; its splits are train, val and all, not {split!r}")
    order = np.random.default_rng(0).permutation(len(stems))
    held_out = {stems[place] for place in order[: len(stems) // 5]}
    return [stem for stem in stems if split == "all" or (stem in held_out) == (split == "val")]
