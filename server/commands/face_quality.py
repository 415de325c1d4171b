"""``dovetail face-quality``: how useful faces are for recognition, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from server.commands.detect import answer_images


def face_quality(
    images: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="JPEG, PNG or WebP files.")],
    model: Annotated[
        Path | None,
        typer.Option(exists=True, help="Folder or .onnx file; nothing: the bundled scorer.", show_default=False),
    ] = None,
    landmarks: Annotated[
        str | None,
        typer.Option(
            help="JSON, or a file of it: for each face of the one image five points x, y: left eye, right eye, nose "
            "tip, left and right corner of the mouth, as seen.",
            show_default=False,
        ),
    ] = None,
    aligned: Annotated[bool, typer.Option("--aligned", help="The images are aligned faces of 112 x 112.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line and image.")] = False,
    draw: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Draw the boxes into this file; of one image.", show_default=False),
    ] = None,
) -> None:
    """Score faces from 0 to 100; -1 with a status where a face cannot be scored. Exits with 1 where none could be."""
    if len(images) != 1 and (draw is not None or landmarks is not None):
        raise typer.BadParameter(f"{len(images)} images were given; --landmarks and --draw belong to one")
    from server.launch import resolve_scorer
    from server.placement.machine import usable_cores
    from vision.assess import FACE_QUALITY
    from vision.predict import ModelError, load_vision_model

    options: dict[str, Any] = {"aligned": aligned}
    if landmarks is not None:
        options["landmarks"] = read_landmarks(landmarks)
    scorer = load_vision_model(resolve_scorer(model), usable_cores())
    if scorer.info.kind != FACE_QUALITY:
        raise ModelError(f"{scorer.info.name} is a {scorer.info.kind}, no face-quality scorer")
    answers = answer_images(scorer, images, options, None if as_json else show, draw)
    if not any(face["quality"] >= 0 for answer in answers for face in answer["faces"]):
        raise typer.Exit(1)


def read_landmarks(text: str) -> list[Any]:
    """Faces of five points from JSON or a file of it; one face alone may come without the outer list."""
    file = Path(text)
    given = text if text.lstrip().startswith("[") else file.read_text(encoding="utf-8")
    try:
        values = json.loads(given)
    except ValueError as error:
        raise typer.BadParameter(f"{text[:60]!r} is neither JSON nor a file of it", param_hint="--landmarks") from error
    if not isinstance(values, list):
        raise typer.BadParameter("landmarks are a list of faces of five points", param_hint="--landmarks")
    is_one_face = len(values) == 5 and all(isinstance(p, list) and len(p) == 2 for p in values)
    return [values] if is_one_face and not isinstance(values[0][0], list) else values


def show(path: Path, answer: dict[str, Any]) -> None:
    """One image's faces for people."""
    console = Console(markup=False)
    if not answer["faces"]:
        hints = {
            "landmarks_missing": "no face detector is part of this; give --landmarks, or --aligned for a crop",
            "no_face": "no face was given",
        }
        console.print(f"{path}: {answer['status']}: {hints.get(answer['status'], '')}")
        return
    table = Table("face", "quality", "raw", "status", "eyes apart, px", "warnings", title=str(path))
    for face in answer["faces"]:
        raw = "-" if face["raw"] is None else f"{face['raw']:.3f}"
        eyes = "-" if face["inter_eye_px"] is None else f"{face['inter_eye_px']:.0f}"
        table.add_row(str(face["index"]), str(face["quality"]), raw, face["status"], eyes, "; ".join(face["warnings"]))
    console.print(table)
