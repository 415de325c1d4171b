"""Images with boxes: VOC's XML, COCO's JSON, YOLO's text files, made scenes, all read into one kind of sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vision.data.coco import open_coco
from vision.data.detection_scenes import needles, shapes
from vision.data.labelled_boxes import DetectionSource
from vision.data.sources import DataError
from vision.data.voc import open_voc
from vision.data.yolo import open_yolo

OpenDetection = Callable[[Path, str, tuple[str, ...] | None], DetectionSource]

DETECTION_SOURCES: dict[str, OpenDetection] = {
    "voc": open_voc,
    "coco": open_coco,
    "yolo": open_yolo,
    "needles": needles,
    "shapes": shapes,
}


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
