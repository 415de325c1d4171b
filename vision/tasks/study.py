"""Classifiers compared: the table of accuracy against cost that comes out of a study."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.diagonalwise.timing import Step, Timing, compare
from kernels.training.study import NOT_RUN, Cell, Spread, read_outcome, spread_over_seeds, summarise_seeds
from vision.backbones import create_backbone
from vision.backbones.backbone import Backbone
from vision.backbones.complexity import count
from vision.tasks.classification import ClassifierRecipe

WARMUPS, REPEATS = 10, 50

Compare = Callable[[Mapping[str, Step], torch.device, int, int], Mapping[str, Timing]]


@dataclass(frozen=True)
class StudyRow:
    """One network: its size at the study's image size, its latency, its accuracy over the seeds that are finished.

    ``latency`` is for one image on one CPU thread. ``top1`` and ``top5`` are None where no seed is finished; ``seeds``
    says for each how its training stands.
    """

    variant: str
    backbone: str
    parameters: int
    macs: int
    latency: Timing
    top1: Spread | None
    top5: Spread | None
    seeds: dict[int, str]


def study_rows(cells: Sequence[Cell], measure: Compare = compare) -> list[StudyRow]:
    """A row for each variant, in the study's order; sizes are those of the study's image size and classes.

    Errors: RecipeError, also for a cell whose recipe has changed since it was trained; DataError where the evaluation
    split, which tells the number of classes, is not there.
    """
    recipes = {cell.variant: ClassifierRecipe.parse(cell.recipe) for cell in cells}
    classes = len(next(iter(recipes.values())).data.open_eval().class_names)
    models = {name: create_backbone(str(recipe.model.backbone), classes) for name, recipe in recipes.items()}
    latencies = measure_latency(models, recipes, measure)
    outcomes = [read_outcome(cell) for cell in cells]
    top1, top5 = spread_over_seeds(outcomes, "top1"), spread_over_seeds(outcomes, "top5")
    rows = []
    for name, model in models.items():
        size = count(model, recipes[name].data.image_size)
        seeds = {outcome.seed: outcome.status for outcome in outcomes if outcome.variant == name}
        accuracy = (top1.get(name), top5.get(name))
        rows.append(StudyRow(name, model.name, size.parameters, size.macs, latencies[name], *accuracy, seeds))
    return rows


def measure_latency(
    models: Mapping[str, Backbone], recipes: Mapping[str, ClassifierRecipe], measure: Compare
) -> Mapping[str, Timing]:
    """Milliseconds of one image on one CPU thread, the networks taking turns, in the recipe's memory format."""
    steps: dict[str, Step] = {}
    for name, model in models.items():
        side, layout = recipes[name].data.image_size, torch.contiguous_format
        if recipes[name].model.channels_last:
            layout = torch.channels_last
            model.to(memory_format=layout)  # type: ignore[call-overload]  # torch takes it, its stubs do not
        steps[name] = partial(infer, model.eval(), torch.rand(1, 3, side, side).contiguous(memory_format=layout))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(steps, torch.device("cpu"), WARMUPS, REPEATS)
    finally:
        torch.set_num_threads(threads)


def infer(model: Backbone, images: Tensor) -> None:
    """One forward pass."""
    with torch.inference_mode():
        model(images)


def write_study(
    rows: Sequence[StudyRow], cells: Sequence[Cell], hardware: Mapping[str, Any], file: Path
) -> dict[str, Any]:
    """Table and conditions as JSON in ``file``, a plot beside it (``.png``); returns the JSON object."""
    recipe = ClassifierRecipe.parse(cells[0].recipe)
    report = {
        "hardware": dict(hardware),
        "conditions": {
            "data": Path(recipe.data.root).name, "image_size": recipe.data.image_size, "steps": recipe.training.steps,
            "batch_size": recipe.training.batch_size, "latency": "one image, one CPU thread, fp32",
        },
        "rows": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(rows, file.with_suffix(".png"))
    return report


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of a report's ``rows`` in Markdown."""
    lines = [
        "| network | parameters, M | MACs, M | latency, ms | top-1, % | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        seeds = summarise_seeds(row["seeds"])
        lines.append(
            f"| {row['backbone']} | {row['parameters'] / 1e6:.2f} | {row['macs'] / 1e6:.2f} | "
            f"{row['latency']['median_ms']:.2f} | {percent(row['top1'])} | {seeds} |"
        )
    return "\n".join(lines)


def percent(spread: Mapping[str, Any] | None) -> str:
    """A share as per cent, with its deviation where there is more than one run."""
    if spread is None:
        return NOT_RUN
    deviation = f" ± {100 * spread['std']:.1f}" if spread["runs"] > 1 else ""
    return f"{100 * spread['mean']:.1f}{deviation}"


def plot(rows: Sequence[StudyRow], file: Path) -> None:
    """Top-1 accuracy against multiply-accumulates and latency; networks without a finished seed are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for row in rows:
        if row.top1 is None:
            continue
        for axis, cost in ((left, row.macs / 1e6), (right, row.latency.median_ms)):
            axis.errorbar(cost, 100 * row.top1.mean, 100 * row.top1.std, marker="o", capsize=3, label=row.backbone)
    left.set(xlabel="million multiply-accumulates", ylabel="top-1, %")
    right.set(xlabel="latency of one image on one thread, ms")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    if any(row.top1 is not None for row in rows):
        left.legend(fontsize="small")
    figure.savefig(file, dpi=110)
