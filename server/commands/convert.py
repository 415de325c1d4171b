"""``dovetail convert``: targets into packed folders, GGUF files and back, others' drafters into ours; JSON last."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from server.own_models import GGUF_SUFFIX, is_gguf

Source = Annotated[
    str,
    typer.Argument(
        help="A .gguf file; with --weights or --to a target's folder of safetensors or hub id; else the folder of an "
        "EAGLE-1, -2 or -3 checkpoint.",
        show_default=False,
    ),
]
Output = Annotated[
    Path,
    typer.Argument(help="New folder, or with --to gguf a file; serve or --drafter then takes it.", show_default=False),
]
GGUF_WEIGHTS = "fp16"


def convert(
    source: Source,
    output: Output,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Pack a target: bf16, int8, int4, or 'stored', a GGUF file's own codes. With --to gguf: fp16 (F16, "
            "the default), int8 (Q8_0), int4 (Q4_0), bf16 or fp32.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Literal["gguf"] | None, typer.Option(help="Write a folder of safetensors as a GGUF file.", show_default=False)
    ] = None,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale: 32, 64 or 128.")] = 32,
    calibration: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, show_default=False,
            help="Text file; scales inputs by their activations on it (AWQ) before quantising.",
        ),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=2, help="Tokens of it to run.")] = 2048,
    report: Annotated[bool, typer.Option(help="Measure the error of every packed matrix.")] = False,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="The source is a state dict (.pth, .safetensors) that the authors of this image network published; "
            "a recipe's start_from takes the folder.",
            show_default=False,
        ),
    ] = None,
) -> None:  # fmt: skip
    """Pack a target (--weights), write it as GGUF (--to gguf), turn a GGUF file into a folder, or take over EAGLE.

    With --backbone take over the published weights of an image network.
    """
    if backbone is not None:
        if weights is not None or to is not None:
            raise typer.BadParameter("--backbone is about an image network; --weights and --to are about targets")
        typer.echo(json.dumps(convert_backbone(Path(source), output, backbone)))
        return
    if (calibration is not None or report) and (weights is None or to is not None):
        raise typer.BadParameter("--calibration and --report need --weights: they are about packing a target")
    if to is not None:
        found = write_file(source, output, weights or GGUF_WEIGHTS)
    elif weights is not None:
        from server.launch import resolve_target
        from server.targets.conversion import ConversionOptions, convert_target

        options = ConversionOptions(weights, group_size, calibration, calibration_tokens, report)
        found = dataclasses.asdict(convert_target(resolve_target(source), output, options))
    elif is_gguf(Path(source)):
        from server.targets.gguf.folders import write_safetensors

        found = {"output": str(output), "bytes": write_safetensors(Path(source), output)}
    else:
        if not Path(source).is_dir():
            raise typer.BadParameter(f"{source!r} is no folder; a target to pack also needs --weights")
        from drafters.convert import convert_eagle

        found = dataclasses.asdict(convert_eagle(Path(source), output))
    typer.echo(json.dumps(found))


def convert_backbone(source: Path, output: Path, name: str) -> dict[str, Any]:
    """An image network's published weights as a folder; what was written."""
    from vision.backbones.checkpoint import convert_author_weights

    if not source.is_file() or output.exists():
        raise typer.BadParameter(f"{str(source)!r} must be a file, and {str(output)!r} a new folder")
    model = convert_author_weights(source, name, output)
    return {"output": str(output), "backbone": model.name, "num_classes": model.num_classes}


def write_file(source: str, output: Path, weights: str) -> dict[str, Any]:
    """A folder of safetensors as a GGUF file; what was written."""
    from server.launch import resolve_target
    from server.targets.gguf.writing import write_gguf

    if output.suffix != GGUF_SUFFIX or output.exists():
        raise typer.BadParameter(f"{str(output)!r} must be a new file whose name ends in {GGUF_SUFFIX}")
    if is_gguf(Path(source)):
        raise typer.BadParameter(f"{source!r} is a GGUF file already; --to gguf takes a folder of safetensors")
    write_gguf(resolve_target(source), output, weights)
    return {"output": str(output), "weights": weights, "bytes": output.stat().st_size}
