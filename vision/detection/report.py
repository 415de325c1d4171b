"""A saved detector measured over a data set: figures, table, curves and pictures."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from vision.data.detection_sources import open_detection
from vision.data.labelled_boxes import DetectionSource, LabelledImage, of_classes
from vision.data.sources import DataError, UnreadableImageError
from vision.detection.boxes import box_iou
from vision.detection.checkpoint import load_detector
from vision.detection.coco import CocoFigures, evaluate_coco
from vision.detection.detections import Detections
from vision.detection.detector import NOTHING_FOUND, LoadedDetector, detect_images
from vision.detection.evaluate import OVERLAPS, ClassDetections, Truth, match_class, mean_present
from vision.detection.pictures import draw_comparison, plot_curves
from vision.serving.kinds.detector import DEFAULT_SCORE_THRESHOLD

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"
CURVES_FILE = "precision_recall.png"
PICTURES = 8
NOBODY = "(nothing)"
RECALL_IMAGES = 32


@dataclass(frozen=True)
class ClassFigures:
    """One class: boxes to find, and the area under precision and recall at each overlap; None without boxes."""

    boxes: int
    ap50: float | None
    ap60: float | None
    ap70: float | None


@dataclass(frozen=True)
class DetectorReport:
    """How good a detector is over ``images`` images.

    ``map50``, ``map60``, ``map70`` are means over the classes of VOC's area measure at overlaps of 0.5, 0.6 and 0.7,
    ``voc07_map50`` is the 11-point measure of VOC 2007. ``map`` and ``coco`` are COCO's, None without pycocotools.
    ``skipped`` names images that could not be read; ``degenerate`` counts true boxes that were dropped. ``confusion``
    counts for each true class as what its boxes were found at the default threshold (see ``confusion_of``).
    """

    map: float | None
    map50: float
    map60: float
    map70: float
    voc07_map50: float
    per_class: dict[str, ClassFigures]
    coco: CocoFigures | None
    images: int
    degenerate: int
    skipped: tuple[str, ...]
    confusion: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Findings:
    """Every readable image of a split with what was found on it."""

    images: tuple[LabelledImage, ...]
    detections: tuple[Detections, ...]
    skipped: tuple[str, ...]

    @property
    def truths(self) -> list[Truth]:
        """What should have been found."""
        return [Truth(image.boxes, image.labels, image.ignored) for image in self.images]

    def of_classes(self, class_ids: Sequence[int]) -> Findings:
        """Without what was found of other classes."""
        wanted = torch.tensor(class_ids)
        kept = [torch.isin(found.class_ids, wanted) for found in self.detections]
        detections = tuple(
            Detections(found.boxes[rows], found.scores[rows], found.class_ids[rows])
            for found, rows in zip(self.detections, kept, strict=True)
        )
        return dataclasses.replace(self, detections=detections)


def evaluate_detector(
    checkpoint: Path,
    kind: str,
    root: Path,
    split: str,
    *,
    output: Path | None = None,
    batch_size: int = 8,
    classes: Sequence[str] = (),
) -> DetectorReport:
    """Measure the detector saved in ``checkpoint`` over ``split`` of the data of ``kind`` in ``root``.

    With ``classes`` these alone are looked for and counted, and the data may hold others. With ``output`` the folder
    receives the report, the curves and a few pictures. Errors: CheckpointError; DataError where the data hold a class
    that the detector does not know.
    """
    loaded = load_detector(checkpoint)
    names = loaded.config.class_names
    source = open_detection(kind, root, split, None if classes else names)
    if classes:
        source = of_classes(source, classes, names)
    return evaluate_source(loaded, source, output=output, batch_size=batch_size, classes=classes)


def evaluate_source(
    loaded: LoadedDetector,
    source: DetectionSource,
    *,
    output: Path | None = None,
    batch_size: int = 8,
    classes: Sequence[str] = (),
) -> DetectorReport:
    """Measure ``loaded``, where it is, over all images of ``source``; ``classes`` names those to count, all by default.

    Errors: DataError where no image can be read.
    """
    findings = find_all(loaded, source, batch_size)
    if classes:
        findings = findings.of_classes([source.class_names.index(name) for name in classes])
    truths, names = findings.truths, source.class_names
    matches = {
        name: match_class(findings.detections, truths, class_id)
        for class_id, name in enumerate(names)
        if not classes or name in classes
    }
    coco = None
    if find_spec("pycocotools") is not None:
        coco, _ = evaluate_coco(findings.detections, truths, names, [image.areas for image in findings.images])
    else:
        logger.warning("pycocotools is not installed (extra train): COCO's figures are left out")
    maps = [mean_present([match.curve(overlap).area() for match in matches.values()]) for overlap in OVERLAPS]
    report = DetectorReport(
        map=None if coco is None else coco.ap,
        map50=maps[0],
        map60=maps[1],
        map70=maps[2],
        voc07_map50=mean_present([match.curve(0.5).interpolated() for match in matches.values()]),
        per_class={name: class_figures(match) for name, match in matches.items()},
        coco=coco,
        images=len(findings.images),
        degenerate=source.degenerate,
        skipped=findings.skipped,
        confusion=confusion_of(findings.detections, truths, names),
    )
    if output is not None:
        write_report(report, findings, matches, names, output)
    return report


def training_recall(loaded: LoadedDetector, source: DetectionSource) -> float:
    """Share of the boxes of a few training images that are found as it will be used by default; 0 is warned of."""
    with_boxes = [image for image in source.images if not image.ignored.all()][:RECALL_IMAGES]
    findings = find_all(loaded, dataclasses.replace(source, images=tuple(with_boxes)), batch_size=8)
    sure = [found.above(DEFAULT_SCORE_THRESHOLD) for found in findings.detections]
    curves = [match_class(sure, findings.truths, c).curve(0.5) for c in range(len(source.class_names))]
    found = sum(curve.recall[-1] * curve.num_boxes for curve in curves if len(curve.recall))
    recall = float(found / max(1, sum(curve.num_boxes for curve in curves)))
    if recall == 0:
        logger.warning(NOTHING_FOUND, f"boxes on {len(findings.images)} of its own training images")
    return recall


def find_all(loaded: LoadedDetector, source: DetectionSource, batch_size: int) -> Findings:
    """Run the detector over all images; unreadable ones are named and left out."""
    images: list[LabelledImage] = []
    detections: list[Detections] = []
    skipped: list[str] = []
    for start in range(0, len(source.images), batch_size):
        pictures = []
        for image in source.images[start : start + batch_size]:
            try:
                pictures.append(image.read())
                images.append(image)
            except UnreadableImageError as error:
                logger.warning("skipped: %s", error)
                skipped.append(str(error))
        detections += detect_images(loaded, pictures)
    if not images:
        raise DataError(f"none of the {len(source.images)} images can be read; the first: {skipped[0]}")
    return Findings(tuple(images), tuple(detections), tuple(skipped))


def confusion_of(
    detections: Sequence[Detections], truths: Sequence[Truth], class_names: Sequence[str]
) -> dict[str, dict[str, int]]:
    """True class -> found class -> count, over the boxes that count and detections of at least the default threshold.

    Pairs overlap by more than half, whatever their classes, the largest overlaps first and each box once. A true box
    without partner was found as ``NOBODY``; a detection without one is a box of ``NOBODY`` that was found.
    """
    names = [*class_names, NOBODY]
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for found, truth in zip(detections, truths, strict=True):
        sure = found.above(DEFAULT_SCORE_THRESHOLD)
        overlaps = box_iou(torch.from_numpy(truth.boxes), sure.boxes.float()).numpy()
        true_left, found_left = ~truth.ignored, np.ones(len(sure.scores), dtype=np.bool_)
        for true_id, found_id in zip(*np.unravel_index(np.argsort(-overlaps, axis=None), overlaps.shape), strict=True):
            if overlaps[true_id, found_id] <= OVERLAPS[0]:
                break
            if truth.ignored[true_id]:
                found_left[found_id] = False
            elif true_left[true_id] and found_left[found_id]:
                counts[truth.class_ids[true_id], int(sure.class_ids[found_id])] += 1
                true_left[true_id] = found_left[found_id] = False
        counts[:-1, -1] += np.bincount(truth.class_ids[true_left], minlength=len(class_names))
        counts[-1, :-1] += np.bincount(sure.class_ids.numpy()[found_left], minlength=len(class_names))
    return {
        name: {other: int(count) for other, count in zip(names, row, strict=True) if count}
        for name, row in zip(names, counts, strict=True)
        if row.any()
    }


def class_figures(match: ClassDetections) -> ClassFigures:
    """The row of one class."""
    areas = [match.curve(overlap).area() for overlap in OVERLAPS]
    boxes = match.curve(0.5).num_boxes
    return ClassFigures(boxes, *(area if boxes else None for area in areas))


def write_report(
    report: DetectorReport,
    findings: Findings,
    matches: dict[str, ClassDetections],
    class_names: Sequence[str],
    output: Path,
) -> None:
    """``report.json``, ``precision_recall.png`` (with matplotlib) and pictures of evenly spread images."""
    output.mkdir(parents=True, exist_ok=True)
    (output / REPORT_FILE).write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n", encoding="utf-8")
    if find_spec("matplotlib") is not None:
        plot_curves({name: match.curve(0.5) for name, match in matches.items()}, output / CURVES_FILE)
    truths, count = findings.truths, len(findings.images)
    for place in range(0, count, max(1, count // PICTURES)):
        image = findings.images[place]
        picture = draw_comparison(image.read(), findings.detections[place], truths[place], class_names)
        picture.save(output / f"{image.path.stem}.jpg", quality=88)


def markdown(report: DetectorReport) -> str:
    """The table of classes."""
    lines = ["| class | boxes | AP50 | AP60 | AP70 |", "|---|---|---|---|---|"]
    for name, row in report.per_class.items():
        cells = ["-" if value is None else f"{value:.3f}" for value in (row.ap50, row.ap60, row.ap70)]
        lines.append(f"| {name} | {row.boxes} | {' | '.join(cells)} |")
    lines.append(f"| mean | | {report.map50:.3f} | {report.map60:.3f} | {report.map70:.3f} |")
    return "\n".join(lines)
