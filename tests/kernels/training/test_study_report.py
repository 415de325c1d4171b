import json
from pathlib import Path
from typing import Any

import pytest

from kernels.training import RecipeError
from kernels.training.study import FINISHED, NOT_RUN, Cell, Spread, expand, write_json
from kernels.training.study_report import markdown, study_rows, write_study

TOP1 = {"plain": [0.50, 0.60, 0.70], "taught": [0.52, 0.61, 0.69], "late": [0.4]}
RECIPE: dict[str, Any] = {
    "study": {"seeds": [0, 1, 2], "variants": {name: {} for name in TOP1}},
    "training": {"steps": 4, "batch_size": 8},
}


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    found = expand(RECIPE, tmp_path / "study")
    for cell in found:
        if cell.seed < len(TOP1[cell.variant]):
            final = {"top1": TOP1[cell.variant][cell.seed], "calibration_error": 0.1}
            report = {"recipe": cell.recipe, "final": final, "best": {}, "seconds": 3.0, "checkpoint": "there"}
            write_json(report, cell.output / "report.json")
    return found


def test_gains_are_taken_seed_by_seed(cells: list[Cell]) -> None:
    plain, taught, late = study_rows(cells, ["top1", "calibration_error"], "plain")
    assert plain.figures["top1"] == Spread(pytest.approx(0.6), pytest.approx(0.1), 3)
    assert plain.gain is None
    assert taught.gain is not None
    # 0.02, 0.01, -0.01: small beside the deviation of 0.1 between the seeds, which cancels.
    assert (taught.gain.mean, taught.gain.std) == (pytest.approx(0.02 / 3), pytest.approx(0.01528, abs=1e-5))
    assert taught.wins == 2
    assert late.gain == Spread(pytest.approx(-0.1), 0.0, 1)
    assert late.seeds == {0: FINISHED, 1: NOT_RUN, 2: NOT_RUN}


def test_report_table_and_plot(cells: list[Cell], tmp_path: Path) -> None:
    file = tmp_path / "docs" / "study.json"
    report = write_study(study_rows(cells, ["top1"], "plain"), cells, "plain", file)
    assert json.loads(file.read_text()) == json.loads(json.dumps(report))
    assert report["conditions"] == {"steps": 4, "batch_size": 8}
    assert file.with_suffix(".png").stat().st_size > 1000
    table = markdown(report)
    assert "| plain | 0.6000 ± 0.1000 | - | 3 |" in table
    assert "| taught | 0.6067 ± 0.0850 | +0.0067 ± 0.0153, 2 of 3 | 3 |" in table
    assert "| late | 0.4000 | -0.1000, 0 of 1 | 1; 1 NOT RUN, 2 NOT RUN |" in table


def test_a_study_not_begun_is_all_not_run(tmp_path: Path) -> None:
    cells = expand(RECIPE, tmp_path)
    report = write_study(study_rows(cells, ["top1"]), cells, None, tmp_path / "report" / "study.json")
    assert "| plain | NOT RUN | 0; 0 NOT RUN, 1 NOT RUN, 2 NOT RUN |" in markdown(report)


@pytest.mark.parametrize(
    ("figures", "baseline", "message"),
    [
        (["top9"], None, "no report has top9; the reports have calibration_error, top1"),
        ([], None, "no report has no figure"),
        (["top1"], "none", "no variant none; it has plain, taught, late"),
    ],
)
def test_what_is_not_there_is_refused(cells: list[Cell], figures: list[str], baseline: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        study_rows(cells, figures, baseline)
