import dataclasses
import json
import re
import signal
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from kernels.training import RecipeError, TrainingReport, callbacks
from vision.backbones import UnknownBackboneError, create_backbone
from vision.backbones.checkpoint import save_backbone
from vision.backbones.preprocessing import NORMALIZATIONS
from vision.data.labelled_boxes import DetectionSource
from vision.data.sources import DataError
from vision.detection.checkpoint import load_detector, save_detector
from vision.detection.report import NOBODY, DetectorReport, evaluate_detector, markdown
from vision.detection.thundernet import ThunderNet
from vision.serving import export
from vision.tasks import detection
from vision.tasks.detection import DetectionTask, train_detector
from vision.tasks.detection_recipe import DetectorRecipe, build_model

Recipe = Callable[..., dict[str, Any]]
YOLO = {"architecture": "yolo_v2", "anchors": [[0.8, 0.8], [1.2, 1.2]]}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs; it is tested with the trainer."""
    monkeypatch.setattr(callbacks, "plot", lambda *_: None)


def train(recipe: dict[str, Any], **kwargs: Any) -> TrainingReport:
    return train_detector(recipe, console=Console(file=StringIO()), **kwargs)


def weights(folder: str) -> dict[str, Tensor]:
    return load_detector(Path(folder)).model.state_dict()


@pytest.mark.parametrize(("model", "mining"), [
    ({}, {"regions": "none"}),
    ({}, {"regions": "random", "map": "focal"}),
    ({}, {"regions": "s-ohem", "map": "lrm"}),
    ({"architecture": "yolo_v2"}, {}), (YOLO, {"map": "lrm", "share": 0.5}), (YOLO, {"map": "focal"}),
    ({**YOLO, "head": "small"}, {"map": "random", "share": 0.1, "background_weight": 0.5}),
    ({"context_enhancement": False, "spatial_attention": False}, {}),
], ids=["none", "random-focal", "s-ohem-lrm", "yolo", "yolo-lrm", "yolo-focal", "yolo-random", "bare"])  # fmt: skip
def test_every_miner_trains_saves_and_evaluates(
    detector_recipe: Recipe, tmp_path: Path, model: dict[str, Any], mining: dict[str, Any]
) -> None:
    report = train(detector_recipe(model=model, mining=mining))
    assert report.finished and report.checkpoint == str(tmp_path / "run" / "model")
    assert {"map50", "map60", "map70", "map", "eval_map50", "eval_loss"} <= report.final.keys()
    assert {"step", "eval_map50", "eval_loss"} <= report.best.keys()
    assert load_detector(Path(report.checkpoint)).config.class_names == ("disc", "square")


def test_the_saved_detector_is_measured_again_alike(
    detector_recipe: Recipe, shapes_folder: Path, tmp_path: Path
) -> None:
    (shapes_folder / "JPEGImages" / "val0.jpg").write_bytes(b"broken")
    (shapes_folder / "JPEGImages" / "train0.jpg").write_bytes(b"")
    report = train(detector_recipe(training={"steps": 3}, model={"licence": "MIT"}))
    assert report.final["skipped_images"] == 1, "three batches of four see each of the twelve images once"
    again = evaluate_detector(Path(report.checkpoint), "voc", shapes_folder, "val", output=tmp_path / "out")
    assert again.map50 == report.final["map50"]
    assert (again.images, len(again.skipped)) == (5, 1) and "val0.jpg" in again.skipped[0]
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["per_class"]["disc"]["boxes"] == again.per_class["disc"].boxes > 0
    assert (tmp_path / "out" / "precision_recall.png").stat().st_size > 1000
    assert len(list((tmp_path / "out").glob("val*.jpg"))) == 5
    assert "| disc |" in markdown(again)
    discs = evaluate_detector(Path(report.checkpoint), "voc", shapes_folder, "val", classes=["disc"])
    assert discs.per_class == {"disc": again.per_class["disc"]} and set(discs.confusion) <= {"disc", NOBODY}
    assert discs.map50 == pytest.approx(discs.per_class["disc"].ap50)


def no_images(*class_names: str) -> DetectionSource:
    return DetectionSource(class_names, (), 0)


def interrupt_training_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    original = DetectionTask.forward

    def forward(self: DetectionTask, **batch: Tensor) -> dict[str, Tensor]:
        nonlocal seen
        seen += self.training
        if self.training and seen == step:
            signal.raise_signal(signal.SIGINT)
        return original(self, **batch)

    monkeypatch.setattr(DetectionTask, "forward", forward)


def test_resumed_training_equals_the_uninterrupted_one(
    detector_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a moving average, random regions, several sizes and a schedule that drops."""
    changes: dict[str, dict[str, Any]] = {
        "task": {"ema_decay": 0.8}, "mining": {"regions": "random"}, "data": {"train_sizes": [64, 96]},
    }  # fmt: skip
    drops = {"schedule": "step", "schedule_options": {"at": [2], "factor": 0.1}}
    whole = train(detector_recipe(**changes, training={"output": str(tmp_path / "whole"), **drops}))
    recipe = detector_recipe(**changes, training={"output": str(tmp_path / "broken"), **drops})
    with monkeypatch.context() as patch:
        interrupt_training_at(2, patch)
        assert not train(recipe).finished
    resumed = train(recipe, resume=True)
    expected = weights(whole.checkpoint)
    assert all(torch.equal(value, expected[key]) for key, value in weights(resumed.checkpoint).items())
    assert resumed.final["learning_rate"] == pytest.approx(3e-4)


