"""``dovetail predict``: what a vision model says of pictures, without a server; ``detect`` and ``face-quality`` too."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand
from typer.main import get_command

if TYPE_CHECKING:
    from vision.images import Picture
    from vision.serving.protocol import Answer, Model
    from vision.video import Tracks

logger = logging.getLogger(__name__)

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
BATCH = 8
GIVEN = "dovetail.options"  # where the flags of a kind's options are kept while the command runs

Images = Annotated[list[Path], typer.Argument(exists=True, help="JPEG, PNG, WebP or video files, or folders of them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object a line and image.")]
CsvFile = Annotated[
    Path | None, typer.Option("--csv", dir_okay=False, help="Write every row found into this file.", show_default=False)
]
Draw = Annotated[
    Path | None,
    typer.Option(help="Draw into this file; of several images, into files in this folder.", show_default=False),
]
Step = Annotated[int, typer.Option(min=1, help="Of a video every so many frames are looked at.")]
Track = Annotated[
    bool, typer.Option("--track", help="Of a video: number what is found, the same thing the same from frame to frame.")
]


class KindCommand(TyperCommand):
    """A command with the flags of one kind's options, or of all kinds'; they are read when it is called."""

    kind: ClassVar[str | None] = None

    def get_params(self, ctx: Any) -> list[Any]:
        """Its own, then the kinds'."""
        from vision.serving.registry import all_kinds

        kinds = [all_kinds()[self.kind]] if self.kind is not None else list(all_kinds().values())
        flags: dict[str, Any] = {}
        for options in (kind.options for kind in kinds):
            hints = get_type_hints(options)
            flags |= {entry.name: flag_of(entry, hints[entry.name]) for entry in dataclasses.fields(options)}

        def holder() -> None: ...

        holder.__annotations__ = flags
        holder.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in flags.items()
        ])  # fmt: skip
        app = typer.Typer(add_completion=False)
        app.command()(holder)
        return [*super().get_params(ctx), *get_command(app).params]


class DetectCommand(KindCommand):
    """Of detectors."""

    kind = "detector"


class FaceQualityCommand(KindCommand):
    """Of face-quality scorers."""

    kind = "face-quality"


def flag_of(entry: dataclasses.Field[Any], hint: Any) -> Any:
    """The flag of an option, as an annotation; what is given is kept in the context."""
    limits = entry.metadata
    name = "--" + str(limits.get("flag", entry.name)).replace("_", "-")
    if entry.default is True:
        name += f"/--no{name[1:]}"

    def keep(ctx: typer.Context, value: Any) -> None:
        if value is None:
            return
        try:
            parsed = limits["parse"](value) if "parse" in limits else value
        except (ValueError, OSError) as error:
            raise typer.BadParameter(str(error), param_hint=name) from error
        ctx.meta.setdefault(GIVEN, {})[entry.name] = parsed

    default = f" Default: {entry.default}." if entry.default else ""
    value_type = hint if hint in (int, float, bool) else str
    option = typer.Option(
        name, help=limits["help"] + default, show_default=False, expose_value=False, callback=keep,
        min=limits.get("ge"), max=limits.get("le"),
    )  # fmt: skip
    return Annotated[value_type | None, option]


def predict(
    ctx: typer.Context,
    model: Annotated[Path, typer.Argument(exists=True, help="Folder of a trained model, or an .onnx file.")],
    images: Images,
    as_json: AsJson = False,
    csv_file: CsvFile = None,
    draw: Draw = None,
    step: Step = 1,
    track: Track = False,
) -> None:
    """What a trained model of any kind says of pictures. Files that cannot be read are named and passed over."""
    answer_files(ctx, Run(model, None, tuple(images), as_json, csv_file, draw, step=step, track=track))


