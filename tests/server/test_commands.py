"""Commands over trained models: they reach the library with what the user gave, and print JSON last."""

import dataclasses
import json
import logging
import re
import shutil
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from command_line import refusal, run
from typer.main import get_command
from typer.testing import CliRunner

from kernels.training import RecipeError, TrainingReport, study
from kernels.training.options import check_data, load_recipe
from server.cli import app
from server.commands import bench
from server.launch import ASSETS

RUNNER = CliRunner()


@dataclasses.dataclass(frozen=True)
class Report:
    given: list[str]


def recorded(*given: object) -> Report:
    return Report([str(value) for value in given])


def test_classifier_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import vision.measure.classification
    import vision.tasks.classification as classification

    monkeypatch.setattr(vision.measure.classification, "evaluate_classifier", lambda *a, **k: recorded(*a, *k.values()))
    monkeypatch.setattr(classification, "train_classifier", lambda r, resume: recorded(r["data"]["kind"], resume))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[data]\nkind = "idx"\n')
    for arguments, given in (
        (["eval", "classifier", str(tmp_path), str(tmp_path), "--kind", "idx", "--split", "t10k"],
         [tmp_path, "idx", tmp_path, "t10k", 64]),
        (["train", "classifier", str(recipe), "--resume"], ["idx", True]),
    ):  # fmt: skip
        result = RUNNER.invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout.splitlines()[-1])["given"] == [str(value) for value in given]


STUDY = """
[study]
[study.variants]
small.model.backbone = "fd_mobilenet_x0_25"
large.model.backbone = "mobilenet_v1_x0_25"
[training]
output = "runs/study"
"""


