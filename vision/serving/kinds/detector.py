"""Detectors: boxes with classes and scores, by falling score."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vision.data.view import Resize, View, fitted, render, tiles, whole_image
from vision.images import ImageError, LabelledBox, Picture, draw_boxes
from vision.serving.answers import BOX, CLASS_ID, CLASS_NAME, SCORE, record, several
from vision.serving.batch import MAX_ROWS
from vision.serving.protocol import (
    Answer,
    Answering,
    Ask,
    Card,
    Floats,
    Kind,
    Model,
    ModelInfo,
    OptionError,
    Options,
    Traced,
    option,
)
from vision.serving.shapes import BOX_SHAPES

if TYPE_CHECKING:
    from torch import nn

MIN_SCORE = 1e-3
TAKEN = -1.0
# Above it no box can stay that overlaps a better one of its class by half: Soft-NMS has taken half its score.
DEFAULT_SCORE_THRESHOLD = 0.5
MAX_ID_DIGITS, SHOWN_CLASSES, MAX_SHOWN = 9, 20, 80
# Neighbouring tiles share this much of a side: what is smaller is whole in one of them.
TILE_OVERLAP = 0.2
MAX_TILES, MAX_CANDIDATES = 256, 20_000
EDGE_PX = 1.5  # of a tile as the network sees it: a box that ends so near its border was cut by it


@dataclass(frozen=True)
class DetectionOptions(Options):
    """What of the detections is wanted. ``classes`` are names or ids; ``checked`` makes ids of them."""

    score_threshold: float = option(DEFAULT_SCORE_THRESHOLD, "Lowest score.", ge=0, le=1, flag="threshold")
    max_detections: int = option(100, "Most detections of an image.", ge=1, le=1000)
    classes: tuple[str | int, ...] | None = option(
        None, "Names or ids of the classes that are wanted; nothing: all.", min_length=1, max_length=256,
        parse=lambda text: tuple(part.strip() for part in text.split(",")),
    )  # fmt: skip
    class_agnostic: bool = option(False, "Let a box fall to a better one of another class as well.")
    tile: int | None = option(
        None, "Look at squares of so many pixels one by one as well: small objects in large pictures.", ge=64, le=16_384
    )

    def checked(self, info: ModelInfo, place: str = "") -> DetectionOptions:
        """Ids for names. Errors: OptionError for a class the model lacks."""
        if self.classes is None:
            return self
        return dataclasses.replace(self, classes=tuple(class_id(entry, info, place) for entry in self.classes))


def numbered(entry: Answer) -> str:
    """The number of a thing that is followed through a video, to stand behind its label."""
    return f" #{entry['track_id']}" if entry.get("track_id") is not None else ""


def class_id(entry: str | int, info: ModelInfo, place: str) -> int:
    """A class by name, or by id."""
    if entry in info.class_names:
        return info.class_names.index(str(entry))
    digits = str(entry) if isinstance(entry, str) or entry < 10**MAX_ID_DIGITS else ""
    if digits.isdecimal() and len(digits) <= MAX_ID_DIGITS and int(digits) < len(info.class_names):
        return int(digits)
    known = ", ".join(info.class_names[:SHOWN_CLASSES]) + (", ..." if len(info.class_names) > SHOWN_CLASSES else "")
    shown = repr(entry) if isinstance(entry, str) or digits else "a number far too large"
    if len(shown) > MAX_SHOWN:
        shown = shown[: MAX_SHOWN - 3] + "..."
    raise OptionError(f"classes{place}", f"classes holds {shown}; {info.name} knows {known}")


@dataclass(frozen=True)
class DetectorCard(Card):
    """``soft``: what overlaps a better box of its class loses score (Soft-NMS), and does not fall."""

    resize: Resize
    soft: bool
    nms_threshold: float
    score_threshold: float


class DetectorKind(Kind):
    """Answers ``{"detections": [{box, score, class_id, class_name}, ...]}``, x1 y1 x2 y2 in the original's pixels."""

    name: ClassVar = "detector"
    format: ClassVar = "dovetail-detector"
    route: ClassVar = "detections"
    noun: ClassVar = "vision.detection"
    id_prefix: ClassVar = "det"
    summary: ClassVar = "Detect objects: class, score and box in pixels, x1 y1 x2 y2."
    options: ClassVar = DetectionOptions
    schema: ClassVar = record(
        detections=several("By falling score.", record(box=BOX, score=SCORE, class_id=CLASS_ID, class_name=CLASS_NAME))
    )
    shapes: ClassVar = BOX_SHAPES
    boxes: ClassVar = "detections"

    def read_card(self, config: Mapping[str, Any], digest: str) -> DetectorCard:
        """See ``Kind``."""
        head = config["head"]
        soft = "nms_threshold" not in head
        return DetectorCard(
            tuple(config["class_names"]), config["licence"], config["image_size"], config["description"], digest,
            config["resize"], soft, head.get("soft_nms_threshold", 0.5) if soft else head["nms_threshold"],
            head["score_threshold"],
        )  # fmt: skip

    def module(self, folder: Path) -> nn.Module:
        """See ``Kind``."""
        from vision.detection.checkpoint import load_detector
        from vision.detection.traced import Candidates

        return Candidates(load_detector(folder))

    def trace(self, folder: Path, image_size: int | None = None) -> Traced:
        """See ``Kind``."""
        from vision.detection.traced import trace_detector

        return trace_detector(folder, image_size)

    def full_size(self, options: Mapping[str, Any]) -> bool:
        """For tiles."""
        return options.get("tile") is not None

    def answer(self, model: Model, picture: Picture, options: DetectionOptions) -> Answering:
        """See ``Kind``."""
        card: DetectorCard = model.card
        image, width, height = picture.image, picture.width, picture.height
        parts = parts_of(image.size, options.tile)
        del picture
        found: list[Candidates] = []
        for start in range(0, len(parts), MAX_ROWS):
            views = [fitted(part, card.resize) for part in parts[start : start + MAX_ROWS]]
            squares = [np.asarray(render(image, view, card.image_size)).transpose(2, 0, 1) for view in views]
            if start + MAX_ROWS >= len(parts):
                size = image.size
                del image
            boxes, probabilities = yield Ask(model.network, np.stack(squares))
            found += [likely(*row, card, options) for row in zip(boxes, probabilities, strict=True)]
        joined = found[0] if len(parts) == 1 else joined_parts(found, parts, size, card)
        kept, scores, class_ids = suppress(joined, card, options)
        view = whole_image(width, height, card.resize)
        limits = np.array([width, height, width, height], dtype=np.float32)
        placed = np.clip(view.boxes_out(kept, card.image_size), 0, limits)
        return {
            "detections": [
                {
                    "box": [round(float(value), 3) for value in box],
                    "score": round(float(score), 5),
                    "class_id": int(class_id),
                    "class_name": card.class_names[class_id],
                }
                for box, score, class_id in zip(placed, scores, class_ids, strict=True)
            ]
        }

    def draw(self, image: Image.Image, answer: Answer) -> Image.Image:
        """Boxes with class and score."""
        boxes = [
            LabelledBox(
                tuple(entry["box"]), f"{entry['class_name']} {entry['score']:.2f}{numbered(entry)}", entry["class_id"]
            )
            for entry in answer["detections"]
        ]
        return draw_boxes(image, boxes)

    def rows(self, answer: Answer) -> list[Answer]:
        """Class, score and corners."""
        return [
            ({"track": entry["track_id"]} if "track_id" in entry else {})
            | {"class": entry["class_name"], "score": entry["score"]}
            | dict(zip(("x1", "y1", "x2", "y2"), entry["box"], strict=True))
            for entry in answer["detections"]
        ]


