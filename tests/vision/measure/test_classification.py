from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vision.backbones import create_backbone
from vision.backbones.checkpoint import save_backbone
from vision.backbones.preprocessing import Preprocessing
from vision.data.classification import ClassificationData
from vision.data.sources import ArraySource, DataError
from vision.measure.classification import evaluate_classifier, evaluate_model, hits
from vision.serving.folder import CheckpointError


def saved(tmp_path: Path, names: tuple[str, ...] = ("blue", "green", "red")) -> Path:
    torch.manual_seed(0)
    model = create_backbone("fd_mobilenet_x0_25", len(names))
    model.class_names = names
    model.preprocessing = Preprocessing(32, 36)
    save_backbone(model, tmp_path / "model")
    return tmp_path / "model"


def test_hits() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.2, 0.9], [0.9, 0.1, 0.2, 0.3]])
    labels = torch.tensor([1, 1])
    assert hits(logits, labels, 1).tolist() == [False, False]
    assert hits(logits, labels, 2).tolist() == [True, False]
    assert hits(logits, labels, 5).tolist() == [True, True]


def test_batching_and_mode_do_not_matter() -> None:
    images = np.random.default_rng(0).integers(0, 255, (11, 32, 32, 3), dtype=np.uint8)
    data = ClassificationData(
        ArraySource(images, np.arange(11, dtype=np.int64), tuple("abcdefghijk")), Preprocessing(32, 32)
    )
    torch.manual_seed(0)
    model = create_backbone("fd_mobilenet_x0_25", 11).train()
    one, many = evaluate_model(model, data, batch_size=1), evaluate_model(model, data, batch_size=4)
    assert model.training
    assert (one.top1, one.top5, one.images) == (many.top1, many.top5, 11)
    assert one.loss == pytest.approx(many.loss, rel=1e-5)
    with torch.no_grad():
        x = torch.stack([data[n].image for n in range(11)])  # type: ignore[union-attr]
        logits = model.eval()(model.normalization(x.float() / 255))
    assert one.top1 == pytest.approx((logits.argmax(1) == torch.arange(11)).float().mean().item())


def test_unreadable_images_are_named_and_left_out(tmp_path: Path, image_folder: Path) -> None:
    (image_folder / "val" / "red" / "1.png").write_bytes(b"broken")
    Image.new("L", (50, 40), 90).save(image_folder / "val" / "red" / "2.png")
    report = evaluate_classifier(saved(tmp_path), "folder", image_folder, "val", batch_size=1)
    assert report.images == 11
    assert len(report.skipped) == 1
    assert "1.png is not a readable image" in report.skipped[0]


def test_nothing_readable_is_an_error(tmp_path: Path, image_folder: Path) -> None:
    for file in (image_folder / "val").rglob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(DataError, match="none of the 12 images can be read"):
        evaluate_classifier(saved(tmp_path), "folder", image_folder, "val")


def test_other_classes_are_refused(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"trained for other classes .*\['blue', 'cyan'\]"):
        evaluate_classifier(saved(tmp_path, ("cyan", "green", "red")), "folder", image_folder, "val")
    with pytest.raises(DataError, match="their order"):
        evaluate_classifier(saved(tmp_path, ("red", "green", "blue")), "folder", image_folder, "val")
    folder = saved(tmp_path, ("a", "b"))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"a",\n  "b"', ""))
    with pytest.raises(DataError, match=r"has 2 classes, .* has 3"):
        evaluate_classifier(folder, "folder", image_folder, "val")


def test_missing_checkpoint_is_named(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing/config\.json does not exist"):
        evaluate_classifier(tmp_path / "nothing", "folder", image_folder, "val")


def test_confusion_counts_each_image_once_under_its_own_class(tmp_path: Path, image_folder: Path) -> None:
    report = evaluate_classifier(saved(tmp_path), "folder", image_folder, "val")
    assert {name: sum(row.values()) for name, row in report.confusion.items()} == {"blue": 4, "green": 4, "red": 4}
    right = sum(row.get(name, 0) for name, row in report.confusion.items())
    assert right / 12 == pytest.approx(report.top1)
