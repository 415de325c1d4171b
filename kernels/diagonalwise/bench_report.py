"""What the benchmark of depthwise layers says: a summary, one plain sentence, JSON and a plot."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

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


def verdict(cells: Sequence[Cell], nets: Mapping[str, Mapping[str, Timing]]) -> str:
    """Plain sentences: the refactored forms in training steps of a layer, where they win, and in whole networks."""
    steps = [cell for cell in cells if cell.work == "step"]
    if not steps:
        return "No whole training steps were measured."
    best = [min((cell.ratio(name), name) for name in cell.timings if name.startswith("diagonalwise")) for cell in steps]
    won = [cell for cell in steps if refactoring_wins(cell)]
    mean = statistics.geometric_mean(ratio for ratio, _ in best)
    return (
        f"The best refactored form beats torch's own depthwise layer beyond noise in {len(won)} of {len(steps)} "
        f"training steps of a layer{places(won, steps)}; its time is {mean:.2f} of native's in the geometric mean."
        f"{verdict_on_nets(nets)}"
    )


def refactoring_wins(cell: Cell) -> bool:
    """Whether a refactored form is faster than native beyond noise."""
    native = cell.timings[NATIVE]
    return any(timing.clearly_beats(native) for n, timing in cell.timings.items() if n.startswith("diagonalwise"))


def places(won: Sequence[Cell], steps: Sequence[Cell]) -> str:
    """Type, layout and stride of the cells won, with their share of the cells of that kind."""
    if not won:
        return ""
    kinds = [Counter((c.dtype, c.layout, c.geometry.stride) for c in cells) for cells in (won, steps)]
    parts = (
        f"{dtype} {layout} stride {stride}: {count} of {kinds[1][dtype, layout, stride]}"
        for (dtype, layout, stride), count in sorted(kinds[0].items())
    )
    return f" ({'; '.join(parts)})"


def verdict_on_nets(nets: Mapping[str, Mapping[str, Timing]]) -> str:
    """How whole networks fare: the faster layout of each way against native's faster layout."""
    if not nets:
        return " Whole networks were not measured."
    parts = []
    for net, timings in nets.items():
        best: dict[str, float] = {}
        for name, timing in timings.items():
            way = name.removesuffix("_nchw").removesuffix("_channels_last").replace("_", " ")
            best[way] = min(timing.median_ms, best.get(way, timing.median_ms))
        shares = (f"{median / best[NATIVE]:.2f} {way}" for way, median in best.items() if way != NATIVE)
        parts.append(f"{net} {', '.join(shares)}")
    return f" Training steps of whole networks, as shares of native's time: {'; '.join(parts)}."


def write_report(
    cells: Sequence[Cell],
    nets: Mapping[str, Mapping[str, Timing]],
    left_out: Mapping[str, str],
    hardware: Mapping[str, Any],
    file: Path,
) -> dict[str, Any]:
    """Everything as JSON in ``file``, a plot of the summary beside it (``.png``); returns the JSON object.

    ``left_out`` says what was not measured and why, ``hardware`` what was measured on.
    """
    summary = summarise(cells)
    report = {
        "hardware": dict(hardware),
        "verdict": verdict(cells, nets),
        "not_run": dict(left_out),
        "summary": summary,
        "networks": {name: {k: asdict(t) for k, t in timings.items()} for name, timings in nets.items()},
        "cells": [asdict(cell) for cell in cells],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(lines_of(report), encoding="utf-8")
    plot(summary, file.with_suffix(".png"))
    return report


def markdown(summary: Sequence[Mapping[str, Any]]) -> str:
    """Geometric means of the ratios to native in Markdown: a row for each pass, type and layout."""
    names = list(dict.fromkeys(row["contender"] for row in summary))
    lines = [f"| pass | type | layout | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for work, dtype, layout in dict.fromkeys((row["pass"], row["dtype"], row["layout"]) for row in summary):
        ratios = {
            row["contender"]: f"{row['geometric_mean_ratio']:.2f}"
            for row in summary
            if (row["pass"], row["dtype"], row["layout"]) == (work, dtype, layout)
        }
        figures = " | ".join(ratios.get(name, "-") for name in names)
        lines.append(f"| {work.replace('_', ' ')} | {dtype} | {layout} | {figures} |")
    return "\n".join(lines)


def lines_of(report: Mapping[str, Any]) -> str:
    """JSON with one line for each item of the report's lists and tables."""
    parts = []
    for name, value in report.items():
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(json.dumps(item) for item in value) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


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
