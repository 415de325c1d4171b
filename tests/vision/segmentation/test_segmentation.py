"""Segmenters: shapes, the measure, data, training alone and beside a teacher, and what is refused."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional

from kernels.losses import BatchTooSmall
from kernels.training import RecipeError, TrainingReport, callbacks
from vision.data.segmentation import SHAPES, FolderMasks, SegmentationData, ShapeScenes
from vision.data.sources import DataError
from vision.distillation.kd import KDLoss
from vision.distillation.teacher import TeacherError
from vision.segmentation.measure import IGNORED, ConfusionMatrix
from vision.segmentation.pspnet import Segmenter, SegmenterConfig, load_segmenter, save_segmenter
from vision.serving.folder import CheckpointError
from vision.tasks.segmentation import train_segmenter

KD = {"kind": "kd", "weight": 1.0, "temperature": 1.0}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "plot", lambda *_: None)


def recipe(output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"backbone": "fd_mobilenet_x0_25", "width": 16},
        "data": {"image_size": 64, "train_images": 16, "eval_images": 4},
        "training": {
            "output": str(output), "steps": 4, "batch_size": 4, "learning_rate": 3e-3, "log_every": 2, "threads": 1,
        },
    } | changes  # fmt: skip


def train(table: dict[str, Any], **kwargs: Any) -> TrainingReport:
    return train_segmenter(table, console=Console(file=StringIO()), **kwargs)


@pytest.mark.parametrize("size", [64, 72])
def test_logits_have_stride_eight_and_survive_saving(tmp_path: Path, size: int) -> None:
    model = Segmenter(SegmenterConfig("snet49", ("a", "b", "c"), 32)).eval()
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    logits, embedding = model.answer(images)
    assert logits.shape == (2, 3, size // 8, size // 8) and embedding.shape == (2, 32)
    save_segmenter(model, tmp_path)
    assert torch.equal(load_segmenter(tmp_path)(images), logits)


def test_intersection_over_union_by_hand() -> None:
    labels = torch.tensor([[[0, 0, 1, IGNORED], [1, 1, 0, 2]]], dtype=torch.uint8)
    chosen = torch.tensor([[[0, 1, 1, 0], [1, 0, 0, 0]]])
    matrix = ConfusionMatrix(4)
    matrix.add(functional.one_hot(chosen, 4).permute(0, 3, 1, 2).float(), labels)
    report = matrix.report(("zero", "one", "two", "never"))
    assert report.iou == {"zero": 2 / 5, "one": 2 / 4, "two": 0.0, "never": None}
    assert report.mean_iou == pytest.approx(0.3)
    assert report.pixel_accuracy == pytest.approx(4 / 7) and report.rare_iou is None


def test_rare_classes_are_averaged_apart() -> None:
    matrix = ConfusionMatrix(4)
    matrix.counts = torch.tensor([[980, 0, 5, 0], [0, 3, 0, 0], [6, 0, 6, 0], [0, 0, 0, 0]])
    assert matrix.report(("common", "rare", "rarer", "never")).rare_iou == pytest.approx((1 + 6 / 17) / 2)


def test_odds_say_how_often_a_shape_is_drawn() -> None:
    scenes = ShapeScenes(60, 48, 0, (16, 8, 4, 1, 1))
    pixels = np.bincount(np.stack([np.asarray(scenes.read(i)[1]) for i in range(60)]).ravel(), minlength=len(SHAPES))
    assert (pixels[1:4] > 2 * pixels[4:6].max()).all() and pixels[4:6].min() > 0
    with pytest.raises(DataError, match=r"shape_odds is .* above 0 for each of disc, square, triangle, ring, cross"):
        ShapeScenes(60, 48, 0, (1, 1, 0, 1, 1))


def test_scenes_are_functions_of_seed_and_index_and_show_every_class() -> None:
    first, again, other = ShapeScenes(40, 48, 0), ShapeScenes(40, 48, 0), ShapeScenes(40, 48, 1)
    pixels = [np.asarray(scenes.read(3)[0]) for scenes in (first, again, other)]
    assert np.array_equal(pixels[0], pixels[1]) and not np.array_equal(pixels[0], pixels[2])
    classes = np.unique(np.stack([np.asarray(first.read(i)[1]) for i in range(40)]))
    assert classes.tolist() == [*range(len(SHAPES)), IGNORED]


def test_mirroring_moves_image_and_mask_together() -> None:
    data = SegmentationData(ShapeScenes(8, 32, 0), 32, mirrored=True)
    plain = SegmentationData(ShapeScenes(8, 32, 0), 32)
    flipped = [not torch.equal(data[i].image, plain[i].image) for i in range(8)]
    assert any(flipped) and not all(flipped)
    for index, moved in enumerate(flipped):
        expected = plain[index].mask.flip(-1) if moved else plain[index].mask
        assert torch.equal(data[index].mask, expected)


def test_a_segmenter_trains_alone_then_teaches(tmp_path: Path) -> None:
    alone = train(recipe(tmp_path / "alone"))
    assert {"mean_iou", "pixel_accuracy"} <= alone.final.keys()
    teacher = {"teacher": {"path": alone.checkpoint}}
    bdd = {"kind": "bdd", "weight": 1.0}
    taught = train(recipe(tmp_path / "taught", terms=[KD, bdd, {"kind": "cckd", "weight": 10.0}], **teacher))
    assert {"kd", "bdd", "cckd", "cross_entropy", "mean_iou"} <= taught.final.keys()


def test_a_segmenter_starts_from_one_of_other_classes(tmp_path: Path) -> None:
    start = Segmenter(SegmenterConfig("fd_mobilenet_x0_25", ("a", "b"), 16))
    save_segmenter(start, tmp_path / "start")
    table = recipe(tmp_path / "run")
    table["model"] |= {"start_from": str(tmp_path / "start")}
    table["training"] |= {"steps": 1, "freeze": ["backbone", "pyramid"]}
    model = load_segmenter(Path(train(table).checkpoint))
    before, after = start.state_dict(), model.state_dict()
    same = {key.partition(".")[0] for key, value in after.items() if value.ndim > 1 and torch.equal(value, before[key])}
    assert same == {"backbone", "pyramid"} and model.config.class_names == SHAPES


def test_a_learnable_scene_is_learnt(tmp_path: Path) -> None:
    table = recipe(tmp_path / "run", data={"image_size": 64, "train_images": 2, "eval_images": 2})
    before = train(table | {"training": table["training"] | {"steps": 2, "output": str(tmp_path / "short")}})
    after = train(table | {"training": table["training"] | {"steps": 30}})
    assert after.final["loss"] < 0.75 * before.final["loss"]


def test_the_pixel_loss_is_that_of_the_rows_and_ignored_pixels_count_nothing() -> None:
    student = torch.randn(2, 3, 4, 5, requires_grad=True)
    teacher, valid = torch.randn(2, 3, 4, 5), torch.rand(2, 4, 5) < 0.6
    loss = KDLoss(2.0)(student, teacher, valid)
    rows = [logits.permute(0, 2, 3, 1)[valid] for logits in (student, teacher)]
    torch.testing.assert_close(loss, KDLoss(2.0)(rows[0], rows[1]))
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.permute(0, 2, 3, 1)[~valid].abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"terms": [KD]}, RecipeError, "belong together"),
        ({"teacher": {"path": "x"}}, RecipeError, "belong together"),
        ({"teacher": {"path": "/nowhere"}, "terms": [KD]}, CheckpointError, "does not exist"),
        ({"teacher": {"path": "x"}, "terms": [{"kind": "dkd", "weight": 1.0}]}, RecipeError, "compare whole images"),
        ({"mask": {}}, RecipeError, "unknown tables mask"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        train(recipe(tmp_path / "run", **changes))


def test_a_batch_of_one_cannot_correlate(tmp_path: Path) -> None:
    table = recipe(tmp_path / "run", teacher={"path": "x"}, terms=[{"kind": "cckd", "weight": 1.0}])
    table["training"]["batch_size"] = 1
    with pytest.raises(BatchTooSmall):
        train(table)


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    save_segmenter(Segmenter(SegmenterConfig("snet49", ("sky", "ground"), 16)), tmp_path / "teacher")
    with pytest.raises(TeacherError, match="has 2 classes, the student's data 6"):
        train(recipe(tmp_path / "run", teacher={"path": str(tmp_path / "teacher")}, terms=[KD]))


class TestFolders:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for folder in ("images", "masks"):
            (tmp_path / "train" / folder).mkdir(parents=True)
        (tmp_path / "classes.json").write_text(json.dumps(["sky", "ground"]))
        Image.new("RGB", (8, 6), (1, 2, 3)).save(tmp_path / "train" / "images" / "a.jpg")
        mask = Image.fromarray(np.array([[0, 1, 255, 0, 0, 1, 1, 1]] * 6, dtype=np.uint8))
        mask.save(tmp_path / "train" / "masks" / "a.png")
        return tmp_path

    def test_pairs_are_read(self, root: Path) -> None:
        source = FolderMasks(root, "train")
        image, mask = source.read(0)
        assert (len(source), source.class_names, image.size) == (1, ("sky", "ground"), (8, 6))
        assert np.unique(np.asarray(mask)).tolist() == [0, 1, 255]

    def test_unknown_classes_and_sizes_are_refused(self, root: Path) -> None:
        Image.new("L", (8, 6), 7).save(root / "train" / "masks" / "a.png")
        with pytest.raises(DataError, match=r"classes \[7\]"):
            FolderMasks(root, "train").read(0)
        Image.new("L", (4, 6), 1).save(root / "train" / "masks" / "a.png")
        with pytest.raises(DataError, match=r"\(4, 6\)"):
            FolderMasks(root, "train").read(0)

    @pytest.mark.parametrize(("values", "message"), [
        ([0, 255], r"values \[0, 255\] only.*write class 1 as 1"), ([0], r"values \[0\] only; classes are 0 to 1"),
    ])  # fmt: skip
    def test_masks_without_any_object_are_refused(self, root: Path, values: list[int], message: str) -> None:
        pixels = np.resize(np.array(values, dtype=np.uint8), (6, 8))
        Image.fromarray(pixels).save(root / "train" / "masks" / "a.png")
        with pytest.raises(DataError, match=message):
            FolderMasks(root, "train")

    def test_only_numbers_are_classes(self, root: Path) -> None:
        file = root / "train" / "masks" / "a.png"
        Image.new("RGB", (8, 6), (1, 0, 0)).save(file)
        with pytest.raises(DataError, match="is a picture in colours"):
            FolderMasks(root, "train")
        Image.new("RGB", (8, 6), (1, 1, 1)).save(file)
        assert np.unique(np.asarray(FolderMasks(root, "train").read(0)[1])).tolist() == [1]
        Image.new("1", (8, 6), 1).save(file)
        assert np.unique(np.asarray(FolderMasks(root, "train").read(0)[1])).tolist() == [1]

    def test_images_that_would_share_a_mask_are_refused(self, root: Path) -> None:
        Image.new("RGB", (8, 6)).save(root / "train" / "images" / "a.png")
        with pytest.raises(DataError, match="would share the labels of a"):
            FolderMasks(root, "train")

    def test_missing_parts_are_named(self, root: Path) -> None:
        with pytest.raises(DataError, match="holds no images"):
            FolderMasks(root, "val")
        (root / "train" / "masks" / "a.png").unlink()
        with pytest.raises(DataError, match=r"lacks the masks of 1 images, the first: a\.jpg"):
            FolderMasks(root, "train")
        (root / "classes.json").unlink()
        with pytest.raises(DataError, match=r"classes\.json"):
            FolderMasks(root, "train")
