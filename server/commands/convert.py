"""``dovetail convert``: drafters of other projects into drafter folders; the last line printed is JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    Path,
    typer.Argument(
        exists=True,
        file_okay=False,
        help="Folder of an EAGLE-1, -2 or -3 checkpoint (safetensors).",
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Argument(help="Drafter folder to write; --drafter then takes it.", show_default=False)]


def convert(source: Source, output: Output) -> None:
    """Convert an EAGLE checkpoint into a drafter folder."""
    from drafters.convert import convert_eagle

    typer.echo(json.dumps(dataclasses.asdict(convert_eagle(source, output))))
