"""Scorers on folds: curves of redrawn pairs, planted gains found and planted zeros not, a study to its end."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from drawn_faces import write_colour_recogniser, write_london

from kernels.training import RecipeError, callbacks, paired_report
from kernels.training.paired import Comparison, PairingError
from kernels.training.study import expand, run_study
from vision.face_quality.evaluate import error_versus_discard
from vision.face_quality.protocol import FRACTIONS, Comparisons
from vision.face_quality.recognition import RecogniserOptions, load_recogniser
from vision.tasks import face_quality_study
from vision.tasks.face_quality import train_face_quality
from vision.tasks.face_quality_study import Fold, compare_areas, evaluate_folds, redraw, weighted_curves

FOLDS, PEOPLE, IMAGES = 5, 17, 6
BETTER = Comparison("a gain", "ours", "theirs", "area", 0.02, smaller_is_better=True)


def test_curves_are_those_of_the_repeated_pairs():
    generator = np.random.default_rng(0)
    similarity, quality = generator.random(60), generator.integers(0, 12, 60) / 12
    times = generator.integers(0, 4, (3, 60))
    curves = weighted_curves((similarity < 0.4).astype(float), quality, times.astype(float))
    for row, curve in zip(times, curves, strict=True):
        rows = np.repeat(np.arange(60), row)
        np.testing.assert_allclose(
            curve, error_versus_discard(similarity[rows], quality[rows], 0.4, FRACTIONS).fnmr, atol=1e-12
        )


def planted(seed: int, noise: float) -> list[Fold]:
    """Folds whose pairs fail by the worse image; "theirs" sees it through ``noise`` more than "ours"."""
    generator = np.random.default_rng(seed)
    first, second = np.triu_indices(IMAGES, k=1)
    folds = []
    for fold in range(FOLDS):
        worth = generator.normal(0, 1, PEOPLE * IMAGES)
        mated = np.concatenate([np.stack([first, second], 1) + IMAGES * person for person in range(PEOPLE)])
        similarity = worth[mated].min(axis=1) + generator.normal(0, 0.5, len(mated)) + 1.5
        scores = {
            "ours": worth + generator.normal(0, 0.7, len(worth)),
            "theirs": worth + generator.normal(0, 0.7 + noise, len(worth)),
        }
        people = np.repeat(np.arange(PEOPLE), IMAGES)
        folds.append(Fold(fold, Comparisons(mated, similarity, mated, similarity, people, 0.01, 0.0), scores))
    return folds


@pytest.mark.parametrize(("noise", "fewest", "most"), [(1.0, 80, 100), (0.0, 0, 7)])
def test_planted_gains_are_found_and_planted_zeros_are_not(noise, fewest, most):
    verdicts = [
        compare_areas(BETTER, redraw(planted(seed, noise), 100, seed), range(FOLDS)).verdict for seed in range(100)
    ]
    assert fewest <= verdicts.count("shown") <= most


def test_the_folds_gains_stand_beside_their_mean():
    areas = redraw(planted(0, 1.0), 20)
    result = compare_areas(BETTER, areas, range(FOLDS))
    assert min(result.differences.values()) <= result.mean <= max(result.differences.values())
    assert result.low < result.mean < result.high and areas.normalized("ours")[0] < 1
    with pytest.raises(RecipeError, match="ours, theirs"):
        compare_areas(Comparison("", "ours", "nobody", "area", 0.02, smaller_is_better=True), areas, range(FOLDS))


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="not installed (extra vision): onnxruntime")
def test_a_study_is_trained_and_judged_on_people_it_has_not_seen(tmp_path, monkeypatch):
    for module in (callbacks, paired_report):
        monkeypatch.setattr(module, "plot", lambda *_: None)
    monkeypatch.setattr(face_quality_study, "plot_curves", lambda *_: None)
    monkeypatch.setattr(face_quality_study, "ROUNDS", 10)
    compared = {"claim": "", "figure": "area", "smallest_effect": 0.02, "smaller_is_better": True}
    judge = load_recogniser(RecogniserOptions(str(write_colour_recogniser(tmp_path / "colours.onnx"))))
    tables = {
        "study": {
            "seeds": [0, 1, 2], "variants": {"wide": {"model": {"width": 2}}, "taught": {}}, "beside": ["brightness"],
            "comparisons": [{**compared, "variant": "taught", "against": "brightness"}],
        },
        "recogniser": {"path": str(tmp_path / "colours.onnx")},
        "data": {
            "kind": "london_faces", "copies": 8, "folds": 3, "features": str(tmp_path / "features"),
            "root": str(write_london(tmp_path / "london", ("001", "002", "003", "004", "115", "116"))),
        },
        "labels": {"min_raw": -1.0},
        "training": {
            "output": str(tmp_path / "study"), "steps": 1, "batch_size": 8, "log_every": 1, "evaluate_every": 100,
            "save_every": 100, "threads": 1,
        },
    }  # fmt: skip
    tables["study"]["variants"]["taught"] = {"teacher": {"path": str(tmp_path / "study/wide/seed_{seed}/model")}}
    cells = expand(tables)
    run_study(cells[:4], train_face_quality, tmp_path / "study")
    with pytest.raises(PairingError, match="wide/seed_2 NOT RUN"):
        evaluate_folds(tables, cells, judge, 0.1, "command", tmp_path / "report.json")
    run_study(cells, train_face_quality, tmp_path / "study")
    report = evaluate_folds(tables, cells, judge, 0.1, "command", tmp_path / "report.json")
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert (report["conditions"]["people"], report["conditions"]["mated"]) == (6, 6 * 8 * 8)
    assert {"wide", "taught", "brightness", "random", "label"} <= report["conditions"]["areas"].keys()
    assert len(report["comparisons"][0]["differences"]) == 3
    assert len(list((tmp_path / "features").iterdir())) == 9, "what the recogniser said is kept for all variants"
