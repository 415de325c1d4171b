"""``dovetail study``: train every variant and seed of a recipe; the last line printed is where each stands, as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from server.commands.trainings import TRAININGS, Recipe, Training

if TYPE_CHECKING:
    from kernels.training.study import Outcome, Train

app = typer.Typer(no_args_is_help=True, help="Train several variants of a recipe and compare them.")

Output = Annotated[Path | None, typer.Option(help="Folder of the study, instead of the recipe's.", show_default=False)]
Only = Annotated[str, typer.Option(help="Variants to train now, by commas; empty: all.", show_default=False)]


def add_command(name: str, training: Training) -> None:
    """``dovetail study NAME``."""

    @app.command(name, help=f"Train {training.noun}. Finished cells are skipped, an interrupted one is resumed.")
    def study(recipe: Recipe, output: Output = None, only: Only = "") -> None:
        print_outcomes(run(recipe, output, only, training.load()))


for name, training in TRAININGS.items():
    add_command(name, training)


@app.command("perceptrons", help="Train the small students of a distillation study, all variants and seeds at once.")
def perceptrons(recipe: Recipe, output: Output = None) -> None:
    """Students as ``vision.tasks.perceptrons`` has them; an interrupted run is resumed."""
    from kernels.training.options import load_recipe
    from kernels.training.study import expand
    from vision.tasks.perceptrons import train_together

    tables = load_recipe(recipe)
    print_outcomes(train_together(expand(tables, output), output or Path(tables["training"]["output"])))


@app.command("region-heads", help="Train the second stages of a mining study on kept regions, all at once.")
def region_heads(recipe: Recipe, output: Output = None) -> None:
    """Heads as ``vision.tasks.region_heads`` has them; an interrupted run is resumed."""
    from kernels.training.options import load_recipe
    from kernels.training.study import expand
    from vision.tasks.region_heads import train_heads

    tables = load_recipe(recipe)
    print_outcomes(train_heads(expand(tables, output), output or Path(tables["training"]["output"])))


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
