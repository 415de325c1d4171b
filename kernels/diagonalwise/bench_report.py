"""What the benchmark of depthwise layers says: a summary, one plain sentence, JSON and a plot."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kernels.diagonalwise.bench import PASSES, Cell
from kernels.diagonalwise.timing import Timing
from kernels.diagonalwise.tune import NATIVE


def summarise(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """For each type, layout, pass and contender: geometric mean of the ratio to native, share won, extremes."""
    groups: dict[tuple[str, str, str, str], list[float]] = {}
    for cell in cells:
        for name in cell.timings:
            if name != NATIVE:
                groups.setdefault((cell.dtype, cell.layout, cell.work, name), []).append(cell.ratio(name))
    return [
        {
            "dtype": dtype, "layout": layout, "pass": work, "contender": name, "cells": len(ratios),
            "geometric_mean_ratio": statistics.geometric_mean(ratios),
            "won": sum(ratio < 1 for ratio in ratios) / len(ratios), "best": min(ratios), "worst": max(ratios),
        }
        for (dtype, layout, work, name), ratios in groups.items()
    ]  # fmt: skip


def verdict(cells: Sequence[Cell]) -> str:
    """One plain sentence on the refactored forms in whole steps."""
    steps = [cell for cell in cells if cell.work == "step"]
    if not steps:
        return "No whole training steps were measured."
    best = [min((cell.ratio(name), name) for name in cell.timings if name.startswith("diagonalwise")) for cell in steps]
    won = sum(
        any(t.clearly_beats(cell.timings[NATIVE]) for n, t in cell.timings.items() if n.startswith("diagonalwise"))
        for cell in steps
    )
    mean = statistics.geometric_mean(ratio for ratio, _ in best)
    return (
        f"The best refactored form beats torch's own depthwise layer beyond noise in {won} of {len(steps)} training "
        f"steps of a layer; its time is {mean:.2f} of native's in the geometric mean."
    )


def write_report(
    cells: Sequence[Cell], nets: Mapping[str, Mapping[str, Timing]], device: torch.device, file: Path
) -> dict[str, Any]:
    """Everything as JSON in ``file``, a plot of the summary beside it (``.png``); returns the JSON object."""
    summary = summarise(cells)
    report = {
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "verdict": verdict(cells),
        "summary": summary,
        "networks": {name: {k: asdict(t) for k, t in timings.items()} for name, timings in nets.items()},
        "cells": [asdict(cell) for cell in cells],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(summary, file.with_suffix(".png"))
    return report


def hardware(device: torch.device) -> str:
    """The name of what was measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def plot(summary: list[dict[str, Any]], file: Path) -> None:
    """Ratios to native of every contender, one panel for each type and layout; logarithmic, native is the line at 1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = sorted({(row["dtype"], row["layout"]) for row in summary})
    names = sorted({row["contender"] for row in summary})
    figure = Figure(figsize=(8, 2.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (dtype, layout) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for place, work in enumerate(PASSES):
            rows = {r["contender"]: r for r in summary if (r["dtype"], r["layout"], r["pass"]) == (dtype, layout, work)}
            values = [rows[name]["geometric_mean_ratio"] if name in rows else float("nan") for name in names]
            places = [n + 0.2 * (place - 1.5) for n in range(len(names))]
            axis.bar(places, values, width=0.18, label=work)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
        axis.set_title(f"{dtype}, {layout}: time over native's")
        axis.legend(fontsize="small")
    figure.savefig(file, dpi=110)