@dataclass(frozen=True)
class Candidates:
    """Boxes [K, 4] in pixels of the network's input, scores [K] and class ids [K], before suppression."""

    boxes: Floats
    scores: Floats
    class_ids: NDArray[np.int64]

    def take(self, rows: NDArray[Any]) -> Candidates:
        """Those of ``rows``, indices or a mask."""
        return Candidates(self.boxes[rows], self.scores[rows], self.class_ids[rows])


def parts_of(size: tuple[int, int], tile: int | None) -> list[View]:
    """The whole image of ``size``, and its tiles where it is larger than one. Errors: ImageError for too many."""
    whole = View(0, 0, *size)
    if tile is None or max(size) <= tile:
        return [whole]
    found = tiles(*size, tile, TILE_OVERLAP)
    if len(found) > MAX_TILES:
        message = f"{size[0]}x{size[1]} pixels make {len(found)} tiles of {tile}; at most {MAX_TILES} are looked at"
        raise ImageError("image_too_large", f"{message}: take larger tiles")
    return [whole, *found]


def likely(boxes: Floats, probabilities: Floats, card: DetectorCard, options: DetectionOptions) -> Candidates:
    """Of the rows [P, 4], [P, classes] of one view the classes that are wanted and likely enough."""
    wanted = probabilities >= max(options.score_threshold, card.score_threshold)
    if options.classes is not None:
        wanted &= np.isin(np.arange(probabilities.shape[1]), options.classes)
    rows, class_ids = np.nonzero(wanted)
    return Candidates(boxes[rows], probabilities[rows, class_ids], class_ids)


