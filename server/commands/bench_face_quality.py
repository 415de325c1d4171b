"""``dovetail bench face-quality``: the scorer on one thread beside a network of LightQNet's size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from server.commands.options import check_folder


def bench_face_quality(
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each network and batch.")] = 50,
    scorer: Annotated[
        Path | None, typer.Option("--model", exists=True, help="Also time the endpoint with it.", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of each measurement of the endpoint.")] = 3.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the report here.", show_default=False)
    ] = None,
) -> None:
    """Milliseconds for 1 and 32 aligned faces on one CPU thread; the last line is JSON."""
    check_folder(json_file, "--json")
    from server.bench.face_quality import measure_face_quality

    report = measure_face_quality(repeats, scorer=scorer, seconds=seconds)
    table = Table("network", "faces", "ms", "faces/s")
    for row in report["results"]:
        table.add_row(row["network"], str(row["batch"]), f"{row['ms']:.2f}", f"{row['faces_per_s']:.0f}")
    for clients, figures in report.get("endpoint", {}).items():
        table.add_row(f"endpoint, {clients} clients", "1", f"{figures['p50_ms']}", f"{figures['images_per_s']:.0f}")
    Console(stderr=True, markup=False).print(table)
    line = json.dumps(report)
    if json_file is not None:
        json_file.write_text(line + "\n", encoding="utf-8")
    typer.echo(line)
