import json
from pathlib import Path
from typing import Any

import pytest

from kernels.training import RecipeError, TrainingDivergedError, TrainingReport
from kernels.training.study import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    NOT_RUN,
    Outcome,
    Spread,
    expand,
    overlay,
    run_study,
    spread_over_seeds,
)

RECIPE: dict[str, Any] = {
    "study": {"seeds": [3, 5], "variants": {"small": {"model": {"width": 1}}, "large": {"model": {"width": 2}}}},
    "model": {"depth": 7},
    "training": {"steps": 4},
}


class Trainer:
    """Answers with given endings, in order, and leaves a checkpoint behind; records what it was asked for."""

    def __init__(self, *endings: bool | BaseException) -> None:
        self.endings = list(endings)
        self.calls: list[tuple[str, bool]] = []

    def __call__(self, recipe: dict[str, Any], *, resume: bool) -> TrainingReport:
        output = Path(recipe["training"]["output"])
        self.calls.append((f"{output.parent.name}/{output.name}", resume))
        checkpoint = output / "checkpoint-2"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "trainer_state.json").write_text("{}")
        ending = self.endings.pop(0) if self.endings else True
        if isinstance(ending, BaseException):
            raise ending
        return TrainingReport({"top1": recipe["model"]["width"] / 10}, {}, 1.5, str(checkpoint), ending)


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [outcome.status for outcome in outcomes]


def test_every_variant_with_every_seed_seeds_slowest(tmp_path: Path) -> None:
    cells = expand(RECIPE, tmp_path)
    assert [cell.name for cell in cells] == ["small/seed_3", "large/seed_3", "small/seed_5", "large/seed_5"]
    assert cells[1].recipe == {
        "model": {"depth": 7, "width": 2},
        "training": {"steps": 4, "seed": 3, "output": str(tmp_path / "large" / "seed_3")},
    }
    assert "output" not in RECIPE["training"], "the recipe itself stays as it was"


def test_the_recipe_names_the_folder_unless_another_is_given() -> None:
    recipe = overlay(RECIPE, {"training": {"output": "runs/here"}})
    assert expand(recipe)[0].output == Path("runs/here/small/seed_3")
    with pytest.raises(RecipeError, match=r"\[training\] lacks output"):
        expand(RECIPE)


def test_overlay_changes_single_keys_and_copies() -> None:
    base = {"a": {"b": 1, "c": [1]}, "d": {"e": 2}}
    merged = overlay(base, {"a": {"b": 5}, "d": 3, "f": {"g": 1}})
    assert merged == {"a": {"b": 5, "c": [1]}, "d": 3, "f": {"g": 1}}
    merged["a"]["c"].append(2)
    assert base["a"] == {"b": 1, "c": [1]}


@pytest.mark.parametrize(("study", "message"), [
    ({"variants": {}}, "needs variants and different seeds"),
    ({"variants": {"a": {}}, "seeds": []}, "needs variants and different seeds"),
    ({"variants": {"a": {}}, "seeds": [1, 1]}, "needs variants and different seeds"),
    ({"variants": {"a/b": {}}}, r"study\.variants\.a/b names a folder"),
    ({"variants": {"..": {}}}, r"study\.variants\.\.\. names a folder"),
    ({"variants": {"a": {"learning_rate": 1}}}, r"study\.variants\.a must hold tables"),
    ({"networks": []}, r"\[study\] has unknown keys networks"),
])  # fmt: skip
def test_impossible_studies_are_refused(study: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        expand({"study": study, "training": {"output": "x"}})


def test_a_recipe_without_study_is_none() -> None:
    with pytest.raises(RecipeError, match=r"needs the table \[study\]"):
        expand({"training": {"output": "x"}})


def test_cells_run_in_order_once(tmp_path: Path) -> None:
    cells, trainer = expand(RECIPE, tmp_path), Trainer()
    outcomes = run_study(cells, trainer, tmp_path)
    assert trainer.calls == [(cell.name, False) for cell in cells]
    assert statuses(outcomes) == [FINISHED] * 4
    assert [outcome.final["top1"] for outcome in outcomes] == [0.1, 0.2, 0.1, 0.2]
    assert statuses(run_study(cells, trainer, tmp_path)) == [FINISHED] * 4
    assert len(trainer.calls) == 4, "finished cells are skipped"
    kept = json.loads((tmp_path / "study.json").read_text())["cells"]
    assert [(cell["variant"], cell["seed"], cell["status"]) for cell in kept][-1] == ("large", 5, FINISHED)


def test_an_interrupted_cell_ends_the_study_and_is_resumed(tmp_path: Path) -> None:
    cells, trainer = expand(RECIPE, tmp_path), Trainer(True, False)
    assert statuses(run_study(cells, trainer, tmp_path)) == [FINISHED, INTERRUPTED, NOT_RUN, NOT_RUN]
    assert statuses(run_study(cells, trainer, tmp_path)) == [FINISHED] * 4
    assert trainer.calls == [
        ("small/seed_3", False), ("large/seed_3", False),
        ("large/seed_3", True), ("small/seed_5", False), ("large/seed_5", False),
    ]  # fmt: skip


def test_a_killed_cell_is_resumed_as_well(tmp_path: Path) -> None:
    cells = expand(RECIPE, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_study(cells, Trainer(True, KeyboardInterrupt()), tmp_path)
    trainer = Trainer()
    run_study(cells, trainer, tmp_path)
    assert trainer.calls[0] == ("large/seed_3", True)


def test_a_diverged_cell_is_marked_and_passed_over(tmp_path: Path) -> None:
    cells, trainer = expand(RECIPE, tmp_path), Trainer(TrainingDivergedError("the loss is nan at step 3"))
    outcomes = run_study(cells, trainer, tmp_path)
    assert statuses(outcomes) == [FAILED, FINISHED, FINISHED, FINISHED]
    assert outcomes[0].reason == "the loss is nan at step 3"
    run_study(cells, trainer, tmp_path)
    assert len(trainer.calls) == 4


def test_only_the_variants_asked_for(tmp_path: Path) -> None:
    cells, trainer = expand(RECIPE, tmp_path), Trainer()
    outcomes = run_study(cells, trainer, tmp_path, ["large"])
    assert statuses(outcomes) == [NOT_RUN, FINISHED, NOT_RUN, FINISHED]
    with pytest.raises(RecipeError, match="no variants huge; it has large, small"):
        run_study(cells, trainer, tmp_path, ["huge"])


def test_a_report_of_another_recipe_is_refused(tmp_path: Path) -> None:
    run_study(expand(RECIPE, tmp_path), Trainer(), tmp_path)
    changed = expand(overlay(RECIPE, {"training": {"steps": 5}}), tmp_path)
    with pytest.raises(RecipeError, match="was written by another recipe"):
        run_study(changed, Trainer(), tmp_path)


def test_spread() -> None:
    outcomes = [
        Outcome("a", 0, FINISHED, {"top1": 0.5}), Outcome("a", 1, FINISHED, {"top1": 0.7}),
        Outcome("b", 0, FINISHED, {"top1": 0.4}), Outcome("b", 1, NOT_RUN), Outcome("c", 0, FAILED),
    ]  # fmt: skip
    spread = spread_over_seeds(outcomes, "top1")
    assert spread["a"].mean == pytest.approx(0.6)
    assert spread["a"].std == pytest.approx(0.2 / 2**0.5)
    assert spread["b"] == Spread(0.4, 0.0, 1)
    assert "c" not in spread
