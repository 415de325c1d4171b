"""A study's report: which cells count as run, figures over seeds, what was not run, and the papers' claims."""

import json
from pathlib import Path
from typing import Any

import pytest

import drafters.recipes
from drafters.network import DovetailConfig
from drafters.train.feature_source import DataOptions
from drafters.train.options import LossOptions
from kernels.training import TrainingOptions, load_recipe, take_table
from kernels.training.study import Cell, expand
from server.bench.drafter_study import (
    Claim,
    differences,
    finished_folders,
    judged_claims,
    num_tokens,
    spread,
    status_of,
    study_report,
)
from server.bench.drafter_study_page import markdown, plot_study
from server.bench.texts import BenchError

RECIPES = Path(next(iter(drafters.recipes.__path__)))


def create_cells(folder: Path) -> list[Cell]:
    return expand(
        {
            "study": {
                "seeds": [0, 1],
                "variants": {"linear": {"drafter": {"fusion": "linear"}}, "dgf": {}, "deep": {}},
            },
            "drafter": {"intermediate_size": 8, "num_heads": 1, "num_kv_heads": 1},
            "data": {"target": "tiny", "tokens": "tokens.npy", "window_length": 16},
            "training": {"output": str(folder), "steps": 12, "batch_size": 4},
        }
    )


def finish(cell: Cell, step: int = 12, **changes: Any) -> None:
    """What a training leaves behind."""
    checkpoint = cell.output / f"checkpoint-{step}"
    for folder in (checkpoint, cell.output / "drafter"):
        folder.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (cell.output / "drafter" / "config.json").write_text("{}")
    recipe = {**cell.recipe, "training": {**cell.recipe["training"], **changes}}
    (cell.output / "recipe.json").write_text(json.dumps({"sha256": "", "recipe": recipe}))


def figures(length: float, ece: float | None = 0.1) -> dict[str, Any]:
    return {
        "top_k": 4, "depth": 5, "rows": 16, "acceptance_length": length, "tokens_per_s": 10 * length,
        "speedup": length / 2, "draft_ms_per_step": 1.5, "draft_ms_per_round": 8.0,
        "acceptance_per_depth": [{"depth": 1, "share": 0.8}, {"depth": 2, "share": 0.6}][: int(length)],
        "calibration": None if ece is None else {"ece": ece},
    }  # fmt: skip


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    """linear ran with both seeds, dgf with seed 0, dgf's seed 1 was interrupted, deep was never begun."""
    cells = create_cells(tmp_path)
    by_name = {cell.name: cell for cell in cells}
    finish(by_name["linear/seed_0"])
    finish(by_name["linear/seed_1"], learning_rate=0.5, save_every=1)
    finish(by_name["dgf/seed_0"])
    finish(by_name["dgf/seed_1"], step=8)
    return cells


@pytest.fixture
def report(cells: list[Cell]) -> dict[str, Any]:
    lengths = dict(zip(finished_folders(cells), (2.0, 4.0, 1.0), strict=True))  # seeds vary slowest
    return study_report(
        cells,
        {
            "target": {"name": "tiny", "num_parameters": 11_100_000, "weights": "fp32"},
            "hardware": {"cpu": "A chip", "threads": 2},
            "conditions": {
                "suite": "humaneval", "texts": 3, "max_tokens": 32, "repeats": 1, "temperature": 0,
                "interrupted": False,
            },
            "plain": {"tokens_per_s": 7.0},
            "ngram": figures(1.5),
            "repeated_4gram_share": 0.5,
            "drafters": [{"drafter": folder, "settings": [figures(length)]} for folder, length in lengths.items()],
        },
    )  # fmt: skip


def test_status_is_what_lies_in_the_folder(cells: list[Cell]) -> None:
    assert {cell.name: status_of(cell) for cell in cells} == {
        "linear/seed_0": "finished", "linear/seed_1": "finished", "dgf/seed_0": "finished",
        "dgf/seed_1": "interrupted", "deep/seed_0": "NOT RUN", "deep/seed_1": "NOT RUN",
    }  # fmt: skip


def test_no_finished_cell_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="dovetail study drafter"):
        finished_folders(create_cells(tmp_path / "empty"))


def test_only_differences_that_change_weights_are_told(cells: list[Cell]) -> None:
    told = {cell.name: differences(cell) for cell in cells if status_of(cell) == "finished"}
    assert told == {
        "linear/seed_0": [], "dgf/seed_0": [],
        "linear/seed_1": ["training.learning_rate = 0.5 instead of None"],
    }  # fmt: skip


