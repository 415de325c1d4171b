"""Commands over trained models: they reach the library with what the user gave, and print JSON last."""

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app

RUNNER = CliRunner()


@dataclasses.dataclass(frozen=True)
class Report:
    given: list[str]


def recorded(*given: object) -> Report:
    return Report([str(value) for value in given])


def test_classifier_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import vision.evaluate
    import vision.export
    import vision.tasks.classification as classification

    monkeypatch.setattr(vision.evaluate, "evaluate_classifier", lambda *a, **k: recorded(*a, *k.values()))
    monkeypatch.setattr(vision.export, "export_classifier", lambda *a, **k: recorded(*a, *k.values()))
    monkeypatch.setattr(classification, "train_classifier", lambda r, resume: recorded(r["data"]["kind"], resume))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[data]\nkind = "idx"\n')
    for arguments, given in (
        (["eval", "classifier", str(tmp_path), str(tmp_path), "--kind", "idx", "--split", "t10k"],
         [tmp_path, "idx", tmp_path, "t10k", 64]),
        (["export", "classifier", str(tmp_path), str(tmp_path / "x.onnx")], [tmp_path, tmp_path / "x.onnx", None]),
        (["train", "classifier", str(recipe), "--resume"], ["idx", True]),
    ):  # fmt: skip
        result = RUNNER.invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout.splitlines()[-1])["given"] == [str(value) for value in given]


def test_kernel_benchmarks_are_reserved_words_of_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from server.bench import kernel_report

    seen = []
    monkeypatch.setattr(kernel_report, "bench_kernels", lambda *given: seen.append(given) or {"results": []})
    monkeypatch.setattr(kernel_report, "table", lambda report: "table")
    monkeypatch.setattr(kernel_report, "remarks", lambda report: ["remark"])
    file = tmp_path / "kernels.json"
    words = ["--rows", "1,8", "--weights", "int4", "--scopes", "model", "--contexts", "64", "--layers", "4"]
    result = RUNNER.invoke(app, ["bench", "kernels", *words, "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text()) == json.loads(result.stdout.splitlines()[-1]) == {"results": []}
    options, scopes, contexts, _ = seen[0]
    assert (options.weights, options.rows, options.layers, scopes, contexts) == (["int4"], [1, 8], 4, ["model"], [64])
    assert "bench diagonalwise" in RUNNER.invoke(app, ["bench", "--help"]).output
    assert RUNNER.invoke(app, ["bench", "diagonalwise", "--help"]).exit_code == 0
