"""Detectors compared: the table, curves and gains of mining that come out of a study."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.training.callbacks import HISTORY_FILE
from kernels.training.study import FINISHED, NOT_RUN, Cell, Spread, read_outcome, summarise_seeds
from kernels.training.study_report import spread
from vision.detection.checkpoint import load_detector
from vision.detection.report import REPORT_FILE, evaluate_source
from vision.serving.folder import WEIGHTS_FILE
from vision.tasks.detection_recipe import DetectorRecipe

MODEL, EVALUATION = "model", "evaluation"
FIGURES = ("map50", "map60", "map70", "map")

Measure = Callable[[Cell], dict[str, Any]]


@dataclass(frozen=True)
class DetectorStudyRow:
    """One variant over its finished seeds; every figure is None where no seed is finished.

    ``map50``, ``map60``, ``map70`` and ``map`` are those of ``DetectorReport``, ``per_class`` its ``ap50`` by class
    name. ``gain50`` is the difference in ``map50`` to ``baseline``, the variant without mining of the same network and
    data, seed by seed. ``seconds`` is the time of a training; ``seeds`` says for each how it stands. ``curves`` holds
    for each seed (step, map50) in the course of training.
    """

    variant: str
    baseline: str | None
    map50: Spread | None
    map60: Spread | None
    map70: Spread | None
    map: Spread | None
    per_class: dict[str, Spread]
    gain50: Spread | None
    seconds: Spread | None
    seeds: dict[int, str]
    curves: dict[int, list[tuple[int, float]]]


def measure_cell(cell: Cell) -> dict[str, Any]:
    """The ``DetectorReport`` of a finished cell, as JSON has it, over the evaluation split of its recipe.

    Curves and pictures lie beside it in the cell's folder ``evaluation``; what is there of these weights is read.
    Errors: CheckpointError, DataError.
    """
    weights, folder = cell.output / MODEL / WEIGHTS_FILE, cell.output / EVALUATION
    file = folder / REPORT_FILE
    if not file.is_file() or file.stat().st_mtime < weights.stat().st_mtime:
        loaded = load_detector(weights.parent)
        source = DetectorRecipe.parse(cell.recipe).data.open_eval(loaded.config.class_names)
        evaluate_source(loaded, source, output=folder)
    measured: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return measured


def study_rows(cells: Sequence[Cell], measure: Measure = measure_cell) -> list[DetectorStudyRow]:
    """A row for each variant, in the study's order.

    Errors: RecipeError, also for a cell whose recipe has changed since it was trained; those of ``measure``.
    """
    outcomes = {(cell.variant, cell.seed): read_outcome(cell) for cell in cells}
    finished = [cell for cell in cells if outcomes[cell.variant, cell.seed].status == FINISHED]
    reports = {(cell.variant, cell.seed): measure(cell) for cell in finished}
    baselines = baseline_of(cells)
    rows = []
    for variant in dict.fromkeys(cell.variant for cell in cells):
        own = {seed: report for (name, seed), report in reports.items() if name == variant}
        base = {seed: report for (name, seed), report in reports.items() if name == baselines[variant]}
        rows.append(
            DetectorStudyRow(
                variant=variant,
                baseline=baselines[variant],
                map50=spread([report["map50"] for report in own.values()]),
                map60=spread([report["map60"] for report in own.values()]),
                map70=spread([report["map70"] for report in own.values()]),
                map=spread([report["map"] for report in own.values()]),
                per_class=by_class(list(own.values())),
                gain50=spread([own[seed]["map50"] - base[seed]["map50"] for seed in own if seed in base]),
                seconds=spread([outcomes[variant, seed].seconds for seed in own]),
                seeds={seed: outcome.status for (name, seed), outcome in outcomes.items() if name == variant},
                curves={cell.seed: curve(cell) for cell in finished if cell.variant == variant},
            )
        )
    return rows


def by_class(reports: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
    """AP50 of every class that has boxes."""
    names = dict.fromkeys(name for report in reports for name in report["per_class"])
    found = {name: spread([report["per_class"][name]["ap50"] for report in reports]) for name in names}
    return {name: area for name, area in found.items() if area is not None}


def baseline_of(cells: Sequence[Cell]) -> dict[str, str | None]:
    """For each variant that mines the one of the same network and data that does not; None where there is none."""
    recipes = {cell.variant: DetectorRecipe.parse(cell.recipe) for cell in cells}
    unmined = {name: recipe for name, recipe in recipes.items() if not is_mined(recipe)}
    return {
        name: next((base for base, other in unmined.items() if same_host(recipe, other) and base != name), None)
        if is_mined(recipe)
        else None
        for name, recipe in recipes.items()
    }


def is_mined(recipe: DetectorRecipe) -> bool:
    """Whether examples are chosen or weighted; YOLOv2 has no regions to choose from."""
    regions = recipe.mining.regions if recipe.model.architecture == "thundernet" else "none"
    return (regions, recipe.mining.map) != ("none", "none")


def same_host(recipe: DetectorRecipe, other: DetectorRecipe) -> bool:
    """Whether two recipes train the same network on the same data."""
    return (recipe.model, recipe.data, recipe.augmentation) == (other.model, other.data, other.augmentation)


def curve(cell: Cell) -> list[tuple[int, float]]:
    """(step, map50) of every evaluation during a cell's training."""
    history = json.loads((cell.output / HISTORY_FILE).read_text(encoding="utf-8"))
    return [(int(entry["step"]), float(entry["eval_map50"])) for entry in history if "eval_map50" in entry]


