"""``dovetail bench --shape NAME --simulate-acceptance X``: a model's real sizes with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from server.commands.progress import progress_bar

if TYPE_CHECKING:
    from server.settings import Settings


def run_shape(
    settings: Settings, shape: str, acceptance: float | None, layers: int | None, blocks: int, gpu_layers: int,
    max_tokens: int, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure, and print every line as SIMULATED. Errors: typer.BadParameter, PlanError, BenchError, PlacementError."""
    from drafters.proposal import Budget
    from server.bench.shape_race import ShapeOptions, bench_shape
    from server.placement.devices import drafter_placement
    from server.placement.shape import SHAPES

    if acceptance is None:
        raise typer.BadParameter("a shape has no drafter; say --simulate-acceptance", param_hint="--shape")
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is none of {', '.join(SHAPES)}", param_hint="--shape")
    if layers is not None and not 1 <= layers <= SHAPES[shape].num_layers:
        raise typer.BadParameter(f"{shape} has {SHAPES[shape].num_layers} layers", param_hint="--layers")
    if gpu_layers > (layers or SHAPES[shape].num_layers):
        raise typer.BadParameter(f"{shape} is measured with fewer layers", param_hint="--shape-gpu-layers")
    budget = Budget(settings.rows or 8, settings.top_k or 2, 6 if settings.depth is None else settings.depth)
    options = ShapeOptions(
        SHAPES[shape], settings.weights or "int4", acceptance, budget, layers, blocks,
        drafter_placement(settings.drafter_device), gpu_layers, max_tokens, repeats, settings.threads,
    )  # fmt: skip
    with progress_bar() as advance:
        report = bench_shape(options, advance)
    show(report, Console(stderr=True, markup=False, soft_wrap=True))
    return report


def show(report: dict[str, Any], console: Console) -> None:
    """The report for people; no line without the word."""
    shape, predicted, drafted = report["shape"], report["predicted"], report["dovetail"]
    part = "" if shape["num_layers"] == report["of_layers"] else f" of {report['of_layers']}"
    lines = [
        f"{shape['name']}, {shape['num_layers']}{part} layers, {report['weights']}, random weights, "
        f"{report['hardware']['cpu']}, {report['hardware']['threads']} threads",
        f"plain {report['plain']['tokens_per_s']:.2f} tokens/s, predicted {predicted['plain_tokens_per_s']:.2f}",
        f"dovetail {drafted['tokens_per_s']:.2f} tokens/s at {drafted['acceptance_length']:.2f} tokens a round, "
        f"predicted {predicted['tokens_per_s']:.2f}; {report['speedup']:.2f} x plain",
        "verify, ms: " + ", ".join(
            f"T({rows}) {taken:.1f} (predicted {predicted['verify_ms'][rows]:.1f})"
            for rows, taken in report["verify_ms"].items()
        ),
    ]  # fmt: skip
    for line in lines:
        console.print(f"SIMULATED {line}")
