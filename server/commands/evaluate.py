"""``dovetail eval``: measure a trained model; the last line printed is the report as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Measure a trained model.")


@app.callback()
def group() -> None:
    """Keeps the word after ``eval`` a command, however many there are."""


@app.command("classifier")
def evaluate_classifier(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a trained classifier.")],
    data: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of images.")],
    kind: Annotated[str, typer.Option(help="How the data lie: folder, cifar10, cifar100 or idx.")] = "folder",
    split: Annotated[str, typer.Option(help="Split to measure on.")] = "val",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
) -> None:
    """Top-1 and top-5 accuracy of a classifier."""
    from vision.evaluate import evaluate_classifier

    report = evaluate_classifier(checkpoint, kind, data, split, batch_size=batch_size)
    typer.echo(json.dumps(dataclasses.asdict(report)))


@app.command("retrieval")
def evaluate_retrieval(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a trained backbone.")],
    data: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of images.")],
    kind: Annotated[str, typer.Option(help="How the data lie: folder, cifar10, cifar100 or idx.")] = "folder",
    split: Annotated[str, typer.Option(help="Split to measure on.")] = "val",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
) -> None:
    """Rank-1 and mean average precision of a backbone's embeddings, on classes it need not know."""
    from vision.retrieval import evaluate_retrieval

    report = evaluate_retrieval(checkpoint, kind, data, split, batch_size=batch_size)
    typer.echo(json.dumps(dataclasses.asdict(report)))
