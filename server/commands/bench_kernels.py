"""``dovetail bench kernels`` and ``dovetail bench diagonalwise``: kernels apart from any model."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

JsonFile = Annotated[
    Path | None, typer.Option("--json", dir_okay=False, help="Also write it here.", show_default=False)
]


def kernels(
    shapes: Annotated[str, typer.Option(help="Shapes, by commas: smollm2-135m, 0.5B, 1B, 3B, 7B.")] = "1B",
    scopes: Annotated[str, typer.Option(help="products, model (whole model of random weights), by commas.")] = (
        "products,model"
    ),
    weights: Annotated[str, typer.Option(help="Weight formats, by commas.")] = "int4,int8,bf16",
    rows: Annotated[str, typer.Option(help="Rows of a pass, by commas.")] = "1,2,4,8,16",
    contexts: Annotated[str, typer.Option(help="Tokens before the rows of a whole model, by commas.")] = "64,1024",
    layers: Annotated[
        int | None, typer.Option(min=1, help="At most so many layers of a shape, where memory is short.")
    ] = None,
    groups: Annotated[str, typer.Option(help="Group sizes beside 32 for our products: 64, 128.")] = "64,128",
    beside: Annotated[
        str, typer.Option(help="Also passes per second beside so many busy processes, by commas, such as 2,4.")
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Times each is measured.")] = 7,
    peers: Annotated[bool, typer.Option(help="Measure other engines beside ours.")] = True,
    instruction_set: Annotated[
        str | None,
        typer.Option(help="Ours by another one that this processor has, such as avx2; nothing: the fastest."),
    ] = None,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Draw T(n)/T(1) here.", show_default=False)] = None,
) -> None:
    """Many rows against one: our products and whole models beside torch, ONNX Runtime, OpenVINO and llama.cpp.

    Every round also measures the memory's speed and the processor's peak. The last line printed is JSON.
    """
    from kernels import native
    from kernels.linear_lowbit.bench import BenchOptions
    from server.bench import kernel_report
    from server.placement.machine import compute_with

    compute_with()
    options = BenchOptions(
        shapes=shapes.split(","),
        weights=weights.split(","),
        rows=[int(count) for count in rows.split(",")],
        rounds=rounds,
        layers=layers,
        groups=[int(size) for size in groups.split(",") if size],
        peers=peers,
    )
    console = Console(stderr=True, markup=False, soft_wrap=True)
    lengths = [int(length) for length in contexts.split(",")]
    busy = [int(count) for count in beside.split(",") if count]
    if instruction_set is not None and instruction_set not in native.available_instruction_sets():
        offered = ", ".join(native.available_instruction_sets()) or "none: the native kernels are not built"
        raise typer.BadParameter(f"{instruction_set}: this machine has {offered}", param_hint="--instruction-set")
    with contextlib.nullcontext() if instruction_set is None else native.use_instruction_set(instruction_set):
        report = kernel_report.bench_kernels(
            options, [scope for scope in scopes.split(",") if scope], lengths, busy, console.print
        )
    for table in (
        *kernel_report.tables(report), *kernel_report.parts_tables(report), *kernel_report.beside_tables(report),
    ):  # fmt: skip
        console.print(table)
    for line in kernel_report.remarks(report):
        console.print(line)
    if plot is not None:
        kernel_report.plot(report, plot)
    text = json.dumps(report)
    if json_file is not None:
        json_file.write_text(text + "\n", encoding="utf-8")
    typer.echo(text)


def diagonalwise(
    networks: Annotated[str, typer.Option(help="Networks whose layers are measured, by commas; empty: all.")] = "",
    batches: Annotated[str, typer.Option(help="Batch sizes, by commas.")] = "1,16,64",
    dtypes: Annotated[str, typer.Option(help="Types, by commas: fp32, tf32, bf16, fp16.")] = "fp32,bf16",
    passes: Annotated[
        str, typer.Option(help="Passes, by commas: forward, input_gradient, weight_gradient, step.")
    ] = "forward,input_gradient,weight_gradient,step",
    compiled: Annotated[bool, typer.Option(help="Add torch.compile, which takes long.")] = False,
    net_batch: Annotated[int, typer.Option(min=0, help="Batch of training steps of whole networks; 0: none.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Times each is measured.")] = 30,
    limit: Annotated[float, typer.Option(help="Seconds for a cell, ten times that for a network.")] = 10.0,
    json_file: Annotated[Path, typer.Option("--json", dir_okay=False, help="Report; the plot lies beside it.")] = Path(
        "diagonalwise.json"
    ),
) -> None:
    """Depthwise convolutions: native, refactored diagonalwise, Triton, torch.compile; layers and whole nets."""
    from kernels.diagonalwise import bench
    from kernels.diagonalwise.bench_report import markdown, write_report
    from server.placement.machine import measure_machine
    from vision.backbones import create_backbone
    from vision.measure.classification import default_device

    chosen = tuple(networks.split(",")) if networks else tuple(bench.GRID)
    sizes = tuple(int(size) for size in batches.split(","))
    options = bench.BenchOptions(
        networks=chosen, batches=sizes, dtypes=tuple(dtypes.split(",")), passes=tuple(passes.split(",")),
        compiled=compiled, repeats=repeats, limit_s=limit,
    )  # fmt: skip
    device, console = default_device(), Console(stderr=True)
    cells = bench.bench_layers(options, device, lambda cell: console.print(cell.network, cell.geometry, cell.work))
    makers = {name: partial(create_backbone, name) for name in chosen if net_batch}
    nets = bench.bench_nets(makers, device, batch=net_batch, repeats=repeats, limit_s=10 * limit, compiled=compiled)
    left_out = bench.not_run(options, device) | ({} if nets else {"whole networks": "not asked for"})
    report = write_report(cells, nets, left_out, measure_machine().json(), json_file)
    typer.echo(f"{markdown(report['summary'])}\n\n{report['verdict']}", err=True)
    typer.echo(json.dumps({key: value for key, value in report.items() if key != "cells"}))