def test_a_batch_is_brought_to_one_of_the_training_sizes(detector_recipe: Recipe) -> None:
    recipe = DetectorRecipe.parse(detector_recipe(data={"train_sizes": [64, 96, 128]}))
    task = DetectionTask(build_model(recipe, no_images("a"))[0], recipe)
    boxes = torch.tensor([[[32.0, 32, 64, 128]]])
    sizes = set()
    for seed in range(12):
        torch.manual_seed(seed)
        images, scaled = task.resize(torch.zeros(1, 3, 128, 128), boxes)
        sizes.add(images.shape[-1])
        assert torch.equal(scaled, boxes * images.shape[-1] / 128)
    assert sizes == {64, 96, 128}


def test_ignored_boxes_and_padding_do_not_reach_the_losses(detector_recipe: Recipe) -> None:
    recipe = DetectorRecipe.parse(detector_recipe())
    torch.manual_seed(0)
    task = DetectionTask(build_model(recipe, no_images("a", "b"))[0], recipe).eval()
    batch = {
        "images": torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8),
        "boxes": torch.tensor([[[10.0, 10, 50, 50], [60, 60, 90, 90]], [[20, 20, 70, 70], [0, 0, 0, 0]]]),
        "labels": torch.tensor([[0, 1], [1, -1]]),
        "ignored": torch.tensor([[False, True], [False, False]]),
        "skipped": torch.tensor([0]),
    }
    torch.manual_seed(1)
    with torch.no_grad():
        first = task(**batch)
    batch |= {"boxes": batch["boxes"][:, :1], "labels": batch["labels"][:, :1], "ignored": batch["ignored"][:, :1]}
    torch.manual_seed(1)
    with torch.no_grad():
        assert task(**batch)["loss"] == first["loss"]
    assert [len(truth.boxes) for _, truth in task.found] == [2, 1, 1, 1]
    assert 0 <= task.take_map50() <= 1 and task.found == []


def test_a_trained_backbone_is_taken_over(detector_recipe: Recipe, tmp_path: Path) -> None:
    backbone = create_backbone("fd_mobilenet_x0_25", 5)
    save_backbone(backbone, tmp_path / "backbone")
    recipe = detector_recipe(model={"start_from": str(tmp_path / "backbone")})
    model, _ = build_model(DetectorRecipe.parse(recipe), no_images("a"))
    assert isinstance(model, ThunderNet)
    own = {f"backbone.{key}": value for key, value in backbone.state_dict().items() if not key.startswith("head.")}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in own.items())
    with pytest.raises(RecipeError, match=r"holds fd_mobilenet_x0_25; model\.backbone is 'snet49'"):
        build_model(DetectorRecipe.parse(recipe | {"model": recipe["model"] | {"backbone": "snet49"}}), no_images("a"))


