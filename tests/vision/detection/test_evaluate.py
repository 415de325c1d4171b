"""Average precision: by hand, and against pycocotools where the definitions coincide."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vision.data.detection_sources import open_detection
from vision.detection import Detections
from vision.detection.boxes import box_iou
from vision.detection.coco import evaluate_coco
from vision.detection.evaluate import Curve, Truth, average_precisions, match_class, mean_present
from vision.detection.report import NOBODY, confusion_of


def truth(boxes: list[list[float]], class_ids: list[int], ignored: list[bool] | None = None) -> Truth:
    return Truth(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(class_ids, dtype=np.int64),
        np.array(ignored or [False] * len(boxes), dtype=np.bool_),
    )


def found(boxes: list[list[float]], scores: list[float], class_ids: list[int]) -> Detections:
    return Detections(torch.tensor(boxes).view(-1, 4), torch.tensor(scores), torch.tensor(class_ids, dtype=torch.long))


A, B, FAR = [0.0, 0, 10, 10], [20.0, 20, 40, 40], [60.0, 60, 70, 70]


def test_perfect_answers_are_worth_one_and_swapped_classes_nothing() -> None:
    truths = [truth([A, B], [0, 1]), truth([], [])]
    perfect = [found([A, B], [0.9, 0.8], [0, 1]), found([], [], [])]
    swapped = [found([A, B], [0.9, 0.8], [1, 0]), found([], [], [])]
    assert average_precisions(perfect, truths, 2) == [1, 1]
    assert average_precisions(swapped, truths, 2) == [0, 0]
    figures, per_class = evaluate_coco(perfect, truths, ["a", "b"])
    assert (figures.ap, figures.ap50, per_class) == (pytest.approx(1), pytest.approx(1), pytest.approx([1, 1]))
    assert evaluate_coco(swapped, truths, ["a", "b"])[0].ap == 0


def test_a_second_hit_is_wrong_and_an_ignored_box_counts_for_nothing() -> None:
    truths = [truth([A, B], [0, 0], [False, True])]
    detections = [found([B, A, A, FAR], [0.9, 0.8, 0.7, 0.6], [0, 0, 0, 0])]
    curve = match_class(detections, truths, 0).curve(0.5)
    assert curve.num_boxes == 1
    assert curve.scores.tolist() == pytest.approx([0.8, 0.7, 0.6])
    assert curve.precision.tolist() == pytest.approx([1, 1 / 2, 1 / 3])
    assert curve.recall.tolist() == [1, 1, 1]


def test_the_better_scored_of_two_hits_counts_whatever_their_overlap() -> None:
    nearly = [0.0, 0, 10, 8]
    curve = match_class([found([A, nearly], [0.5, 0.9], [0, 0])], [truth([A, B], [0, 0])], 0).curve(0.5)
    assert curve.precision.tolist() == [1, 0.5]
    assert curve.recall.tolist() == [0.5, 0.5]


def test_overlap_must_exceed_the_threshold() -> None:
    half, detections = [truth([[0, 0, 10, 10]], [0])], [found([[0.0, 0, 10, 6]], [0.9], [0])]
    assert [average_precisions(detections, half, 1, overlap)[0] for overlap in (0.5, 0.6, 0.7)] == [1, 0, 0]


def test_area_and_eleven_points_of_a_known_curve() -> None:
    """Right, wrong, right, with three boxes to find: precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3."""
    curve = Curve(np.array([0.9, 0.8, 0.7]), np.array([1 / 3, 1 / 3, 2 / 3]), np.array([1, 1 / 2, 2 / 3]), 3)
    assert curve.area() == pytest.approx(1 / 3 + 2 / 9)
    assert curve.interpolated() == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)  # recalls 0 to 0.3, then 0.4 to 0.6


def test_classes_without_boxes_are_left_out_of_the_mean() -> None:
    values = average_precisions([found([A], [0.9], [0])], [truth([A], [0])], 2)
    assert values[0] == 1 and np.isnan(values[1])
    assert mean_present(values) == 1
    assert mean_present([float("nan")]) == 0


def test_finding_nothing_is_worth_nothing() -> None:
    nothing, truths = [found([], [], [])], [truth([A], [0])]
    assert average_precisions(nothing, truths, 1) == [0]
    figures, per_class = evaluate_coco(nothing, truths, ["a", "b"])
    assert (figures.ap, figures.ap_large, per_class[0]) == (0, None, 0)
    assert np.isnan(per_class[1])


def scatter(truths: list[Truth], num_classes: int, seed: int) -> list[Detections]:
    """Shifted true boxes, some missing, some twice, some of another class, and boxes anywhere."""
    generator = np.random.default_rng(seed)
    answers = []
    for one in truths:
        boxes, class_ids = [], []
        for box, class_id in zip(one.boxes, one.class_ids, strict=True):
            for _ in range(generator.choice([0, 1, 1, 1, 2])):
                sides = np.tile(box[2:] - box[:2], 2)
                boxes.append(box + generator.normal(0, 0.12, 4) * sides)
                class_ids.append(class_id if generator.random() < 0.85 else generator.integers(num_classes))
        for _ in range(3):
            corner = generator.uniform(0, 300, 2)
            boxes.append(np.concatenate([corner, corner + generator.uniform(10, 200, 2)]))
            class_ids.append(generator.integers(num_classes))
        scores = torch.from_numpy(generator.permutation(len(boxes)) / 1000 + generator.uniform(0, 0.0005))
        answers.append(Detections(torch.tensor(np.array(boxes), dtype=torch.float32), scores, torch.tensor(class_ids)))
    return answers


def rivals(boxes: Tensor) -> bool:
    """Whether some detection could answer for two of these boxes: there VOC and COCO match by different rules."""
    return bool((box_iou(boxes, boxes) - torch.eye(len(boxes)) > 0.15).any())


def without_rivals(truths: list[Truth]) -> list[Truth]:
    return [
        one
        for one in truths
        if not one.ignored.any()
        and not any(rivals(torch.from_numpy(one.boxes[one.class_ids == k])) for k in set(one.class_ids.tolist()))
    ]


def assert_agreement(truths: list[Truth], num_classes: int) -> None:
    detections = scatter(truths, num_classes, seed=3)
    names = [str(k) for k in range(num_classes)]
    _, expected = evaluate_coco(detections, truths, names)
    ours = [match_class(detections, truths, k).curve(0.5).interpolated(101) for k in range(num_classes)]
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    present = [value for value in ours if not np.isnan(value)]
    assert 0.3 < np.mean(present) < 0.95, "the comparison must not be trivial"


def test_agrees_with_pycocotools_on_random_scenes() -> None:
    pytest.importorskip("pycocotools")
    generator = np.random.default_rng(0)
    truths = []
    for _ in range(60):
        corners = generator.uniform(0, 250, (5, 2))
        boxes = np.concatenate([corners, corners + generator.uniform(20, 120, (5, 2))], axis=1)
        truths.append(truth(boxes.tolist(), generator.integers(3, size=5).tolist()))
    kept = without_rivals(truths)
    assert len(kept) > 20
    assert_agreement(kept, 3)


def test_agrees_with_pycocotools_on_the_coco_sample(larger_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    archive = larger_data / "detection" / "coco_permissive33.tar.gz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    root = tmp_path / "coco_permissive"
    sources = [open_detection("coco", root, split) for split in ("train2017", "val2017")]
    assert sum(len(source.images) for source in sources) == 33
    names = json.loads((root / "instances_val2017.json").read_text())["categories"]
    assert len(sources[0].class_names) == len(names) == 80
    truths = [Truth(image.boxes, image.labels, image.ignored) for source in sources for image in source.images]
    kept = without_rivals(truths)
    assert len(kept) > 12
    assert_agreement(kept, 80)


def test_confusion_pairs_boxes_once_and_tells_what_was_missed_and_what_was_nothing() -> None:
    near = [21.0, 20, 41, 40]
    truths = [truth([A, B, FAR], [0, 1, 0], [False, False, True]), truth([A], [1])]
    seen = [
        found([B, near, FAR, [80.0, 80, 90, 90]], [0.9, 0.8, 0.9, 0.7], [0, 1, 1, 1]),  # B twice, as 0 and as 1
        found([A], [0.3], [1]),  # below the default threshold
    ]
    assert confusion_of(seen, truths, ["a", "b"]) == {
        "a": {NOBODY: 1},
        "b": {"a": 1, NOBODY: 1},
        NOBODY: {"b": 2},
    }
