"""``dovetail convert``: targets into packed folders, drafters of other projects into drafter folders; JSON last."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    str,
    typer.Argument(
        help="With --weights a target: folder of safetensors or hub id; else the folder of an EAGLE-1, -2 or -3 "
        "checkpoint.",
        show_default=False,
    ),
]
Output = Annotated[
    Path, typer.Argument(help="New folder; `dovetail serve` or --drafter then takes it.", show_default=False)
]


def convert(
    source: Source,
    output: Output,
    weights: Annotated[
        str | None, typer.Option(help="Pack a target: bf16, int8 or int4.", show_default=False)
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
) -> None:  # fmt: skip
    """Pack a target's weights (--weights), or convert an EAGLE checkpoint into a drafter folder."""
    if weights is None:
        if calibration is not None or report:
            raise typer.BadParameter("--calibration and --report need --weights: they are about packing a target")
        if not Path(source).is_dir():
            raise typer.BadParameter(f"{source!r} is no folder; a target to pack also needs --weights")
        from drafters.convert import convert_eagle

        typer.echo(json.dumps(dataclasses.asdict(convert_eagle(Path(source), output))))
        return
    from server.launch import resolve_target
    from server.targets.conversion import ConversionOptions, convert_target

    options = ConversionOptions(weights, group_size, calibration, calibration_tokens, report)
    folder = resolve_target(source)
    typer.echo(json.dumps(dataclasses.asdict(convert_target(folder, output, options))))
