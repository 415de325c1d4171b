from pathlib import Path

import pytest

import vision.recipes
from kernels.training import RecipeError, load_recipe
from vision.backbones import create_backbone
from vision.backbones.complexity import count
from vision.tasks.classification import ClassifierRecipe
from vision.tasks.study import expand

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


def test_study_expands_to_one_recipe_for_each_combination() -> None:
    base = load_recipe(next(file for file in RECIPES if file.stem == "cifar10_study"))
    recipes = expand(base)
    assert len(recipes) == 15
    assert list(recipes)[:2] == ["menet_108_8x1_g3/seed_0", "fd_mobilenet_x0_5/seed_0"]
    parsed = {name: ClassifierRecipe.parse(recipe) for name, recipe in recipes.items()}
    assert {recipe.training.output for recipe in parsed.values()} == {f"runs/cifar10_study/{name}" for name in recipes}
    assert {(r.data, r.augmentation, r.task) for r in parsed.values()} == {
        (r.data, r.augmentation, r.task) for r in [next(iter(parsed.values()))]
    }
    assert parsed["snet49/seed_2"].training.seed == 2
    macs = [count(create_backbone(name)).macs / 1e6 for name in base["study"]["backbones"]]
    assert min(macs) > 38 and max(macs) < 52, "matched budgets"


def test_impossible_studies_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"needs the table \[study\]"):
        expand({"training": {}})
    with pytest.raises(RecipeError, match=r"no \[model\]"):
        expand({"study": {"backbones": ["snet49"]}, "model": {"backbone": "snet49"}})
    with pytest.raises(RecipeError, match=r"\[study\] has unknown keys nets"):
        expand({"study": {"nets": []}})
