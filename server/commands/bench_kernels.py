"""``dovetail bench kernels`` and ``dovetail bench diagonalwise``: kernels apart from any model."""

from __future__ import annotations

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
    shapes: Annotated[str, typer.Option(help="LLaMA shapes, by commas: 1B, 3B, 7B.")] = "1B",
    weights: Annotated[str, typer.Option(help="Weight formats, by commas.")] = "int4,int8,bf16",
    rows: Annotated[str, typer.Option(help="Rows of a pass, by commas.")] = "1,2,4,8,16,32",
    rounds: Annotated[int, typer.Option(min=1, help="Times each is measured.")] = 7,
    peers: Annotated[bool, typer.Option(help="Measure torch's own products beside ours.")] = True,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Draw T(n)/T(1) here.", show_default=False)] = None,
) -> None:
    """Products of many rows against one, beside torch's, the memory's speed and the processor's peak."""
    from kernels.linear_lowbit import bench

    counts = [int(count) for count in rows.split(",")]
    result = bench.bench_kernels(shapes.split(","), weights.split(","), counts, rounds=rounds, peers=peers)
    Console(stderr=True).print(bench.table(result))
    if plot is not None:
        bench.plot(result, plot)
    line = json.dumps(result)
    if json_file is not None:
        json_file.write_text(line + "\n", encoding="utf-8")
    typer.echo(line)


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
    from server.bench.hardware import measure_hardware
    from vision.backbones import create_backbone
    from vision.evaluate import default_device

    chosen = tuple(networks.split(",")) if networks else tuple(bench.GRID)
    sizes = tuple(int(size) for size in batches.split(","))
    options = bench.BenchOptions(
        networks=chosen, batches=sizes, dtypes=tuple(dtypes.split(",")), passes=tuple(passes.split(",")),
        compiled=compiled, repeats=repeats, limit_s=limit,
    )  # fmt: skip
    device, console = default_device(), Console(stderr=True)
    cells = bench.bench_layers(options, device, lambda cell: console.print(cell.network, cell.geometry, cell.work))
    makers = {name: partial(create_backbone, name) for name in chosen if net_batch}
    nets = bench.bench_nets(makers, device, batch=net_batch, repeats=repeats, limit_s=10 * limit)
    left_out = bench.not_run(options, device) | ({} if nets else {"whole networks": "not asked for"})
    report = write_report(cells, nets, left_out, measure_hardware().json(), json_file)
    typer.echo(f"{markdown(report['summary'])}\n\n{report['verdict']}", err=True)
    typer.echo(json.dumps({key: value for key, value in report.items() if key != "cells"}))
