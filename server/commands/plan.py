"""``dovetail plan``: what would lie where for a budget of GPU memory, and how fast it would be; loads no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from server.commands.options import check_folder

if TYPE_CHECKING:
    from server.placement.machine import Machine
    from server.placement.what_if import WhatIf

DEFAULT_CONTEXT = 2048


def plan(
    target: Annotated[
        str,
        typer.Argument(
            help="Folder with config.json, .gguf file, hub id, or a bare shape such as llama2-7b.", show_default=False
        ),
    ],
    vram: Annotated[
        str | None,
        typer.Option(help="GPU memory, such as 3GiB; nothing: what is free less a margin.", show_default=False),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="How the target's weights are held; nothing: int4, or as a GGUF file stores them.",
            metavar="[fp32|bf16|int8|int4]",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Positions to hold. Default: {DEFAULT_CONTEXT} or what the target allows.", show_default=False
        ),
    ] = None,
    what_if: Annotated[
        str | None,
        typer.Option(
            help="Another machine, as in cores=16,bandwidth=80,vram=4GiB,gpu_bandwidth=200,gpu_tflops=10,pcie=12; also "
            "dots, latency_us, engine=native|torch, acceptance, and blocks, layers, rows to fix what is searched.",
            show_default=False,
        ),
    ] = None,
    stream_prefill: Annotated[
        bool, typer.Option("--stream-prefill", help="Long prompts are read by the GPU, layers streamed to it.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw it into this .png or .svg file.", show_default=False)
    ] = None,
) -> None:
    """Say what would lie where, in bytes, with predicted speed and the runners-up. The last line printed is JSON."""
    from server.placement.cost import streaming_break_even
    from server.placement.picture import draw_plan
    from server.placement.plan import Request, make_plan, with_stream
    from server.placement.shape import STORED, read_shape
    from server.settings import parse_bytes

    check_picture(picture)
    shape = read_shape(target)
    asked = None if vram is None else parse_budget(parse_bytes, vram)
    wanted, assumed = described(what_if) if what_if is not None else measured(asked)
    budget = asked if asked is not None else wanted.vram
    if what_if is not None and asked is not None and wanted.vram is not None and asked > wanted.vram:
        raise typer.BadParameter(f"{vram} is more than the card's {wanted.vram} bytes", param_hint="--vram")
    held = weights or ("int4" if shape.stored_bytes is None else STORED)
    positions = context or min(DEFAULT_CONTEXT, shape.max_context)
    request = Request(shape, held, positions, budget, wanted.blocks, wanted.layers, wanted.rows)
    rates = wanted.rates()
    if stream_prefill:
        request, why_not = with_stream(request, rates)
        assumed += filter(None, [why_not])
    found = make_plan(request, rates).json() | {"machine": vars(wanted), "assumed": assumed}
    found["prefill_break_even_tokens"] = None if budget is None else streaming_break_even(shape, request.weights, rates)
    show(found, Console(stderr=True, markup=False))
    if picture is not None:
        draw_plan(found, picture)
    typer.echo(json.dumps(found))


def described(what_if: str) -> tuple[WhatIf, list[str]]:
    """The machine of ``--what-if``, of which nothing is assumed. Errors: typer.BadParameter."""
    from server.placement.what_if import parse_what_if

    return parse_what_if(what_if), []


def measured(asked: int | None) -> tuple[WhatIf, list[str]]:
    """This machine, and what of a plan for it is not measured. Errors: typer.BadParameter beyond its card."""
    from server.placement.machine import compute_with, measure_machine
    from server.placement.what_if import this_machine

    compute_with()
    machine = measure_machine()
    return this_machine(machine), assumptions(machine, asked)


def check_picture(file: Path | None) -> None:
    """Errors: typer.BadParameter for a folder that is not there and for a kind of file that cannot be drawn."""
    from server.placement.picture import FORMATS

    check_folder(file, "--picture")
    if file is not None and file.suffix not in FORMATS:
        raise typer.BadParameter(f"{file} is no {' or '.join(FORMATS)} file", param_hint="--picture")


def parse_budget(parse: Any, text: str) -> int:
    """Bytes above 0. Errors: typer.BadParameter."""
    try:
        number: int = parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--vram") from error
    if number < 1:
        raise typer.BadParameter(
            "a budget is above 0 bytes; leave it out to plan for what is free", param_hint="--vram"
        )
    return number


def assumptions(machine: Machine, asked: int | None) -> list[str]:
    """What of a plan for this machine is not measured. Errors: typer.BadParameter beyond the card."""
    if machine.gpus and asked is not None and asked > machine.gpus[0].memory_bytes:
        card = machine.gpus[0]
        raise typer.BadParameter(
            f"{asked} bytes are more than {card.name} has, {card.memory_bytes}", param_hint="--vram"
        )
    no_card = asked is not None and not machine.gpus
    return ["acceptance length", *(["there is no GPU here: its bandwidth, arithmetic and bus"] if no_card else [])]


def show(found: dict[str, Any], console: Console) -> None:
    """The plan for people."""
    shape, budget = found["shape"], found["budget_bytes"]
    where = "no GPU" if budget is None else f"{budget / 2**30:.2f} GiB of GPU memory"
    table = Table(title=f"{shape['name']}, {found['weights']}, context {found['context']}, {where}")
    for column in ("", "drafter", "GPU layers", "rows", "GPU, GiB", "CPU, GiB", "tokens/s", "x plain"):
        table.add_column(column)
    for number, entry in enumerate([found, *found["alternatives"]]):
        placed, predicted = entry["placement"], entry["predicted"]
        drafter = f"{placed['drafter_blocks']} blocks on {placed['drafter_device']}"
        table.add_row(
            "plan" if number == 0 else f"{number + 1}.",
            drafter if placed["drafter_blocks"] else "none",
            f"{placed['gpu_layers']}/{shape['num_layers']}", str(placed["rows"]),
            f"{placed['gpu_bytes'] / 2**30:.2f}", f"{placed['cpu_bytes'] / 2**30:.2f}",
            f"{predicted['tokens_per_s']:.2f}", f"{predicted['speedup']:.2f}",
        )  # fmt: skip
    console.print(table)
    placed, predicted = found["placement"], found["predicted"]
    console.print(
        f"drafter {placed['drafter_bytes']} bytes (head of {placed['drafter_head_tokens']} tokens), layers "
        f"{placed['gpu_layer_bytes']}, keys and values "
        f"{placed['gpu_kv_bytes']} on the GPU; a round: verify {predicted['verify_ms']:.1f} ms, draft "
        f"{predicted['draft_ms']:.1f}, transfer {predicted['transfer_ms']:.2f}; "
        f"{predicted['acceptance_length']:.2f} tokens",
        soft_wrap=True,
    )
    if (tokens := found["prefill_break_even_tokens"]) is not None:
        how = f"in {placed['stream_bytes']} bytes of it" if placed["stream_bytes"] else "with --stream-prefill"
        console.print(
            f"the GPU reads prompts of more than {tokens} tokens sooner than the CPU, layers streamed to it {how}"
        )
    for what in found["assumed"]:
        console.print(f"assumed, not measured: {what}", soft_wrap=True)
