"""A classifier's life from the command line: trained, interrupted, resumed, evaluated, exported."""

import json
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from kernels.training import RecipeError, callbacks
from server.cli import app
from vision.backbones.checkpoint import load_backbone
from vision.data.classification import ClassificationData
from vision.data.image_sources import open_source
from vision.serving.export import NEEDED
from vision.tasks.classification import ClassificationTask

MISSING = [name for name in NEEDED if find_spec(name) is None]
RECIPE = """
[model]
backbone = "fd_mobilenet_x0_25"
[data]
kind = "folder"
root = "{root}"
image_size = 32
resize = 36
[training]
output = "{output}"
steps = 12
batch_size = 12
optimizer = "sgd"
learning_rate = 0.05
clip_norm = 0.0
log_every = 4
save_every = 100
threads = 1
"""


@pytest.fixture
def recipe(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(callbacks, "plot", lambda *_: None)
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.format(root=image_folder, output=tmp_path / "run"))
    return file


def dovetail(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return report


def press_control_c_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    original = ClassificationTask.forward

    def forward(self: ClassificationTask, **batch: Tensor) -> dict[str, Tensor]:
        nonlocal seen
        seen += self.training
        if self.training and seen == step:
            signal.raise_signal(signal.SIGINT)
        return original(self, **batch)

    monkeypatch.setattr(ClassificationTask, "forward", forward)


def train(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Interrupted after five steps, then resumed to the end."""
    with monkeypatch.context() as patch:
        press_control_c_at(5, patch)
        broken = dovetail("train", "classifier", recipe)
    assert not broken["finished"]
    assert Path(broken["checkpoint"]).name == "checkpoint-5"
    with pytest.raises(RecipeError, match=r"already holds checkpoint-5; resume it \(--resume\)"):
        dovetail("train", "classifier", recipe)
    report = dovetail("train", "classifier", recipe, "--resume")
    assert report["finished"]
    assert {"final", "best", "seconds", "checkpoint"} <= report.keys()
    return report


def test_train_interrupt_resume_evaluate(recipe: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = train(recipe, monkeypatch)
    measured = dovetail("eval", "classifier", report["checkpoint"], image_folder)
    assert (measured["top1"], measured["top5"]) == (report["final"]["top1"], report["final"]["top5"])
    assert (measured["images"], measured["skipped"]) == (12, [])


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed (extra vision): {', '.join(MISSING)}")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_trained_classifier_exported_gives_the_same_classes(
    recipe: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    checkpoint = train(recipe, monkeypatch)["checkpoint"]
    report = dovetail("export", "classifier", checkpoint, tmp_path / "classifier.onnx")
    assert report["image_size"] == 32
    assert report["max_difference"] < 1e-4
    model = load_backbone(Path(checkpoint))
    data = ClassificationData(open_source("folder", image_folder, "val"), model.preprocessing)
    images = torch.stack([data[n].image for n in range(len(data))]).float() / 255  # type: ignore[union-attr]
    (logits,) = onnxruntime.InferenceSession(report["file"]).run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        expected = model(model.normalization(images)).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    assert (logits.argmax(1) == expected.argmax(1)).all()
