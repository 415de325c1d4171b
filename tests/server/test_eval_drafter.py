"""``dovetail eval drafter`` and ``eval drafter-study`` from the command line, on tiny saved models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal
from typer.testing import CliRunner, Result

from doubles import save_word_tokenizer, tiny_llama
from drafters.checkpoint import save_drafter
from drafters.network import DovetailConfig, DovetailNetwork
from server.cli import app

RUNNER = CliRunner()
SHORT = ("--limit", "1", "--max-tokens", "8", "--repeats", "1", "--threads", "1")

STUDY = """
[study]
seeds = [0, 1]
variants = { linear = { drafter = { fusion = "linear" } }, dgf = {} }
[drafter]
intermediate_size = 32
num_heads = 2
num_kv_heads = 1
[data]
target = "TARGET"
tokens = "tokens.npy"
[training]
output = "OUTPUT"
steps = 4
"""


@pytest.fixture(scope="module")
def target(save_model: Callable[..., Path]) -> Path:
    folder = save_model(tiny_llama(), "eval_target")
    save_word_tokenizer(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "word1 word2 word3 word4"}\n')
    return file


def save_random_drafter(folder: Path, fusion: str = "dgf") -> Path:
    torch.manual_seed(0)
    save_drafter(DovetailNetwork(DovetailConfig(64, 67, 32, 2, 1, 32, fusion=fusion)), folder)
    return folder


def invoke(*arguments: object) -> Result:
    return RUNNER.invoke(app, ["eval", *map(str, arguments)])


def json_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, (result.output, result.exception)
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return report


def test_drafters_are_measured_by_name_and_folder(target: Path, prompts: Path, tmp_path: Path) -> None:
    folder = save_random_drafter(tmp_path / "drafter")
    file, picture = tmp_path / "report.json", tmp_path / "report.png"
    given = ("drafter", folder, "ngram", "--target", target, "--suite", prompts, *SHORT)
    report = json_of(invoke(*given, "--grid", "2x1x4,1x0x2", "--json", file, "--plot", picture))
    assert [entry["drafter"] for entry in report["drafters"]] == [str(folder), "ngram"]
    for entry in report["drafters"]:
        assert [(one["top_k"], one["depth"], one["rows"]) for one in entry["settings"]] == [(2, 1, 4), (1, 0, 2)]
        assert all(one["equal_texts"] == one["texts"] == 1 for one in entry["settings"])
    assert json.loads(file.read_text()) == report
    assert picture.stat().st_size > 0


def test_what_cannot_be_measured_is_refused(target: Path, prompts: Path, tmp_path: Path) -> None:
    on_target = ("--target", target, "--suite", prompts, *SHORT)
    for names, message in ((["none"], "cannot be measured"), (["ngram", "ngram"], "each once"),
                           ([], "name the drafters"), ([tmp_path / "nowhere"], "neither a folder")):  # fmt: skip
        assert message in refusal("eval", "drafter", *names, *on_target)
    for option, value, message in (("--grid", "4x5", "no tree size"), ("--grid", "4x5x1", "at least 2 rows"),
                                   ("--json", tmp_path / "no" / "x.json", "does not exist")):  # fmt: skip
        assert message in refusal("eval", "drafter", "ngram", *on_target, option, value)


def test_study_measures_what_is_finished_and_marks_the_rest(target: Path, prompts: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "study.toml"
    recipe.write_text(STUDY.replace("TARGET", str(target)).replace("OUTPUT", str(tmp_path / "runs")))
    given = ("drafter-study", recipe, "--json", tmp_path / "page.json", "--suite", prompts, "--grid", "2x1x4", *SHORT)
    result = invoke(*given)
    assert "no cell of the study is finished" in str(result.exception)
    cell = tmp_path / "runs" / "linear" / "seed_1"
    save_random_drafter(cell / "drafter", "linear")
    (cell / "checkpoint-4").mkdir()
    (cell / "checkpoint-4" / "trainer_state.json").write_text("{}")
    report = json_of(invoke(*given))
    assert json.loads((tmp_path / "page.json").read_text()) == report
    assert [(one["variant"], one["status"], one["seeds"]) for one in report["variants"]] == [
        ("linear", "finished", [1]), ("dgf", "NOT RUN", []),
    ]  # fmt: skip
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| dgf | dgf | 1 | - | NOT RUN |" in page and "1 of 2" in page
    command = f"dovetail eval drafter-study {recipe} --json {tmp_path / 'page.json'} --suite {prompts} --limit 1"
    assert command in page and report["command"].endswith("--grid 2x1x4 --repeats 1 --threads 1")
    assert (tmp_path / "page.png").stat().st_size > 0


def test_studies_of_drafters_train_from_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import server.feature_source
    from kernels.training import TrainingReport

    seen = []

    def train(recipe: dict[str, Any], resume: bool) -> TrainingReport:
        seen.append((recipe["drafter"].get("fusion"), recipe["training"]["seed"], resume))
        return TrainingReport({"loss": 1.0}, {}, 1.0, "there", finished=True)

    monkeypatch.setattr(server.feature_source, "DrafterTraining", train)
    recipe = tmp_path / "study.toml"
    (tmp_path / "tokens.npy").touch()  # that there are data is looked at first
    tokens = str(tmp_path / "tokens.npy")
    recipe.write_text(STUDY.replace("OUTPUT", str(tmp_path / "runs")).replace("tokens.npy", tokens))
    for _ in range(2):  # the second time everything is finished
        result = RUNNER.invoke(app, ["study", "drafter", str(recipe), "--only", "linear"])
        cells = json.loads(result.stdout.splitlines()[-1])["cells"]
        assert [cell["status"] for cell in cells] == ["finished", "NOT RUN", "finished", "NOT RUN"]
    assert seen == [("linear", 0, False), ("linear", 1, False)]