def test_figures_are_over_the_seeds_that_ran(report: dict[str, Any]) -> None:
    linear, dgf, deep = report["variants"]
    assert (linear["variant"], linear["fusion"], linear["seeds"], linear["seeds_not_run"]) == (
        "linear",
        "linear",
        [0, 1],
        [],
    )
    assert linear["settings"][0]["acceptance_length"] == {"mean": 1.5, "std": 0.7071, "values": [2.0, 1.0]}
    assert linear["settings"][0]["acceptance_per_depth"] == [0.8, 0.6]
    assert (dgf["seeds"], dgf["seeds_not_run"]) == ([0], [1])
    assert dgf["settings"][0]["acceptance_length"] == {"mean": 4.0, "std": None, "values": [4.0]}
    assert (deep["status"], deep["settings"], deep["seeds_not_run"]) == ("NOT RUN", [], [0, 1])
    assert [run["status"] for run in report["runs"]].count("NOT RUN") == 2
    assert {run["tokens"] for run in report["runs"] if "tokens" in run} == {12 * 4 * 16}
    assert "drafters" not in report and json.dumps(report)


def test_page_marks_what_was_not_run(report: dict[str, Any]) -> None:
    page = markdown(report, "dovetail eval drafter-study x.toml", "ablation.png")
    (row,) = [line for line in page.splitlines() if line.startswith("| deep")]
    assert "NOT RUN" in row
    assert (
        "| linear | linear | 1 | - | 2 of 2 | 4x5x16 | 1.50 ± 0.71 | 1.50 ± 0.00 | 15.0 ± 7.1 | 0.75 ± 0.35 |" in page
    )
    assert "| dgf | dgf | 1 | - | 1 of 2 | 4x5x16 | 4.00 |" in page
    assert "linear seed 1: training.learning_rate = 0.5 instead of None" in page
    assert "dovetail eval drafter-study x.toml" in page and "(ablation.png)" in page and "one seed" in page
    widths = {line.count("|") for line in page.split("## Against")[0].splitlines() if line.startswith("|")}
    assert len(widths) == 1, "every line of the table has as many cells"
    talks = markdown({**report, "packed": False}, "", "")
    assert "trained on 0.00 M tokens" in page and "trained on at most 0.00 M tokens" in talks


def test_plot_is_drawn_with_gaps(report: dict[str, Any], tmp_path: Path) -> None:
    plot_study(report, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"


def test_spread() -> None:
    assert spread([]) is None
    assert spread([1.0]) == {"mean": 1.0, "std": None, "values": [1.0]}
    assert spread([1.0, 2.0, 3.0]) == {"mean": 2.0, "std": 1.0, "values": [1.0, 2.0, 3.0]}


@pytest.mark.parametrize(
    ("first", "second", "verdict", "difference"),
    [
        ([1.0, 1.2], [1.3, 1.4], "agrees", 0.25),
        ([1.3, 1.4], [1.0, 1.2], "disagrees", -0.25),
        ([1.0, 1.3], [1.2, 1.5], "within the spread", 0.2),
        ([1.0], [1.2, 1.5], "one seed", 0.35),
    ],
)
def test_claims_are_judged_by_the_seeds_ranges(
    first: list[float], second: list[float], verdict: str, difference: float
) -> None:
    variants = [
        {"variant": name, "settings": [{"acceptance_length": spread(values)}]}
        for name, values in (("a", first), ("b", second))
    ]
    claims = [Claim("a", "b", "acceptance_length", "b is better"), Claim("a", "c", "acceptance_length", "not run")]
    (judged,) = judged_claims(variants, claims)
    assert judged["verdict"] == verdict and judged["difference"] == pytest.approx(difference)


def test_the_committed_matrix_is_the_whole_ablation() -> None:
    cells = expand(load_recipe(RECIPES / "ablation.toml"))
    assert len(cells) == 6 * 2 * 3
    shapes = {cell.variant: DovetailConfig(192, 4096, head_dim=64, **cell.recipe["drafter"]) for cell in cells}
    losses = {cell.variant: take_table(cell.recipe, "loss", LossOptions) for cell in cells}
    assert {name: shape.num_blocks for name, shape in shapes.items() if not name.endswith("ttt")} == {
        "linear": 1, "dgf": 1, "dgf_1": 2, "dgf_2": 3, "dgf_3": 4, "dgf_4": 5,
    }  # fmt: skip
    assert {name for name, shape in shapes.items() if shape.fusion == "linear"} == {"linear", "linear_ttt"}
    for name in ("linear", "dgf", "dgf_1", "dgf_2", "dgf_3", "dgf_4"):
        assert shapes[name] == shapes[f"{name}_ttt"]
        assert (losses[name], losses[f"{name}_ttt"]) == (LossOptions(), LossOptions(unrolled_steps=3))
    assert {num_tokens(cell.recipe) for cell in cells} == {488 * 16 * 256}
    for cell in cells:
        take_table(cell.recipe, "data", DataOptions)
        assert take_table(cell.recipe, "training", TrainingOptions).output == f"runs/ablation/{cell.name}"
