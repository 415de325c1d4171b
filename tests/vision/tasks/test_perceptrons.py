import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.training import RecipeError
from kernels.training.paired_report import analyse
from kernels.training.study import FINISHED, expand, overlay
from vision.backbones import create_backbone
from vision.backbones.checkpoint import save_backbone
from vision.backbones.preprocessing import Preprocessing
from vision.data.textures import NUM_CLASSES
from vision.tasks import perceptrons
from vision.tasks.perceptrons import train_together

KD = [{"kind": "kd", "weight": 0.9, "temperature": 2.0}]
CCKD = [*KD, {"kind": "cckd", "weight": 30.0}]
COMPARED = {"claim": "x", "variant": "kd", "against": "alone", "figure": "top1", "smallest_effect": 0.01}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    teacher = create_backbone("plain_w6", NUM_CLASSES)
    teacher.preprocessing = Preprocessing(32, 32)
    save_backbone(teacher, tmp_path / "teacher")
    return {
        "study": {
            "seeds": [0, 1, 2],
            "variants": {
                "alone": {"distillation": {"cross_entropy_weight": 1.0}, "terms": []},
                "kd": {"terms": KD},
                "cckd": {"terms": CCKD, "distillation": {"sampler": "class_uniform", "cross_entropy_weight": 0.1}},
            },
            "comparisons": [COMPARED],
        },
        "student": {"hidden": 4, "side": 4},
        "teacher": {"path": str(tmp_path / "teacher")},
        "distillation": {"cross_entropy_weight": 0.1},
        "data": {"kind": "textures", "root": ".", "image_size": 32, "resize": 32, "in_memory": True},
        "training": {"output": "", "steps": 6, "batch_size": 40, "clip_norm": 0.0, "log_every": 6, "threads": 1},
    }


def test_every_cell_is_trained_as_if_it_were_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Fast beside slow: all cells at once end where a run of one seed and one variant does."""
    whole, one = tmp_path / "whole", tmp_path / "one"
    outcomes = train_together(expand(recipe, whole), whole)
    assert [outcome.status for outcome in outcomes] == [FINISHED] * 9
    study = analyse(recipe, expand(recipe, whole))
    assert study.seeds == (0, 1, 2)
    for variant in ("kd", "cckd"):
        alone = overlay(recipe, {"study": {"seeds": [1], "comparisons": []}})
        alone["study"]["variants"] = {variant: recipe["study"]["variants"][variant]}
        train_together(expand(alone, one / variant), one / variant)
        final = {
            key: json.loads((folder / variant / "seed_1" / "report.json").read_text())["final"]
            for key, folder in (("whole", whole), ("one", one / variant))
        }
        assert final["whole"] == pytest.approx(final["one"], abs=2e-3)


def test_seeds_begin_alike_in_all_variants_and_finished_studies_stay(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students = perceptrons.Students(2, [3, 4], 5, 4, 3)
    assert torch.equal(students.first[0], students.first[1])
    assert not torch.equal(students.first[0, 0], students.first[0, 1])
    cells = expand(recipe, tmp_path / "study")
    train_together(cells, tmp_path / "study")
    monkeypatch.setattr(perceptrons, "train_all", lambda *_: pytest.fail("trained again"))
    assert {outcome.status for outcome in train_together(cells, tmp_path / "study")} == {FINISHED}


def test_what_would_tie_the_students_together_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="clip_norm would tie"):
        train_together(expand(overlay(recipe, {"training": {"clip_norm": 1.0}}), tmp_path), tmp_path)
    with pytest.raises(RecipeError, match=r"kd changes \[data\], which all cells of one run share"):
        wrong = overlay(recipe, {"study": {"variants": {"kd": {"data": {"image_size": 64}}}}})
        train_together(expand(wrong, tmp_path), tmp_path)
    with pytest.raises(RecipeError, match="sampler must be one of random, class_uniform"):
        wrong = overlay(recipe, {"distillation": {"sampler": "superclass_uniform"}})
        train_together(expand(wrong, tmp_path), tmp_path)