def detect(
    ctx: typer.Context,
    images: Images,
    model: Annotated[
        Path | None,
        typer.Option(exists=True, help="Folder or .onnx file; nothing: the bundled detector.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    csv_file: CsvFile = None,
    draw: Draw = None,
    step: Step = 1,
    track: Track = False,
) -> None:
    """Detect objects: class, score and box in pixels, x1 y1 x2 y2."""
    answer_files(ctx, Run(model, "detector", tuple(images), as_json, csv_file, draw, step=step, track=track))


def face_quality(
    ctx: typer.Context,
    images: Images,
    model: Annotated[
        Path | None,
        typer.Option(exists=True, help="Folder or .onnx file; nothing: the bundled scorer.", show_default=False),
    ] = None,
    faces: Annotated[
        Path | None,
        typer.Option(help="Face detector's .onnx file, or face-detector: the installed one.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    csv_file: CsvFile = None,
    draw: Draw = None,
) -> None:
    """Score faces from 0 to 100; -1 with a status where a face cannot be scored. Exits with 1 where none could be."""
    answer_files(ctx, Run(model, "face-quality", tuple(images), as_json, csv_file, draw, faces))


@dataclass(frozen=True)
class Run:
    """What was asked for; ``model`` None is the bundled one of ``kind``, ``kind`` None any."""

    model: Path | None
    kind: str | None
    images: tuple[Path, ...]
    as_json: bool
    csv_file: Path | None
    draw: Path | None
    faces: Path | None = None
    step: int = 1
    track: bool = False


@dataclass(frozen=True)
class Shot:
    """One picture to answer for: a file, or a frame of a video, with what tells it from the others."""

    path: Path
    picture: Picture
    place: dict[str, Any]
    tracks: Tracks | None = None

    @property
    def name(self) -> str:
        """For people, and for the file it is drawn into."""
        return "_".join([self.path.stem, *([f"{self.place['frame']:06d}"] if self.place else [])])


def answer_files(ctx: typer.Context, run: Run) -> None:
    """The command. Errors: ModelError, BadParameter; exits with 1 where nothing could be answered."""
    from vision.serving.folder import ModelError

    files = list(pictures_in(run.images))
    draws_file = run.draw is not None and run.draw.suffix.lower() in PICTURES
    if draws_file and (len(files) != 1 or is_video(files[0])):
        raise typer.BadParameter(f"{len(files)} files were given; name a folder for them", param_hint="--draw")
    model = open_model(run)
    if run.track and not model.kind.boxes:
        raise typer.BadParameter(f"a {model.kind.name} finds no boxes to follow", param_hint="--track")
    options = options_of(model, ctx.meta.get(GIVEN, {}), len(files))
    answered = useful = 0
    with table_writer(run.csv_file) as write_rows:
        for shot, answer in answers(model, shots(files, run), options):
            answered += 1
            useful += model.kind.says_something(answer)
            if shot.tracks is not None:
                shot.tracks.follow(answer[model.kind.boxes])
            write_rows(shot, model.kind.rows(answer))
            show(shot, answer, model, run.as_json)
            if run.draw is not None:
                target = run.draw if draws_file else run.draw / f"{shot.name}.jpg"
                target.parent.mkdir(parents=True, exist_ok=True)
                model.kind.draw(shot.picture.image, answer).save(target)
    if not answered:
        raise ModelError(f"none of the {len(files)} files could be read")
    if not useful:
        raise typer.Exit(1)


def options_of(model: Model, given: dict[str, Any], num_files: int) -> dict[str, Any]:
    """The model's options as it takes them, from the flags that were given. Errors: BadParameter."""
    from vision.serving.folder import ModelError

    for entry in dataclasses.fields(model.kind.options):
        if entry.metadata.get("per_image") and entry.name in given and num_files != 1:
            raise typer.BadParameter(f"{num_files} images were given; it belongs to one", param_hint=f"--{entry.name}")
    try:
        return dataclasses.asdict(model.kind.options.from_json(given, model.kind.name).checked(model.info))
    except ModelError as error:
        raise typer.BadParameter(str(error)) from error


def open_model(run: Run) -> Model:
    """The model that was named, or the bundled one, and what its kind asks. Errors: ModelError, LaunchError."""
    from server.launch import bundled_vision
    from server.placement.machine import usable_cores
    from vision.serving.folder import ModelError
    from vision.serving.load import load_model

    model = load_model(run.model or bundled_vision(str(run.kind)), usable_cores())
    if run.kind not in (None, model.kind.name):
        raise ModelError(f"{model.info.name} is a {model.kind.name}, no {run.kind} model")
    if run.faces is None:
        return model
    faces = load_model(run.faces if run.faces.exists() else bundled_vision(str(run.faces)), usable_cores())
    return dataclasses.replace(model, companions={faces.kind.name: faces})


def is_video(path: Path) -> bool:
    """By its name."""
    from vision.video import SUFFIXES

    return path.suffix.lower() in SUFFIXES


def pictures_in(paths: Iterable[Path]) -> Iterator[Path]:
    """Files as they are named, and the pictures and videos of folders by name."""
    for path in paths:
        if path.is_dir():
            yield from sorted(f for f in path.rglob("*") if f.suffix.lower() in PICTURES or is_video(f))
        else:
            yield path


def shots(files: Iterable[Path], run: Run) -> Iterator[Shot]:
    """Every readable picture, and the frames of videos; what cannot be read is named in the log."""
    from vision.images import ImageError, decode_image
    from vision.video import Tracks, read_frames

    for path in files:
        try:
            if not is_video(path):
                yield Shot(path, decode_image(path.read_bytes()), {})
                continue
            tracks = None
            for frame in read_frames(path, run.step):
                if run.track and tracks is None:
                    tracks = Tracks(frame.rate / run.step)
                yield Shot(path, frame.picture, {"frame": frame.number, "time_s": frame.time_s}, tracks)
        except (ImageError, OSError) as error:
            logger.error("%s is passed over: %s", path, error)


def answers(model: Model, found: Iterable[Shot], options: dict[str, Any]) -> Iterator[tuple[Shot, Answer]]:
    """Every shot with its answer, several at a time; one of which the options ask too much is named in the log."""
    from vision.images import ImageError
    from vision.serving.batch import answer_pictures

    remaining = iter(found)
    while group := list(islice(remaining, 1 if model.kind.full_size(options) else BATCH)):
        try:
            answered = answer_pictures(model, [shot.picture for shot in group], options)
        except ImageError as error:
            logger.error("%s is passed over: %s", ", ".join(str(shot.path) for shot in group), error)
        else:
            yield from zip(group, answered, strict=True)


@contextlib.contextmanager
def table_writer(file: Path | None) -> Iterator[Callable[[Shot, list[Answer]], None]]:
    """A function that writes an image's rows into a CSV, whose header the first row gives; nothing without a file."""
    if file is None:
        yield lambda shot, rows: None  # noqa: ARG005
        return
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)

        def write(shot: Shot, rows: list[Answer]) -> None:
            if rows and not opened.tell():
                writer.writerow(["file", *shot.place, *rows[0]])
            writer.writerows([str(shot.path), *shot.place.values(), *row.values()] for row in rows)

        yield write


def show(shot: Shot, answer: Answer, model: Model, as_json: bool) -> None:
    """One picture's answer, for programs or for people."""
    if as_json:
        size = {"width": shot.picture.width, "height": shot.picture.height}
        head = {"file": str(shot.path), **shot.place, "model": model.info.name, "image": size}
        typer.echo(json.dumps(head | answer))
        return
    console, rows = Console(markup=False), model.kind.rows(answer)
    title = f"{shot.path} {shot.place['time_s']:.2f} s" if shot.place else str(shot.path)
    if not rows:
        console.print(f"{title}: {model.kind.nothing(answer)}")
        return
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.5g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
