import json
import os
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kernels.training import TrainingReport, callbacks
from kernels.training.study import Cell, expand, run_study, write_json
from vision.tasks import detection_study
from vision.tasks.detection import train_detector
from vision.tasks.detection_study import baseline_of, markdown, measure_cell, study_rows, write_study

Recipe = Callable[..., dict[str, Any]]
VARIANTS: dict[str, Any] = {
    "none": {"mining": {"regions": "none"}},
    "ohem": {"mining": {"regions": "ohem"}},
    "yolo_none": {"model": {"architecture": "yolo_v2"}},
    "yolo_lrm": {"model": {"architecture": "yolo_v2"}, "mining": {"map": "lrm"}},
    "focal_elsewhere": {"data": {"image_size": 128}, "mining": {"map": "focal"}},
}


def study(detector_recipe: Recipe, *variants: str, seeds: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    return {
        **detector_recipe(),
        "study": {"seeds": list(seeds), "variants": {name: VARIANTS[name] for name in variants}},
    }


def pretend_finished(cell: Cell, seconds: float = 60.0) -> None:
    """What a trained cell leaves behind, without the weights."""
    report = TrainingReport({}, {}, seconds, str(cell.output / "model"), True)
    write_json({"recipe": cell.recipe, **vars(report)}, cell.output / "report.json")
    write_json([{"step": 2, "loss": 1.0}, {"step": 2, "eval_map50": 0.25}], cell.output / "training.json")


def measured(cell: Cell) -> dict[str, Any]:
    map50 = {"none": 0.5, "ohem": 0.6}[cell.variant] + 0.1 * cell.seed * (1 if cell.variant == "none" else 2)
    return {"map50": map50, "map60": 0.4, "map70": 0.3, "map": None, "per_class": {"disc": {"ap50": map50}}}


def test_every_miner_is_compared_with_its_own_host_unmined(detector_recipe: Recipe) -> None:
    assert baseline_of(expand(study(detector_recipe, *VARIANTS))) == {
        "none": None, "ohem": "none", "yolo_none": None, "yolo_lrm": "yolo_none", "focal_elsewhere": None,
    }  # fmt: skip


def test_rows_hold_means_over_seeds_and_gains_seed_by_seed(detector_recipe: Recipe, tmp_path: Path) -> None:
    cells = expand(study(detector_recipe, "none", "ohem", "yolo_none"), tmp_path / "study")
    for cell in cells[:5]:
        if cell.variant != "yolo_none":
            pretend_finished(cell, 60.0 + cell.seed)
    none, ohem, yolo = study_rows(cells, measured)
    assert none.map50 is not None and none.map50.mean == pytest.approx(0.55) and none.map50.runs == 2
    assert none.gain50 is None and none.map is None
    assert ohem.gain50 is not None and ohem.gain50.mean == pytest.approx(0.15)
    assert ohem.gain50.std == pytest.approx(0.1 / 2**0.5), "of the differences, not of the means"
    assert ohem.seconds is not None and ohem.seconds.mean == 60.5
    assert ohem.curves == {0: [(2, 0.25)], 1: [(2, 0.25)]}
    assert (yolo.map50, yolo.seeds) == (None, {0: "NOT RUN", 1: "NOT RUN"})
    file = tmp_path / "docs" / "study.json"
    report = write_study([none, ohem, yolo], cells, file)
    assert json.loads(file.read_text())["rows"][1]["per_class"]["disc"]["mean"] == pytest.approx(0.7)
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = markdown(report["rows"]).splitlines()
    assert table[2] == "| none | 0.550 ± 0.071 | 0.400 ± 0.000 | 0.300 ± 0.000 | NOT RUN | - | 60 | 2 |"
    assert "| +0.150 ± 0.071 | 60 | 2 |" in table[3]
    assert table[4].endswith("| - | - | 0; 0 NOT RUN, 1 NOT RUN |")
    assert table[-2:] == ["| none | 0.550 ± 0.071 |", "| ohem | 0.700 ± 0.141 |"]


def test_a_trained_cell_is_measured_once(
    detector_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "plot", lambda *_: None)
    cells = expand(study(detector_recipe, "none", seeds=(0,)), tmp_path / "study")
    (outcome,) = run_study(
        cells, lambda recipe, resume: train_detector(recipe, console=Console(file=StringIO())), tmp_path / "study"
    )
    found = measure_cell(cells[0])
    assert found["map50"] == outcome.final["map50"]
    assert (cells[0].output / "evaluation" / "precision_recall.png").is_file()
    evaluations: list[Path] = []
    monkeypatch.setattr(detection_study, "evaluate_source", lambda *_, output: evaluations.append(output))
    assert measure_cell(cells[0]) == found and not evaluations
    weights = cells[0].output / "model" / "model.safetensors"
    later = (cells[0].output / "evaluation" / "report.json").stat().st_mtime + 10
    os.utime(weights, (later, later))
    measure_cell(cells[0])
    assert evaluations == [cells[0].output / "evaluation"], "other weights are measured anew"
