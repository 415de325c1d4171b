"""``dovetail train``: run a recipe; the last line printed is the report as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Train a model from a recipe.")


def with_data(recipe: Path) -> Path:
    """The recipe, once the data that it names are found."""
    from kernels.training.options import check_data

    check_data(recipe)
    return recipe


Recipe = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, help="TOML recipe.", show_default=False, callback=with_data)
]
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


@app.command("drafter")
def train_drafter(recipe: Recipe, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Train a drafter on a target's own features."""
    from kernels.training.heartbeat import run_log
    from kernels.training.options import load_recipe

    if dry_run:
        from server.training_plan import plan_drafter

        typer.echo(json.dumps(plan_drafter(load_recipe(recipe))))
        return
    from server.feature_source import train_drafter

    tables = load_recipe(recipe)
    with run_log(tables):
        print_report(train_drafter(tables, resume))


@app.command("classifier")
def train_classifier(recipe: Recipe, resume: Resume = False) -> None:
    """Train an image classifier on one of the compact backbones."""
    from kernels.training.heartbeat import run_log
    from kernels.training.options import RecipeError, load_recipe
    from vision.tasks.classification import train_classifier

    tables = load_recipe(recipe)
    if "study" in tables:
        raise RecipeError(f"{recipe} is a study: dovetail study classifier {recipe}")
    with run_log(tables):
        print_report(train_classifier(tables, resume=resume))


@app.command("embedding")
def train_embedding(recipe: Recipe, resume: Resume = False) -> None:
    """Train a backbone for retrieval, alone or with the help of a teacher."""
    from kernels.training.heartbeat import run_log
    from kernels.training.options import load_recipe
    from vision.tasks.embedding import train_embedding

    tables = load_recipe(recipe)
    with run_log(tables):
        print_report(train_embedding(tables, resume=resume))


@app.command("segmenter")
def train_segmenter(recipe: Recipe, resume: Resume = False) -> None:
    """Train a semantic segmenter, alone or with the help of a teacher."""
    from kernels.training.heartbeat import run_log
    from kernels.training.options import load_recipe
    from vision.tasks.segmentation import train_segmenter

    tables = load_recipe(recipe)
    with run_log(tables):
        print_report(train_segmenter(tables, resume=resume))


@app.command("distil")
def train_distilled(recipe: Recipe, resume: Resume = False) -> None:
    """Train an image classifier with the help of a teacher."""
    from kernels.training.heartbeat import run_log
    from kernels.training.options import load_recipe
    from vision.tasks.distillation import train_distilled

    tables = load_recipe(recipe)
    with run_log(tables):
        print_report(train_distilled(tables, resume=resume))


@app.command("detector")
def train_detector(recipe: Recipe, resume: Resume = False) -> None:
    """Train an object detector on images with boxes."""
    from kernels.training.heartbeat import run_log
    from kernels.training.options import RecipeError, load_recipe
    from vision.tasks.detection import train_detector

    tables = load_recipe(recipe)
    if "study" in tables:
        raise RecipeError(f"{recipe} is a study: dovetail study detector {recipe}")
    with run_log(tables):
        print_report(train_detector(tables, resume=resume))


@app.command("face-quality")
def train_face_quality(recipe: Recipe, resume: Resume = False) -> None:
    """Train a face-quality scorer on labels that a recognition network makes."""
    from kernels.training.heartbeat import run_log
    from kernels.training.options import RecipeError, load_recipe
    from vision.tasks.face_quality import train_face_quality

    tables = load_recipe(recipe)
    if "study" in tables:
        raise RecipeError(f"{recipe} is a study: dovetail study face-quality {recipe}")
    with run_log(tables):
        print_report(train_face_quality(tables, resume=resume))


def print_report(report: Any) -> None:
    """One line of JSON from a training report (a dataclass); of several processes the first prints it."""
    from kernels.training.processes import is_first_process

    if is_first_process():
        typer.echo(json.dumps(dataclasses.asdict(report)))
