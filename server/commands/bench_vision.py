"""``dovetail bench vision``: a detector alone, over HTTP and beside text; ``bench distillation``: a trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def vision(
    model: Annotated[
        Path | None,
        typer.Option(exists=True, help="Detector; nothing: the bundled one.", show_default=False),
    ] = None,
    clients: Annotated[str, typer.Option(help="Clients at the same time, by commas.")] = "1,4,8",
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of each measurement of the endpoint.")] = 4.0,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of text with and without vision.")] = 3,
    peer: Annotated[bool, typer.Option(help="Time a one-stage network of equal input beside it.")] = True,
    text: Annotated[bool, typer.Option(help="Measure what vision costs text.")] = True,
    target: Annotated[
        str | None, typer.Option(help="Language model beside it; nothing: the bundled one.", show_default=False)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Report; the plot lies beside it.", show_default=False)
    ] = None,
) -> None:
    """Images per second on one thread and over HTTP, and the loss of text beside it; the last line is JSON."""
    from server.bench.vision import VisionBenchOptions, measure_vision
    from server.bench.vision_plot import plot_vision
    from server.launch import bundled_vision

    console = Console(stderr=True, markup=False)
    counts = tuple(int(count) for count in clients.split(","))
    options = VisionBenchOptions(model or bundled_vision("detector"), counts, seconds, repeats, peer, text, target)
    report = measure_vision(options, console.print)
    show(report, console)
    line = json.dumps(report)
    if json_file is not None:
        json_file.write_text(line + "\n", encoding="utf-8")
        plot_vision(report, json_file.with_suffix(".png"))
    typer.echo(line)


def distillation(
    recipe: Annotated[Path, typer.Argument(metavar="recipe", exists=True, dir_okay=False, help="TOML recipe.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of each measurement.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="Turns.")] = 5,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the report here.", show_default=False)
    ] = None,
) -> None:
    """Images per second of `train distil` beside a plain loop of the same recipe; the last line is JSON."""
    from kernels.training import load_recipe
    from server.bench.distillation import measure_distillation

    console = Console(stderr=True, markup=False)
    report = measure_distillation(load_recipe(recipe), steps, repeats, console.print)
    console.print(f"the trainer runs at {report['ratio']:.3f} of the plain loop's speed")
    line = json.dumps(report)
    if json_file is not None:
        json_file.write_text(line + "\n", encoding="utf-8")
    typer.echo(line)


def show(report: dict[str, Any], console: Console) -> None:
    """The report for people."""
    alone = report["single_thread"]
    table = Table("", "images/s", "ms", title=f"{alone['model']} on {alone['runtime']}, {alone['image_size']} pixels")
    table.add_row("one thread, file to boxes", f"{1e3 / alone['ms_per_image']:.1f}", f"{alone['ms_per_image']:.1f}")
    if "peer" in alone:
        peer_ms = alone["peer"]["ms_per_image"]
        table.add_row(alone["peer"]["name"], f"{1e3 / peer_ms:.1f}", f"{peer_ms:.1f}")
    for count, figures in report["endpoint"].items():
        table.add_row(f"endpoint, {count} clients", f"{figures['images_per_s']:.1f}", f"{figures['p50_ms']} (median)")
    console.print(table)
    memory = report["peak_memory_mb"]
    if memory is not None:
        console.print(f"memory: {memory['peak']:.0f} MB at most, {memory['before_loading']:.0f} without the model")
    if "text" in report:
        text = report["text"]
        console.print(
            f"text: {text['alone_tokens_per_s']:.1f} tokens/s alone, {text['beside_tokens_per_s']:.1f} beside "
            f"{text['vision_clients']} vision clients (loss {text['loss']:.0%})"
        )
