"""The picture of several streams: tokens per second of all together, by contestant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PANELS = {"decode": "in one process", "servers": "over HTTP, prompts included"}


def plot_streams(report: dict[str, Any], file: Path) -> None:
    """Speeds of ``report["decode"]`` and ``report["servers"]``, those there are; needs matplotlib (extra `train`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [name for name in PANELS if name in report]
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    hardware, target = report["hardware"], report["target"]
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, by_count in report[panel].items():
            if name != "unavailable":
                speeds = [figures["tokens_per_s"] for figures in by_count.values()]
                axes.plot(list(by_count), speeds, marker="o", label=name)
        axes.set_xlabel("streams")
        axes.set_ylabel("tokens/s of all streams together")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        head = f"{target['name']} ({target['weights']}), {hardware['cores']} cores"
        axes.set_title(f"{head}, {PANELS[panel]}", fontsize="medium")
    figure.savefig(file, dpi=130)
