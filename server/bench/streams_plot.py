"""The picture of several streams: tokens per second of all together, by contestant."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_streams(report: dict[str, Any], file: Path) -> None:
    """Speeds of ``report["decode"]``; needs matplotlib (extra `train`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    counts: list[str] = []
    for name, by_count in report["decode"].items():
        counts = list(by_count)
        axes.plot(counts, [figures["tokens_per_s"] for figures in by_count.values()], marker="o", label=name)
    axes.set_xlabel("streams")
    axes.set_ylabel("tokens/s of all streams together")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    hardware, target = report["hardware"], report["target"]
    axes.set_title(f"{target['name']} ({target['weights']}), {hardware['cores']} cores", fontsize="medium")
    figure.savefig(file, dpi=130)
