import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kernels.training import RecipeError
from server.bench import distillation
from server.cli import app
from vision.backbones import create_backbone
from vision.backbones.checkpoint import save_backbone
from vision.data.classification import collate
from vision.tasks.distillation import DistillationRecipe

CLASSES = ("dark", "light")


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        for split in ("train", "val"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for n in range(4):
                pixels = generator.integers(128 * number, 128 * (number + 1), (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    teacher = create_backbone("fd_mobilenet_x0_25", 2)
    teacher.class_names = CLASSES
    save_backbone(teacher, tmp_path / "teacher")
    return {
        "model": {"backbone": "fd_mobilenet_x0_25"},
        "teacher": {"path": str(tmp_path / "teacher")},
        "terms": [{"kind": "kd", "weight": 0.6, "temperature": 3.0}, {"kind": "kd", "weight": 0.3, "temperature": 1.0}],
        "distillation": {"cross_entropy_weight": 0.1},
        "data": {"kind": "folder", "root": str(tmp_path / "data"), "image_size": 32},
        "training": {
            "output": str(tmp_path / "never"),
            "steps": 900,
            "batch_size": 4,
            "threads": 1,
            "optimizer": "sgd",
        },
    }


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_plain_loop_computes_the_tasks_loss(recipe: dict[str, Any]) -> None:
    parsed = distillation.shortened(DistillationRecipe.parse(recipe), 1)
    lesson = distillation.lesson_of(parsed)
    assert lesson.teacher is not None
    batch = collate([lesson.data[n] for n in range(4)])
    task = lesson.task.train()
    expected = task(**batch)["loss"]
    logits = task.model(task.model.normalization(batch["images"].float() / 255))
    teacher_logits, _ = lesson.teacher(batch["images"])
    assert torch.allclose(distillation.plain_loss(parsed, logits, teacher_logits, batch["labels"]), expected, atol=1e-6)


def test_both_run_the_steps_asked_for(recipe: dict[str, Any]) -> None:
    parsed = distillation.shortened(DistillationRecipe.parse(recipe), 5)
    assert len(distillation.by_plain_loop(parsed)) == len(distillation.by_trainer(parsed)) == 5
    assert not Path(recipe["training"]["output"]).exists()


def test_the_command_prints_and_writes_its_report(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = {"by_trainer": 2.0, "by_plain_loop": 1.0}
    for name, step in moments.items():
        monkeypatch.setattr(distillation, name, lambda parsed, step=step: [step * n for n in range(5)])
    monkeypatch.setattr("kernels.training.load_recipe", lambda path: recipe)
    (tmp_path / "recipe.toml").touch()
    arguments = ["bench", "distillation", str(tmp_path / "recipe.toml"), "--steps", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert report["images_per_s"] == {"trainer": [2.0] * 5, "plain": [4.0] * 5}
    assert (report["ratio"], report["steps"], report["student"]) == (0.5, 2, "fd_mobilenet_x0_25")


@pytest.mark.parametrize("change", [
    {"terms": [{"kind": "bdd", "weight": 1.0}]}, {"distillation": {"sampler": "class_uniform"}},
])  # fmt: skip
def test_recipes_the_plain_loop_does_not_know_are_refused(recipe: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="the plain loop knows a teacher, kd terms and random batches"):
        distillation.measure_distillation(recipe | change, 1, 1, print)