def test_study_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import vision.tasks.classification as classification
    import vision.tasks.study as classifier_study

    report = TrainingReport({"top1": 0.5}, {}, 1.0, "checkpoint", finished=True)
    monkeypatch.setattr(classification, "train_classifier", lambda recipe, *, resume: report)
    monkeypatch.setattr(classifier_study, "study_rows", list)
    monkeypatch.setattr(classifier_study, "markdown", lambda rows: f"{len(rows)} rows")
    monkeypatch.setattr(
        classifier_study, "write_study", lambda rows, cells, hardware, file: {"rows": [c.name for c in cells]}
    )
    recipe, folder = tmp_path / "study.toml", tmp_path / "out"
    recipe.write_text(STUDY)
    result = RUNNER.invoke(app, ["study", "classifier", str(recipe), "--output", str(folder), "--only", "large"])
    assert result.exit_code == 0, result.output
    cells = json.loads(result.stdout.splitlines()[-1])["cells"]
    assert [cell["status"] for cell in cells] == ["NOT RUN", "finished"]
    assert json.loads((folder / "study.json").read_text())["cells"] == cells
    result = RUNNER.invoke(app, ["eval", "classifier-study", str(recipe), "--json", str(tmp_path / "study.json")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["rows"] == ["small/seed_0", "large/seed_0"]


def test_the_study_of_detectors_takes_parts_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import vision.tasks.detection_study as detector_study

    monkeypatch.setattr(detector_study, "study_rows", list)
    monkeypatch.setattr(detector_study, "markdown", lambda rows: f"{len(rows)} rows")
    monkeypatch.setattr(
        detector_study, "write_study", lambda rows, cells, file: {"rows": [f"{c.output}" for c in cells]}
    )
    recipe, folder = tmp_path / "study.toml", tmp_path / "out"
    recipe.write_text(STUDY)
    given = ["--json", str(tmp_path / "study.json"), "--output", str(folder), "--only", "small"]
    result = RUNNER.invoke(app, ["eval", "detector-study", str(recipe), *given])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["rows"] == [str(folder / "small" / "seed_0")]


COMPARISON = """
[study]
seeds = [0, 1, 2]
[[study.comparisons]]
claim = "large is better"
variant = "large"
against = "small"
figure = "top1"
smallest_effect = 0.1
[study.variants]
small.student.hidden = 2
large.student.hidden = 4
[training]
output = "nowhere"
"""


def test_a_study_of_pairs_is_compared_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kernels.training.paired import PairingError
    from vision.tasks import perceptrons

    def train(cells: list[study.Cell], folder: Path) -> list[study.Outcome]:
        for cell in cells:
            final = {"top1": cell.recipe["student"]["hidden"] / 10 + cell.seed / 100}
            report = {"recipe": cell.recipe, "final": final, "best": {}, "seconds": 1.0, "checkpoint": ""}
            study.write_json(report, cell.output / study.REPORT_FILE)
        return study.write_outcomes(cells, folder)

    monkeypatch.setattr(perceptrons, "train_together", train)
    recipe, folder = tmp_path / "pairs.toml", tmp_path / "out"
    recipe.write_text(COMPARISON)
    compare = ["eval", "paired-study", str(recipe), "--output", str(folder), "--json", str(tmp_path / "pairs.json")]
    early = RUNNER.invoke(app, compare)
    assert isinstance(early.exception, PairingError)
    assert "6 of 6 trainings are not finished: small/seed_0 NOT RUN" in str(early.exception)
    trained = RUNNER.invoke(app, ["study", "perceptrons", str(recipe), "--output", str(folder)])
    assert len(json.loads(trained.stdout.splitlines()[-1])["cells"]) == 6
    result = RUNNER.invoke(app, compare)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["comparisons"][0]["verdict"] == "shown"
    assert report["comparisons"][0]["mean"] == pytest.approx(0.2)
    assert (tmp_path / "pairs.png").is_file()


def test_a_study_is_not_a_training(tmp_path: Path) -> None:
    recipe = tmp_path / "study.toml"
    recipe.write_text(STUDY)
    result = RUNNER.invoke(app, ["train", "classifier", str(recipe)])
    assert isinstance(result.exception, RecipeError)
    assert "is a study: dovetail study classifier" in str(result.exception)


def test_kernel_benchmarks_are_reserved_words_of_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kernels import native
    from server.bench import kernel_report

    seen, nothing = list[Any](), {"results": [], "parts": [], "beside": []}
    sets: list[str] = []

    def measured(*given: object) -> dict[str, Any]:
        seen.append(given)
        sets.append(native.instruction_set())
        return dict(nothing)

    monkeypatch.setattr(kernel_report, "bench_kernels", measured)
    monkeypatch.setattr(kernel_report, "tables", lambda report: ["table"])
    monkeypatch.setattr(kernel_report, "remarks", lambda report: ["remark"])
    file = tmp_path / "kernels.json"
    words = [
        "--rows",
        "1,8",
        "--weights",
        "int4",
        "--scopes",
        "model",
        "--contexts",
        "64",
        "--layers",
        "4",
        "--beside",
        "2",
    ]
    result = RUNNER.invoke(app, ["bench", "kernels", *words, "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text()) == json.loads(result.stdout.splitlines()[-1]) == nothing
    options, scopes, contexts, busy, _ = seen[0]
    assert (options.weights, options.rows, options.layers) == (["int4"], [1, 8], 4)
    assert (scopes, contexts, busy) == (["model"], [64], [2])
    if native.library() is not None:
        usual, portable = native.instruction_set(), native.available_instruction_sets()[-1]
        assert RUNNER.invoke(app, ["bench", "kernels", "--instruction-set", portable]).exit_code == 0
        assert (sets, native.instruction_set()) == ([usual, portable], usual)
        assert "this machine has" in refusal("bench", "kernels", "--instruction-set", "mmx")
    assert {"kernels", "diagonalwise", "vision", "distillation"} <= set(get_command(bench.app).commands)
    assert "diagonal-wise" in refusal("bench", "diagonal-wise"), "any other word is a target"


def test_detector_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import vision.detection.report as report
    import vision.tasks.detection as detection

    monkeypatch.setattr(report, "evaluate_detector", lambda *a, **k: recorded(*a, *k.values()))
    monkeypatch.setattr(report, "markdown", lambda given: "| class |")
    monkeypatch.setattr(detection, "train_detector", lambda r, resume: recorded(r["data"]["kind"], resume))
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text('[data]\nkind = "coco"\n')
    for arguments, given in (
        (["eval", "detector", str(tmp_path), str(tmp_path), "--kind", "coco", "--split", "val2017"],
         [tmp_path, "coco", tmp_path, "val2017", None, 8, []]),
        (["eval", "detector", str(tmp_path), str(tmp_path), "--output", str(out), "--batch-size", "2"],
         [tmp_path, "voc", tmp_path, "test", out, 2, []]),
        (["train", "detector", str(recipe), "--resume"], ["coco", True]),
    ):  # fmt: skip
        result = RUNNER.invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout.splitlines()[-1])["given"] == [str(value) for value in given]

    study = tmp_path / "study.toml"
    study.write_text(STUDY)
    refused = RUNNER.invoke(app, ["train", "detector", str(study)])
    assert isinstance(refused.exception, RecipeError) and "dovetail study detector" in str(refused.exception)
    finished = TrainingReport({"map50": 0.5}, {}, 1.0, "checkpoint", finished=True)
    monkeypatch.setattr(detection, "train_detector", lambda recipe, *, resume: finished)
    result = RUNNER.invoke(app, ["study", "detector", str(study), "--output", str(out)])
    cells = json.loads(result.stdout.splitlines()[-1])["cells"]
    assert [cell["final"] for cell in cells] == [{"map50": 0.5}] * 2


ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = sorted(ROOT.glob("vision/recipes/**/*.toml")) + sorted(ROOT.glob("drafters/recipes/*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_say_where_absent_data_come_from(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = tomllib.loads(recipe.read_text(encoding="utf-8")).get("data", {})
    monkeypatch.chdir(tmp_path)
    made = data.get("kind") in ("textures", "needles", "shapes")  # from a seed: nothing can be absent
    if made or not {"root", "tokens", "conversations"} & set(data):
        return check_data(recipe)
    missing = data.get("root") or data.get("tokens") or data["conversations"]
    with pytest.raises(RecipeError, match=f"data.* {re.escape(missing)}") as refused:
        check_data(recipe)
    assert f"they come from: {data['source']}" in str(refused.value)
    assert "source" not in load_recipe(recipe)["data"]


def test_absent_data_end_a_training_before_it_begins(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[data]\nkind = "voc"\nroot = "no/such/folder"\nsource = "a friend"\n')
    for command in ("train", "study"):
        assert "data.root is no/such/folder" in refusal(command, "detector", recipe)


@pytest.mark.skipif(find_spec("onnxscript") is None, reason="not installed (extra vision): onnxscript")
def test_exports_print_their_report_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(ASSETS / "face_quality", tmp_path / "scorer")
    caplog.set_level(logging.INFO)
    result = run("export", "face-quality", tmp_path / "scorer", tmp_path / "scorer.onnx")
    assert json.loads(result.stdout)["precision"] == "fp32"
    assert result.stderr == "" and caplog.messages == []
