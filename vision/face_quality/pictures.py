"""Plots of a face-quality report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Line:
    """One method's error-versus-discard curve, the area under it, and matplotlib's style of its line."""

    fractions: Sequence[float]
    fnmr: Sequence[float | None]
    area: float
    style: str


def plot_curves(curves: Mapping[str, Line], highlighted: str, fmr: float, file: Path) -> None:
    """FNMR over the share of discarded pairs, a line a method; ``highlighted`` is drawn bold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, line in curves.items():
        style: dict[str, Any] = {"linewidth": 2.5} if name == highlighted else {"linestyle": line.style}
        axis.plot(line.fractions, np.array(line.fnmr, dtype=np.float64), label=f"{name} ({line.area:.2f})", **style)
    axis.set_xlabel("share of mated pairs discarded, lowest quality first")
    axis.set_ylabel(f"FNMR, threshold at FMR {fmr:g}")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file, dpi=110)


def plot_order(ordered: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """A group of bars a defect."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    kinds = list(next(iter(ordered.values())))
    width = 0.8 / len(ordered)
    for place, (name, shares) in enumerate(ordered.items()):
        axis.bar(np.arange(len(kinds)) + place * width, [shares[kind] for kind in kinds], width, label=name)
    axis.set_xticks(np.arange(len(kinds)) + 0.4 - width / 2, kinds)
    axis.axhline(0.5, color="black", linewidth=0.8)
    axis.set_ylabel("pairs in the right order")
    figure.legend(loc="outside upper center", fontsize="small", ncols=len(ordered))
    figure.savefig(file, dpi=110)
