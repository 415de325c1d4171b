"""``dovetail study``: train every variant and seed of a recipe; the last line printed is where each stands, as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from server.commands.train import with_data

if TYPE_CHECKING:
    from kernels.training.study import Outcome, Train

app = typer.Typer(no_args_is_help=True, help="Train several variants of a recipe and compare them.")

Recipe = Annotated[
    Path,
    typer.Argument(
        exists=True, dir_okay=False, help="TOML recipe with [study].", show_default=False, callback=with_data
    ),
]
Output = Annotated[Path | None, typer.Option(help="Folder of the study, instead of the recipe's.", show_default=False)]
Only = Annotated[str, typer.Option(help="Variants to train now, by commas; empty: all.", show_default=False)]


@app.callback()
def group() -> None:
    """Keeps the word after ``study`` a command, however many there are."""


@app.command("classifier")
def study_classifier(recipe: Recipe, output: Output = None, only: Only = "") -> None:
    """Train image classifiers. Finished cells are skipped, an interrupted one is resumed; Ctrl-C stops cleanly."""
    from vision.tasks.classification import train_classifier

    print_outcomes(run(recipe, output, only, train_classifier))


@app.command("distil")
def study_distilled(recipe: Recipe, output: Output = None, only: Only = "") -> None:
    """Train image classifiers with the help of a teacher, under several losses."""
    from vision.tasks.distillation import train_distilled

    print_outcomes(run(recipe, output, only, train_distilled))


@app.command("embedding")
def study_embedding(recipe: Recipe, output: Output = None, only: Only = "") -> None:
    """Train backbones for retrieval."""
    from vision.tasks.embedding import train_embedding

    print_outcomes(run(recipe, output, only, train_embedding))


@app.command("segmenter")
def study_segmenter(recipe: Recipe, output: Output = None, only: Only = "") -> None:
    """Train semantic segmenters."""
    from vision.tasks.segmentation import train_segmenter

    print_outcomes(run(recipe, output, only, train_segmenter))


@app.command("drafter")
def study_drafter(recipe: Recipe, output: Output = None, only: Only = "") -> None:
    """Train drafters. Finished cells are skipped, an interrupted one is resumed; `eval drafter-study` compares them."""
    from server.feature_source import train_drafter

    print_outcomes(run(recipe, output, only, train_drafter))


@app.command("detector")
def study_detector(recipe: Recipe, output: Output = None, only: Only = "") -> None:
    """Train object detectors, for instance with different mining. Resumes like the others."""
    from vision.tasks.detection import train_detector

    print_outcomes(run(recipe, output, only, train_detector))


@app.command("face-quality")
def study_face_quality(recipe: Recipe, output: Output = None, only: Only = "") -> None:
    """Train face-quality scorers, for instance on differently made labels."""
    from vision.tasks.face_quality import train_face_quality

    print_outcomes(run(recipe, output, only, train_face_quality))


def run(file: Path, output: Path | None, only: str, train: Train) -> list[Outcome]:
    """Expand the recipe in ``file`` and train its cells with ``train``."""
    from kernels.training.options import load_recipe
    from kernels.training.study import expand, run_study

    recipe = load_recipe(file)
    cells = expand(recipe, output)
    folder = output or Path(recipe["training"]["output"])
    return run_study(cells, train, folder, [name for name in only.split(",") if name])


def print_outcomes(outcomes: list[Outcome]) -> None:
    """A table on stderr, JSON on stdout."""
    table = Table("variant", "seed", "status", "figures")
    for outcome in outcomes:
        figures = " ".join(f"{name} {value:.4g}" for name, value in outcome.final.items())
        table.add_row(outcome.variant, str(outcome.seed), outcome.status, figures or outcome.reason)
    Console(stderr=True, markup=False).print(table)
    cells: list[dict[str, Any]] = [dataclasses.asdict(outcome) for outcome in outcomes]
    typer.echo(json.dumps({"cells": cells}))