def joined_parts(
    found: Sequence[Candidates], parts: Sequence[View], size: tuple[int, int], card: DetectorCard
) -> Candidates:
    """What was found on the whole image and on tiles of it, as of the whole image's view, without what tiles cut.

    A box that a tile's border cuts falls where a box that none cuts has its class and covers half of it: sliced
    inference (Akyon et al., arXiv 2202.06934), with suppression in the place of merging.
    """
    whole = whole_image(*size, card.resize)
    boxes, cut = [], []
    for candidates, part in zip(found, parts, strict=True):
        placed = fitted(part, card.resize).boxes_out(candidates.boxes, card.image_size)
        inner = [part.left > 0, part.top > 0, part.right < size[0], part.bottom < size[1]]
        edges = np.array([part.left, part.top, part.right, part.bottom], dtype=np.float32)
        reach = EDGE_PX * (part.right - part.left) / card.image_size
        cut.append(((np.abs(placed - edges) <= reach) & inner).any(axis=1))
        boxes.append(whole.boxes_in(placed, card.image_size))
    all_cut = np.concatenate(cut)
    scores, class_ids = (
        np.concatenate(values) for values in zip(*((c.scores, c.class_ids) for c in found), strict=True)
    )
    joined = Candidates(np.concatenate(boxes), scores, class_ids)
    if len(scores) > MAX_CANDIDATES:
        best = np.argsort(-scores, kind="stable")[:MAX_CANDIDATES]
        joined, all_cut = joined.take(best), all_cut[best]
    kept = ~all_cut
    uncut = joined.take(kept)
    for row in np.flatnonzero(all_cut):
        same = uncut.boxes[uncut.class_ids == joined.class_ids[row]]
        kept[row] = (shared_areas(joined.boxes[row], same) <= areas(joined.boxes[row : row + 1]) / 2).all()
    return joined.take(kept)


def areas(boxes: Floats) -> Floats:
    """Of boxes [K, 4]; 0 where corners are swapped."""
    found: Floats = np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0)
    return found


def shared_areas(box: Floats, others: Floats) -> Floats:
    """Of one box [4] with others [K, 4]."""
    width = np.minimum(others[:, 2], box[2]) - np.maximum(others[:, 0], box[0])
    height = np.minimum(others[:, 3], box[3]) - np.maximum(others[:, 1], box[1])
    found: Floats = np.maximum(width, 0) * np.maximum(height, 0)
    return found


def suppress(
    found: Candidates, card: DetectorCard, options: DetectionOptions
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """What is wanted of an image's candidates: boxes [K, 4], scores [K] falling, class ids [K]."""
    groups = np.zeros_like(found.class_ids) if options.class_agnostic else found.class_ids
    kept, scores = greedy_nms(found.boxes, found.scores, groups, card.nms_threshold, options.max_detections, card.soft)
    wanted = scores >= options.score_threshold  # Soft-NMS leaves some below it
    kept = kept[wanted]
    return found.boxes[kept], scores[wanted], found.class_ids[kept]


def greedy_nms(
    boxes: Floats, scores: Floats, groups: NDArray[np.int64], threshold: float, max_kept: int, soft: bool
) -> tuple[NDArray[np.int64], Floats]:
    """``vision.detection.boxes.soft_nms``, linear, or ``nms``, group by group, for one image, in numpy."""
    sizes = areas(boxes)
    remaining = scores.copy()
    kept: list[int] = []
    kept_scores: list[float] = []
    while len(kept) < min(max_kept, len(boxes)):
        best = int(remaining.argmax())
        if remaining[best] < MIN_SCORE:
            break
        kept.append(best)
        kept_scores.append(float(remaining[best]))
        shared = shared_areas(boxes[best], boxes)
        overlap = shared / np.maximum(sizes + sizes[best] - shared, np.finfo(np.float32).tiny)
        suffers = (overlap >= threshold if soft else overlap > threshold) & (groups == groups[best])
        remaining *= np.where(suffers, 1 - overlap if soft else 0, 1)
        remaining[best] = TAKEN
    return np.array(kept, dtype=np.int64), np.array(kept_scores, dtype=np.float32)


KIND = DetectorKind()
