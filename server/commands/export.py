"""``dovetail export``: a trained model as a file for other runtimes; the last line printed is the report as JSON."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Write a trained model for other runtimes.")


@app.callback()
def group() -> None:
    """Keeps the word after ``export`` a command, however many there are."""


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter without its account of every step, rewrite and operator that torch lacks here; errors are heard."""
    import torch.onnx._internal.exporter  # noqa: F401 - its import sets the level that is raised here

    levels = {name: logging.getLogger(name).level for name in ("onnx_ir", "onnxscript", "torch.onnx")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@app.command("classifier")
def export_classifier(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a trained classifier.")],
    output: Annotated[Path, typer.Argument(dir_okay=False, help="ONNX file to write.")],
    image_size: Annotated[int | None, typer.Option(min=32, help="Side of its images.", show_default=False)] = None,
) -> None:
    """An image classifier as ONNX, its answers checked against torch."""
    from vision.export import export_classifier

    with quiet_exporter():
        report = export_classifier(checkpoint, output, image_size=image_size)
    typer.echo(json.dumps(dataclasses.asdict(report)))


@app.command("detector")
def export_detector(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a trained detector.")],
    output: Annotated[
        Path | None,
        typer.Argument(dir_okay=False, help="ONNX file; nothing: model.onnx beside the weights.", show_default=False),
    ] = None,
) -> None:
    """A detector as one ONNX graph, checked against torch. Beside its weights, the server runs it in torch's stead."""
    from vision.detection.export import export_detector

    with quiet_exporter():
        report = export_detector(checkpoint, output)
    typer.echo(json.dumps(dataclasses.asdict(report)))


@app.command("face-quality")
def export_face_quality(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a trained scorer.")],
    output: Annotated[
        Path | None,
        typer.Argument(dir_okay=False, help="ONNX file; nothing: model.onnx beside the weights.", show_default=False),
    ] = None,
    int8: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Faces to find 8-bit ranges with; nothing: fp32.", show_default=False
        ),
    ] = None,
    kind: Annotated[str, typer.Option(help="How those faces lie.")] = "london_faces",
    split: Annotated[str, typer.Option(help="Their split.")] = "train",
) -> None:
    """A face-quality scorer as ONNX, its scores checked against torch."""
    from vision.face_quality.export import Calibration, export_scorer

    calibration = None if int8 is None else Calibration(kind, int8, split)
    with quiet_exporter():
        report = export_scorer(checkpoint, output, calibration)
    typer.echo(json.dumps(dataclasses.asdict(report)))
