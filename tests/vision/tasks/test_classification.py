import json
import signal
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from kernels.diagonalwise import DiagonalwiseConv2d
from kernels.training import RecipeError, TrainingReport, callbacks
from vision.backbones import create_backbone
from vision.backbones.checkpoint import load_backbone, save_backbone
from vision.data.sources import DataError
from vision.measure.classification import ClassifierReport, evaluate_classifier
from vision.segmentation.pspnet import Segmenter, SegmenterConfig, save_segmenter
from vision.tasks import classification
from vision.tasks.classification import ClassificationTask, TaskOptions, train_classifier

Recipe = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs; it is tested with the trainer."""
    monkeypatch.setattr(callbacks, "plot", lambda *_: None)


def train(recipe: dict[str, Any], **kwargs: Any) -> TrainingReport:
    return train_classifier(recipe, console=Console(file=StringIO()), **kwargs)


def weights(folder: str) -> dict[str, Tensor]:
    return load_backbone(Path(folder)).state_dict()


def interrupt_training_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    original = ClassificationTask.forward

    def forward(self: ClassificationTask, **batch: Tensor) -> dict[str, Tensor]:
        nonlocal seen
        seen += self.training
        if self.training and seen == step:
            signal.raise_signal(signal.SIGINT)
        return original(self, **batch)

    monkeypatch.setattr(ClassificationTask, "forward", forward)


def test_a_recipe_trains_saves_and_evaluates(tiny_recipe: Recipe, image_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        model={"backbone": "snet49"},
        data={"normalization": "bgr_255"},
        task={"reestimate_batches": 4},
        training={"steps": 30, "clip_norm": 0.0},
    )
    report = train(recipe)
    assert report.finished
    assert report.checkpoint == str(tmp_path / "run" / "model")
    assert report.final["top1"] > 0.9
    assert (report.final["top5"], report.final["skipped_images"]) == (1.0, 0)
    again = evaluate_classifier(Path(report.checkpoint), "folder", image_folder, "val")
    assert (again.top1, again.top5, again.images) == (report.final["top1"], 1.0, 12)
    model = load_backbone(Path(report.checkpoint))
    assert (model.class_names, model.num_classes) == (("blue", "green", "red"), 3)
    assert (model.preprocessing.image_size, model.preprocessing.resize) == (32, 36)
    assert model.normalization.channel_order == "bgr"
    rows = json.loads((tmp_path / "run" / "training.json").read_text())
    assert {"top1", "top5", "loss"} <= rows[0].keys()


@pytest.mark.parametrize("task", [{}, {"mixup": 0.4, "ema_decay": 0.8}], ids=["plain", "mixup-ema"])
def test_resumed_training_equals_the_uninterrupted_one(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: dict[str, Any]
) -> None:
    whole = train(tiny_recipe(task=task, training={"output": str(tmp_path / "whole")}))
    recipe = tiny_recipe(task=task, training={"output": str(tmp_path / "broken")})
    with monkeypatch.context() as patch:
        interrupt_training_at(4, patch)
        broken = train(recipe)
    assert not broken.finished
    assert Path(broken.checkpoint).name == "checkpoint-4"
    resumed = train(recipe, resume=True)
    assert resumed.finished
    expected = weights(whole.checkpoint)
    assert all(torch.equal(value, expected[key]) for key, value in weights(resumed.checkpoint).items())
    assert resumed.final["top1"] == whole.final["top1"] == whole.final["eval_top1"]


def test_unreadable_images_are_counted(tiny_recipe: Recipe, image_folder: Path) -> None:
    (image_folder / "train" / "red" / "3.png").write_bytes(b"broken")
    (image_folder / "val" / "blue" / "0.png").write_bytes(b"")
    report = train(tiny_recipe(training={"steps": 5}))
    assert report.final["skipped_images"] == 1, "five batches of eight see each of the 36 images once, one short"


def test_the_average_is_what_is_saved_where_it_is_as_good(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """An average that forgets at once follows the weights closely, but is not them."""
    monkeypatch.setattr(classification, "evaluate_model", lambda *_: ClassifierReport(0.5, 0.5, 1.0, 1, (), {}))
    plain = train(tiny_recipe())
    recipe = tiny_recipe(task={"ema_decay": 0.01}, training={"output": str(Path(plain.checkpoint).parent / "ema")})
    a, b = weights(plain.checkpoint), weights(train(recipe).checkpoint)
    assert not torch.equal(a["stem.0.weight"], b["stem.0.weight"])
    torch.testing.assert_close(a["stem.0.weight"], b["stem.0.weight"], rtol=0.01, atol=1e-3)


def test_raw_weights_are_saved_where_they_are_better(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decay that keeps the first step's weights for good, and figures that favour whatever is not it."""
    figures = iter([0.2, 0.9])
    monkeypatch.setattr(
        classification, "evaluate_model", lambda *_: ClassifierReport(next(figures), 1.0, 1.0, 1, (), {})
    )
    report = train(tiny_recipe(task={"ema_decay": 0.999}))
    (file,) = Path(report.checkpoint).parent.glob("checkpoint-*/model.safetensors")
    kept = load_file(file)
    saved = weights(report.checkpoint)
    assert report.final["top1"] == 0.9
    assert torch.equal(saved["stem.0.weight"], kept["model.stem.0.weight"])
    assert not torch.equal(saved["stem.0.weight"], kept["average.averaged.module.stem.0.weight"])


