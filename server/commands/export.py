"""``dovetail export``: a trained model as a file for other runtimes; the last line printed is the report as JSON."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


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


def export(
    kind: Annotated[str, typer.Argument(help="What the folder holds: detector, classifier, face-quality, ...")],
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of the trained model.")],
    output: Annotated[
        Path | None,
        typer.Argument(dir_okay=False, help="ONNX file; nothing: model.onnx beside the weights.", show_default=False),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=32, help="Side of its images; nothing: its own.", show_default=False)
    ] = None,
    int8: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, show_default=False,
            help="For face quality: faces to find 8-bit ranges with; nothing: fp32.",
        ),
    ] = None,
    data_kind: Annotated[str, typer.Option("--kind", help="How those faces lie.")] = "london_faces",
    split: Annotated[str, typer.Option(help="Their split.")] = "train",
) -> None:  # fmt: skip
    """A trained model as an ONNX file, checked against torch. Beside its weights, the server runs it in torch's stead.

    The last line printed is the report as JSON.
    """
    from vision.serving.export import export_model
    from vision.serving.folder import CONFIG_FILE, ModelError, read_config
    from vision.serving.registry import all_kinds, kind_of

    if kind not in all_kinds():
        raise typer.BadParameter(f"{kind!r} is none of {', '.join(all_kinds())}", param_hint="KIND")
    found = kind_of(read_config(checkpoint / CONFIG_FILE), str(checkpoint)).name
    if found != kind:
        raise ModelError(f"{checkpoint} holds a {found}: dovetail export {found} {checkpoint}")
    calibration = None
    if int8 is not None:
        from vision.face_quality.traced import calibration_faces

        calibration = calibration_faces(data_kind, int8, split)
    with quiet_exporter():
        report = export_model(checkpoint, output, image_size=image_size, calibration=calibration)
    typer.echo(json.dumps(report))