def write_study(rows: Sequence[DetectorStudyRow], cells: Sequence[Cell], file: Path) -> dict[str, Any]:
    """Table and conditions as JSON in ``file``, a plot beside it (``.png``); returns the JSON object."""
    recipe = DetectorRecipe.parse(cells[0].recipe)
    report = {
        "conditions": {
            "data": Path(recipe.data.root).name, "split": recipe.data.eval_split, "steps": recipe.training.steps,
            "batch_size": recipe.training.batch_size, "threads": recipe.training.threads,
        },
        "rows": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(rows, file.with_suffix(".png"))
    return report


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables of a report's ``rows`` in Markdown: figures, then AP50 by class of what is finished."""
    lines = [
        "| variant | mAP50 | mAP60 | mAP70 | COCO mAP | gain in mAP50 | seconds | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seeds = summarise_seeds(row["seeds"])
        gain = "-" if row["gain50"] is None else number(row["gain50"], signed=True)
        seconds = "-" if row["seconds"] is None else f"{row['seconds']['mean']:.0f}"
        figures = " | ".join(number(row[figure]) for figure in FIGURES)
        lines.append(f"| {row['variant']} | {figures} | {gain} | {seconds} | {seeds} |")
    classes = list(dict.fromkeys(name for row in rows for name in row["per_class"]))
    if classes:
        lines += ["", f"| AP50 | {' | '.join(classes)} |", f"|---|{'---|' * len(classes)}"]
        lines += [
            f"| {row['variant']} | {' | '.join(number(row['per_class'].get(name)) for name in classes)} |"
            for row in rows
            if row["per_class"]
        ]
    return "\n".join(lines)


def number(spread: Mapping[str, Any] | None, signed: bool = False) -> str:
    """A mean with its deviation where there is more than one run."""
    if spread is None:
        return NOT_RUN
    deviation = f" ± {spread['std']:.3f}" if spread["runs"] > 1 else ""
    return f"{spread['mean']:{'+' if signed else ''}.3f}{deviation}"


def plot(rows: Sequence[DetectorStudyRow], file: Path) -> None:
    """mAP at three overlaps with its deviation, and the course of mAP50, of the variants with a finished seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    shown = [row for row in rows if row.map50 is not None]
    for place, row in enumerate(shown):
        for offset, name in zip((-0.15, 0.0, 0.15), FIGURES[:3], strict=True):
            found: Spread = getattr(row, name)
            colour = f"C{FIGURES.index(name)}"
            label = name.replace("map", "mAP") if place == 0 else None
            left.errorbar(place + offset, found.mean, found.std, marker="o", capsize=3, color=colour, label=label)
        for seed, points in row.curves.items():
            label = row.variant if seed == min(row.curves) else None
            right.plot(*zip(*points, strict=True), color=f"C{place}", label=label, alpha=0.8)
    left.set(ylabel="mean and deviation over seeds")
    left.set_xticks(range(len(shown)), [row.variant for row in shown], rotation=20, ha="right", fontsize="small")
    right.set(xlabel="step", ylabel="mAP50, a line for each seed")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if shown:
            axis.legend(fontsize="small")
    figure.savefig(file, dpi=110)
