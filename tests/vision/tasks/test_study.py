import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import vision.recipes
from kernels.diagonalwise.timing import Step, Timing
from kernels.training import callbacks, load_recipe
from kernels.training.study import expand, run_study
from vision.backbones import create_backbone
from vision.backbones.complexity import count
from vision.tasks.classification import ClassifierRecipe, train_classifier
from vision.tasks.study import markdown, study_rows, write_study

Recipe = Callable[..., dict[str, Any]]

RECIPES = sorted(Path(vision.recipes.__path__[0]).glob("*.toml"))
SINGLE = [file for file in RECIPES if "study" not in load_recipe(file)]
IMAGENET_IMAGES = 1_281_167


@pytest.mark.parametrize("file", SINGLE, ids=lambda file: file.stem)
def test_recipes_are_complete(file: Path) -> None:
    recipe = ClassifierRecipe.parse(load_recipe(file))
    assert file.stem.endswith(str(recipe.model.backbone))
    assert recipe.training.output == f"runs/{file.stem}"
    create_backbone(str(recipe.model.backbone), 10)


def test_published_recipes_count_their_epochs() -> None:
    epochs = {
        file.stem: recipe.training.steps * recipe.training.batch_size / IMAGENET_IMAGES
        for file in SINGLE
        if file.stem.startswith("imagenet")
        for recipe in [ClassifierRecipe.parse(load_recipe(file))]
    }
    assert epochs == pytest.approx({
        "imagenet_fd_mobilenet_x1_0": 120, "imagenet_menet_228_12x1_g3": 120, "imagenet_snet146": 119.9,
        "imagenet_shufflenet_v2_x1_0": 239.8,
    }, abs=0.1)  # fmt: skip


def test_the_cifar_study_compares_like_with_like() -> None:
    base = load_recipe(next(file for file in RECIPES if file.stem == "cifar10_study"))
    cells = expand(base)
    assert len(cells) == 15
    assert {cell.seed for cell in cells[:5]} == {0}
    parsed = [ClassifierRecipe.parse(cell.recipe) for cell in cells]
    assert {cell.output for cell in cells} == {Path("runs/cifar10_study") / cell.name for cell in cells}
    assert len({(recipe.data, recipe.augmentation, recipe.task) for recipe in parsed}) == 1
    assert {str(recipe.model.backbone) for recipe in parsed} == set(base["study"]["variants"])
    macs = [count(create_backbone(name, 10), 64).macs / 1e6 for name in base["study"]["variants"]]
    assert min(macs) > 3 and max(macs) < 4.2, "matched budgets"


def small_study(tiny_recipe: Recipe) -> dict[str, Any]:
    variants = {name: {"model": {"backbone": name}} for name in ("fd_mobilenet_x0_25", "mobilenet_v1_x0_25")}
    recipe = tiny_recipe(training={"steps": 1}, model={"channels_last": True})
    del recipe["model"]["backbone"]
    return {**recipe, "study": {"seeds": [0, 1], "variants": variants}}


def instantly(steps: Mapping[str, Step], device: torch.device, warmups: int, repeats: int) -> dict[str, Timing]:
    assert torch.get_num_threads() == 1
    for step in steps.values():
        step()
    return {name: Timing(1.0, 2.0, 3.0) for name in steps}


def test_a_study_from_training_to_table(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "plot", lambda *_: None)
    cells = expand(small_study(tiny_recipe), tmp_path / "study")
    outcomes = run_study(cells, train_classifier, tmp_path / "study", ["fd_mobilenet_x0_25"])
    assert [outcome.status for outcome in outcomes] == ["finished", "NOT RUN"] * 2
    first, second = study_rows(cells, instantly)
    assert (first.backbone, first.seeds) == ("fd_mobilenet_x0_25", {0: "finished", 1: "finished"})
    size = count(create_backbone("fd_mobilenet_x0_25", 3), 32)
    assert (first.parameters, first.macs) == (size.parameters, size.macs)
    assert first.top1 is not None
    assert first.top1.runs == 2
    assert first.top1.mean == pytest.approx((outcomes[0].final["top1"] + outcomes[2].final["top1"]) / 2)
    assert second.top1 is None
    file = tmp_path / "docs" / "study.json"
    report = write_study([first, second], cells, {"cpu": "some"}, file)
    assert json.loads(file.read_text())["rows"][1]["seeds"] == {"0": "NOT RUN", "1": "NOT RUN"}
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    lines = markdown(report["rows"]).splitlines()
    assert lines[2].startswith("| fd_mobilenet_x0_25 | 0.13 | 0.24 | 2.00 |")
    assert lines[2].endswith("| 2 |")
    assert "±" in lines[2]
    assert lines[3].endswith("| 2.00 | NOT RUN | 0; 0 NOT RUN, 1 NOT RUN |")
