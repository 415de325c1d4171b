"""``dovetail train``: run a recipe; the last line printed is the report as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from server.commands.trainings import TRAININGS, Recipe, Training

app = typer.Typer(no_args_is_help=True, help="Train a model from a recipe.")


Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what memory and disk the run takes; train nothing.")]


@app.command("language-model")
def train_language_model(recipe: Recipe, resume: Resume = False) -> None:
    """Train a small language model from text."""
    from drafters.train.language_model import train_language_model
    from kernels.training.heartbeat import run_log
    from kernels.training.options import load_recipe

    tables = load_recipe(recipe)
    with run_log(tables):
        print_report(train_language_model(tables, resume=resume))


@app.command("drafter", help=TRAININGS["drafter"].help)
def train_drafter(recipe: Recipe, resume: Resume = False, dry_run: DryRun = False) -> None:
    """A drafter's training can be planned."""
    if not dry_run:
        run(TRAININGS["drafter"], recipe, resume)
        return
    from kernels.training.options import load_recipe
    from server.training_plan import plan_drafter

    typer.echo(json.dumps(plan_drafter(load_recipe(recipe))))


def add_command(name: str, training: Training) -> None:
    """``dovetail train NAME``."""

    @app.command(name, help=training.help)
    def train(recipe: Recipe, resume: Resume = False) -> None:
        run(training, recipe, resume)


for name, training in TRAININGS.items():
    if name != "drafter":
        add_command(name, training)


def run(training: Training, file: Path, resume: bool) -> None:
    """Train what a recipe says. Errors: RecipeError where it is a study."""
    from kernels.training.heartbeat import run_log
    from kernels.training.options import RecipeError, load_recipe

    tables = load_recipe(file)
    if "study" in tables:
        kind = next(name for name, entry in TRAININGS.items() if entry is training)
        raise RecipeError(f"{file} is a study: dovetail study {kind} {file}")
    with run_log(tables):
        print_report(training.load()(tables, resume=resume))


def print_report(report: Any) -> None:
    """One line of JSON from a training report (a dataclass); of several processes the first prints it."""
    from kernels.training.processes import is_first_process

    if is_first_process():
        typer.echo(json.dumps(dataclasses.asdict(report)))
