import json
from pathlib import Path
from typing import Any

import pytest

from kernels.training import RecipeError
from kernels.training.paired import PairingError
from kernels.training.paired_report import analyse, markdown, write_paired
from kernels.training.study import Cell, expand, overlay, write_json

TOP1 = {"plain": [0.50, 0.60, 0.70], "taught": [0.53, 0.64, 0.72], "spare": []}
CLAIM = {"claim": "taught gains", "variant": "taught", "against": "plain", "figure": "top1", "smallest_effect": 0.01}
RECIPE: dict[str, Any] = {
    "study": {"seeds": [0, 1, 2], "variants": {name: {} for name in TOP1}, "comparisons": [CLAIM]},
    "training": {"steps": 4, "batch_size": 8},
}


def report_of(cell: Cell, **changes: Any) -> None:
    final = {"top1": TOP1[cell.variant][cell.seed]}
    report = {"recipe": cell.recipe, "final": final, "best": {}, "seconds": 3.0, "checkpoint": "there"} | changes
    write_json(report, cell.output / "report.json")


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    found = expand(RECIPE, tmp_path / "study")
    for cell in found:
        if TOP1[cell.variant]:
            report_of(cell)
    return found


def test_report_row_and_plot(cells: list[Cell], tmp_path: Path) -> None:
    file = tmp_path / "docs" / "study.json"
    report = write_paired(analyse(RECIPE, cells), "the command", file)
    assert json.loads(file.read_text()) == report
    assert file.with_suffix(".png").stat().st_size > 1000
    assert report["seconds"] == 18.0, "of the six trainings compared; what no comparison names is not asked for"
    assert report["comparisons"][0]["differences"] == pytest.approx({"0": 0.03, "1": 0.04, "2": 0.02})
    row = markdown(report).splitlines()[-1]
    assert row == (
        "| taught gains | taught against plain | top1 | +0.0300 [+0.0052, +0.0548] | 3 | 0.01 | **shown** | 18 |"
    )


def test_a_seed_that_is_not_run_ends_it(cells: list[Cell]) -> None:
    (cells[1].output / "report.json").unlink()
    with pytest.raises(PairingError, match="1 of 6 trainings are not finished: taught/seed_0 NOT RUN"):
        analyse(RECIPE, cells)


def test_a_training_that_diverged_ends_it(cells: list[Cell]) -> None:
    write_json({"recipe": cells[3].recipe, "reason": "the loss is nan at step 3"}, cells[3].output / "report.json")
    with pytest.raises(PairingError, match="plain/seed_1 diverged: the loss is nan at step 3"):
        analyse(RECIPE, cells)


@pytest.mark.parametrize(
    ("final", "message"),
    [({"top1": float("nan")}, "seeds 2 have no finite figure"), ({"top5": 1.0}, "plain reports no top1 with seeds 2")],
)
def test_a_figure_that_is_no_number_ends_it(cells: list[Cell], final: dict[str, float], message: str) -> None:
    report_of(cells[6], final=final)
    with pytest.raises(PairingError, match=message):
        analyse(RECIPE, cells)


def test_comparisons_are_checked_before_anything_is_trained(tmp_path: Path) -> None:
    for change, message in (
        ({"variant": "tought"}, "study.comparisons names tought; the variants are plain, taught, spare"),
        ({"figur": "top1"}, "unknown keys figur"),
        ({"smallest_effect": -1.0}, "smallest_effect is -1.0"),
    ):
        wrong = overlay(RECIPE, {"study": {"comparisons": [CLAIM | change]}})
        with pytest.raises(RecipeError, match=message):
            expand(wrong, tmp_path)
    with pytest.raises(RecipeError, match=r"no \[\[study.comparisons\]\]"):
        analyse(overlay(RECIPE, {"study": {"comparisons": []}}), expand(RECIPE, tmp_path))
