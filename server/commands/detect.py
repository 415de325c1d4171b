"""``dovetail detect``: what is on some images, without a server."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from vision.predict import VisionModel

DEFAULT_THRESHOLD = 0.5  # that of the HTTP route


def detect(
    images: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="JPEG, PNG or WebP files.")],
    model: Annotated[
        Path | None,
        typer.Option(exists=True, help="Folder or .onnx file; nothing: the bundled detector.", show_default=False),
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Lowest score.")] = DEFAULT_THRESHOLD,
    max_detections: Annotated[int, typer.Option(min=1, help="Most detections of an image.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line and image.")] = False,
    draw: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Draw the boxes into this file; of one image.", show_default=False),
    ] = None,
) -> None:
    """Detect objects: class, score and box in pixels, x1 y1 x2 y2."""
    if draw is not None and len(images) != 1:
        raise typer.BadParameter(f"{len(images)} images were given; one picture is drawn of one", param_hint="--draw")
    from server.launch import resolve_detector
    from server.placement.machine import usable_cores
    from vision.predict import load_vision_model

    detector = load_vision_model(resolve_detector(model), usable_cores())
    options = {"score_threshold": threshold, "max_detections": max_detections}
    answer_images(detector, images, options, None if as_json else show, draw)


def answer_images(
    model: VisionModel,
    images: Sequence[Path],
    options: Mapping[str, Any],
    show: Callable[[Path, dict[str, Any]], None] | None,
    draw: Path | None,
) -> list[dict[str, Any]]:
    """Answer each image by ``show``, or as a line of JSON where there is none; ``draw`` takes the last picture.

    Errors: ImageError naming the file, which ends the row.
    """
    from vision.images import ImageError, decode_image

    answers = []
    for path in images:
        try:
            picture = decode_image(path.read_bytes())
        except ImageError as error:
            raise ImageError(error.code, f"{path}: {error}") from error
        (answer,) = model.predict([model.prepare(picture, options)])
        answers.append(answer)
        if show is not None:
            show(path, answer)
        else:
            size = {"width": picture.width, "height": picture.height}
            typer.echo(json.dumps({"file": str(path), "model": model.info.name, "image": size} | answer))
        if draw is not None:
            model.draw(picture.image, answer).save(draw)
    return answers


def show(path: Path, answer: dict[str, Any]) -> None:
    """One image's detections for people."""
    table = Table("class", "score", "x1", "y1", "x2", "y2", title=str(path))
    for entry in answer["detections"]:
        table.add_row(entry["class_name"], f"{entry['score']:.3f}", *(f"{value:.0f}" for value in entry["box"]))
    Console(markup=False).print(table if answer["detections"] else f"{path}: nothing found")