def test_a_detector_starts_from_one_of_other_classes(detector_recipe: Recipe, tmp_path: Path) -> None:
    recipe = DetectorRecipe.parse(detector_recipe())
    first, config = build_model(recipe, no_images("cat", "dog"))
    save_detector(first, config, tmp_path / "first")
    again = detector_recipe(model={"start_from": str(tmp_path / "first")})

    def taken(*names: str, **model: Any) -> set[str]:
        table = again | {"model": again["model"] | model}
        second, _ = build_model(DetectorRecipe.parse(table), no_images(*names))
        own = second.state_dict()
        return {key for key, v in first.state_dict().items() if key in own and torch.equal(own[key], v) and v.ndim > 1}

    everything = {key for key, value in first.state_dict().items() if value.ndim > 1}
    assert taken("cat", "dog") == everything
    assert taken("owl", "eel") == taken("owl") == everything - {"class_logits.weight"}, "rows of other classes"
    features = {key for key in everything if key.startswith("backbone.")}
    assert taken("owl", architecture="yolo_v2", anchors=[[1.0, 1.0]]) >= features
    with pytest.raises(RecipeError, match="holds fd_mobilenet_x0_25"):
        taken("owl", backbone="snet49")


@pytest.mark.parametrize(("changes", "message"), [
    ({"model": {"architecture": "ssd"}}, "architecture is 'ssd'"),
    ({"model": {"anchor_scales": [0]}}, "must hold numbers above 0"),
    ({"model": {"head": "heavy"}}, r"model\.head is 'heavy'"),
    ({"model": {**YOLO, "anchors": [[1.0]]}}, r"model\.anchors must be pairs"),
    ({"model": YOLO, "data": {"image_size": 100}}, "image_size is 100"),
    ({"mining": {"regions": "hard"}}, r"mining\.regions is 'hard'; allowed are none, random, ohem, s-ohem"),
    ({"mining": {"map": "ohem"}}, r"mining\.map is 'ohem'; allowed are none, random, lrm, focal"),
    ({"task": {"ema_decay": 1.0}}, r"task\.ema_decay is 1\.0"),
    ({"augmentation": {"expand": 0.5}}, "expand is 0.5"),
    ({"data": {"kind": "zip"}}, r"data\.kind is 'zip'"),
    ({"network": {}}, "unknown tables network; allowed are model"),
    ({"training": {"schedule": "step"}}, "needs schedule_options"),
])  # fmt: skip
def test_recipes_that_are_refused(detector_recipe: Recipe, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        train(detector_recipe(**changes))


def test_unknown_backbones_and_classes_are_named(detector_recipe: Recipe, shapes_folder: Path) -> None:
    with pytest.raises(UnknownBackboneError, match="'resnet50'; known are snet49"):
        train(detector_recipe(model={"backbone": "resnet50"}))
    with pytest.raises(DataError, match="names the class 'disc'; known are square"):
        train(detector_recipe(data={"class_names": ["square"]}))
    report = train(detector_recipe(training={"steps": 1}))
    annotation = shapes_folder / "Annotations" / "val1.xml"
    annotation.write_text(annotation.read_text().replace("disc", "star").replace("square", "star"))
    with pytest.raises(DataError, match="'star'; known are disc, square"):
        evaluate_detector(Path(report.checkpoint), "voc", shapes_folder, "val")


def test_the_better_of_raw_and_averaged_weights_is_saved(
    detector_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    figures = iter([0.0, 0.4])  # of the average, then of the raw weights
    measure = detection.evaluate_source

    def evaluate(*args: Any) -> DetectorReport:
        return dataclasses.replace(measure(*args), map50=next(figures))

    monkeypatch.setattr(detection, "evaluate_source", evaluate)
    caplog.set_level("INFO")
    report = train(detector_recipe(task={"ema_decay": 0.999}))
    (file,) = Path(report.checkpoint).parent.glob("checkpoint-*/model.safetensors")
    kept, saved = load_file(file), weights(report.checkpoint)
    key = next(key for key in saved if key.endswith("weight"))
    assert report.final["map50"] == 0.4
    assert torch.equal(saved[key], kept[f"model.{key}"])
    assert not torch.equal(saved[key], kept[f"average.averaged.module.{key}"])
    assert "eval_map50" in caplog.text


@pytest.mark.parametrize("figures", [(0.2, 0.8), (0.8, 0.2)], ids=["best", "last"])
def test_the_best_evaluations_detector_is_kept_and_saved_where_it_is_better(
    detector_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, figures: tuple[float, float]
) -> None:
    seen, measured = iter([0.9, 0.1]), iter(figures)  # of both evaluations; of the last weights, then of the best
    measure = detection.evaluate_source
    monkeypatch.setattr(DetectionTask, "take_map50", lambda task: task.found.clear() or next(seen))
    monkeypatch.setattr(
        detection, "evaluate_source", lambda *args: dataclasses.replace(measure(*args), map50=next(measured))
    )
    report = train(detector_recipe(training={"evaluate_every": 2}))
    assert report.best["step"] == 2 and report.final["map50"] == 0.8
    best, last = weights(str(Path(report.checkpoint).parent / "best")), weights(report.checkpoint)
    assert all(torch.equal(last[key], best[key]) for key in best) == (figures[1] == 0.8)


def test_a_detector_that_finds_nothing_is_warned_of(
    detector_recipe: Recipe, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = train(detector_recipe(training={"steps": 1, "learning_rate": 1e-9}))
    assert report.final["training_recall"] == 0
    assert load_detector(Path(report.checkpoint)).config.training_recall == 0
    assert "finds none of the boxes on 12 of its own training images" in caplog.text
    caplog.clear()
    monkeypatch.setattr(export, "require_packages", lambda: None)
    monkeypatch.setattr(export, "write", lambda *_: (_ for _ in ()).throw(export.ExportError("not written")))
    with pytest.raises(export.ExportError, match="not written"):
        export.export_model(Path(report.checkpoint))
    assert "finds none of the boxes on its own training images" in caplog.text


def test_a_checkpoint_of_another_normalization_is_refused(detector_recipe: Recipe, tmp_path: Path) -> None:
    backbone = create_backbone("snet49", 2)
    backbone.preprocessing = dataclasses.replace(backbone.preprocessing, normalization=NORMALIZATIONS["bgr_255"])
    save_backbone(backbone, tmp_path / "trained")
    with pytest.raises(RecipeError, match=r'was trained with .* set data\.normalization = "bgr_255"'):
        train(detector_recipe(model={"backbone": "snet49", "start_from": str(tmp_path / "trained")}))


def flatten_boxes(folder: Path, spared: tuple[str, ...] = ()) -> int:
    """Make every box of the data set a line, but those of ``spared``; how many those of ``train`` are."""
    for file in (folder / "Annotations").glob("*.xml"):
        if file.stem not in spared:
            file.write_text(re.sub(r"<xmax>.*?</xmax>", "<xmax>1</xmax>", file.read_text()))
    return sum(file.read_text().count("<object>") for file in (folder / "Annotations").glob("train*.xml"))


@pytest.mark.parametrize("model", [{}, YOLO], ids=["thundernet", "yolo"])
def test_pictures_without_a_usable_box_train_as_background(
    detector_recipe: Recipe, shapes_folder: Path, model: dict[str, Any]
) -> None:
    dropped = flatten_boxes(shapes_folder, ("train0", "val0"))
    report = train(detector_recipe(model=model, training={"steps": 2}))
    assert dropped - 6 < report.final["degenerate_boxes"] < dropped
    assert all(value.isfinite().all() for value in weights(report.checkpoint).values())


def test_a_set_without_a_usable_box_is_refused(detector_recipe: Recipe, shapes_folder: Path) -> None:
    flatten_boxes(shapes_folder)
    with pytest.raises(DataError, match="no box is left on 12 images"):
        train(detector_recipe())


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, YOLO], ids=["thundernet", "yolo"])
def test_learns_shapes(detector_recipe: Recipe, model: dict[str, Any]) -> None:
    """About a minute each."""
    recipe = detector_recipe(
        model={"backbone": "snet49", **model},
        augmentation={"photometric": False},
        training={"steps": 250, "batch_size": 6, "learning_rate": 2e-3},
    )
    assert train(recipe).final["map50"] > 0.8