def test_average_follows_its_formula() -> None:
    model = create_backbone("fd_mobilenet_x0_25", 2)
    task = ClassificationTask(model, TaskOptions(ema_decay=0.75))
    expected = model.head.weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            model.head.weight.add_(1.0)
        assert task.average is not None
        task.average.update(model)
        new, decay = model.head.weight.detach(), (1 + step) / (10 + step)  # still below 0.75
        expected = new.clone() if step == 0 else decay * expected + (1 - decay) * new
    torch.testing.assert_close(task.trained.head.weight.detach(), expected)
    assert not any(p.requires_grad for p in task.trained.parameters())


class Fixed(nn.Module):
    """Logits that depend on the images linearly, so mixed images give mixed logits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def normalization(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x.mean((2, 3))


def batch() -> dict[str, Tensor]:
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    for n in range(3):
        images[n, n] = 255
    return {"images": images, "labels": torch.tensor([0, 1, 1]), "skipped": torch.tensor([2])}


def test_loss_and_figures() -> None:
    task = ClassificationTask(Fixed(), TaskOptions(label_smoothing=0.2))  # type: ignore[arg-type]
    out = task(**batch())
    logits = torch.eye(3)
    expected = F.cross_entropy(logits, torch.tensor([0, 1, 1]), label_smoothing=0.2)
    torch.testing.assert_close(out["loss"], expected)
    assert out["top1"].item() == pytest.approx(2 / 3)
    assert int(task.skipped) == 2
    plain = F.cross_entropy(logits, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(task.eval()(**batch())["loss"], plain)
    assert int(task.skipped) == 2, "evaluation counts elsewhere"


def test_mixup_mixes_images_and_losses_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    class Beta:
        def __init__(self, *_: float) -> None:
            pass

        def sample(self) -> Tensor:
            return torch.tensor(0.75)

    monkeypatch.setattr(torch.distributions, "Beta", Beta)
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.tensor([2, 0, 1]))
    model = Fixed()
    out = ClassificationTask(model, TaskOptions(mixup=0.2))(**batch())  # type: ignore[arg-type]
    mixed = 0.75 * torch.eye(3) + 0.25 * torch.eye(3)[[2, 0, 1]]
    torch.testing.assert_close(model.seen[0].mean((2, 3)), mixed)
    labels = torch.tensor([0, 1, 1])
    expected = 0.75 * F.cross_entropy(mixed, labels) + 0.25 * F.cross_entropy(mixed, labels[[2, 0, 1]])
    torch.testing.assert_close(out["loss"], expected)


def test_memory_format_changes_the_layout_alone() -> None:
    torch.manual_seed(0)
    model = create_backbone("fd_mobilenet_x0_25", 3)
    images = torch.randint(0, 256, (4, 3, 32, 40), dtype=torch.uint8)
    given = {"images": images, "labels": torch.tensor([0, 1, 2, 1]), "skipped": torch.tensor([0])}
    layouts: list[bool] = []
    model.stem.register_forward_hook(lambda _, x, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last)))
    plain, last = (ClassificationTask(model, TaskOptions(), wish)(**given)["loss"] for wish in (False, True))
    assert layouts == [False, True]
    torch.testing.assert_close(last, plain)
    assert all(p.is_contiguous() for p in model.parameters()), "safetensors takes no other"


@pytest.mark.parametrize("depthwise", ["diagonalwise", "tuned"])
def test_depthwise_choice_leaves_plain_weights(
    tiny_recipe: Recipe, depthwise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    original = classification.run

    def run(task: ClassificationTask, *args: Any, **kwargs: Any) -> TrainingReport:
        seen.append(any(isinstance(layer, DiagonalwiseConv2d) for layer in task.modules()))
        return original(task, *args, **kwargs)

    monkeypatch.setattr(classification, "run", run)
    recipe = tiny_recipe(model={"depthwise": depthwise}, task={"ema_decay": 0.5}, training={"steps": 2})
    model = load_backbone(Path(train(recipe).checkpoint))
    assert seen == [True] or depthwise == "tuned"
    assert not any(isinstance(layer, DiagonalwiseConv2d) for layer in model.modules())


def test_statistics_are_estimated_again(tiny_recipe: Recipe, tmp_path: Path) -> None:
    common = {"steps": 3, "seed": 1}
    plain = train(tiny_recipe(training=common))
    again = train(tiny_recipe(task={"reestimate_batches": 3}, training={**common, "output": str(tmp_path / "again")}))
    a, b = weights(plain.checkpoint), weights(again.checkpoint)
    assert torch.equal(a["stem.0.weight"], b["stem.0.weight"])
    assert not torch.equal(a["stem.1.running_mean"], b["stem.1.running_mean"])
    assert b["stem.1.num_batches_tracked"] == 3


def test_fine_tuning_keeps_the_features_and_replaces_the_head(tiny_recipe: Recipe, tmp_path: Path) -> None:
    start = create_backbone("snet49", 7)
    save_backbone(start, tmp_path / "start")
    recipe = tiny_recipe(training={"steps": 1, "learning_rate": 0.0})
    recipe["model"] = {"start_from": str(tmp_path / "start")}
    model = load_backbone(Path(train(recipe).checkpoint))
    assert (model.name, model.num_classes) == ("snet49", 3)
    assert torch.equal(model.stem[0].weight, start.stem[0].weight)


def test_a_classifier_starts_from_a_segmenters_backbone(tiny_recipe: Recipe, tmp_path: Path) -> None:
    segmenter = Segmenter(SegmenterConfig("snet49", ("a", "b"), 16))
    save_segmenter(segmenter, tmp_path / "start")
    recipe = tiny_recipe(training={"steps": 1, "learning_rate": 0.0})
    recipe["model"] = {"start_from": str(tmp_path / "start")}
    model = load_backbone(Path(train(recipe).checkpoint))
    assert (model.name, model.class_names) == ("snet49", ("blue", "green", "red"))
    assert torch.equal(model.stem[0].weight, segmenter.backbone.stem[0].weight)


@pytest.mark.parametrize(("changes", "message"), [
    ({"model": {"start_from": "x"}}, r"\[model\] needs either backbone"),
    ({"model": {"depthwise": "fast"}}, r"model\.depthwise is 'fast'; allowed are native"),
    ({"data": {"kind": "zip"}}, r"data\.kind is 'zip'"),
    ({"data": {"colour": "red"}}, r"\[data\] has unknown keys colour"),
    ({"augmentation": {"crop": "none"}}, "crop is 'none'"),
    ({"task": {"label_smoothing": 1.5}}, r"\[task\] label_smoothing"),
    ({"task": {"ema_decay": 1.0}}, r"task\.ema_decay is 1\.0"),
    ({"network": {"depth": 3}}, "unknown tables network; allowed are model, data"),
])  # fmt: skip
def test_recipes_that_are_refused(tiny_recipe: Recipe, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        train(tiny_recipe(**changes))


def test_unknown_backbone_lists_the_known(tiny_recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r"'resnet50'; known are snet49"):
        train(tiny_recipe(model={"backbone": "resnet50"}))


def test_splits_must_agree_and_classes_must_not_be_empty(tiny_recipe: Recipe, image_folder: Path) -> None:
    (image_folder / "train" / "black").mkdir()
    with pytest.raises(DataError, match=r"class folders without images in .*black"):
        train(tiny_recipe())
    (image_folder / "train" / "red" / "0.png").rename(image_folder / "train" / "black" / "0.png")
    with pytest.raises(RecipeError, match="different classes: black"):
        train(tiny_recipe())
