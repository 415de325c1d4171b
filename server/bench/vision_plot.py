"""The plot of ``dovetail bench vision``."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_vision(report: dict[str, Any], file: Path) -> None:
    """Three panels: one image on one thread beside the peer, the endpoint by clients, text alone and beside vision."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    alone, endpoint, text = figure.subplots(1, 3)
    single = report["single_thread"]
    times = {f"{single['model']} ({single['runtime']})": single["ms_per_image"]}
    if "peer" in single:
        times["NanoDet-m structure"] = single["peer"]["ms_per_image"]
    bars = alone.bar(list(times), list(times.values()), color=["C0", "C7"][: len(times)])
    alone.bar_label(bars, fmt="%.1f")
    alone.set(ylabel="ms an image, one thread")
    loads = report["endpoint"]
    bars = endpoint.bar(range(len(loads)), [figures["images_per_s"] for figures in loads.values()], color="C0")
    endpoint.set_xticks(range(len(loads)), list(loads))
    endpoint.bar_label(bars, fmt="%.1f")
    endpoint.set(xlabel="clients", ylabel="images/s over HTTP")
    if "text" in report:
        speeds = report["text"]
        label = f"beside {speeds['vision_clients']}\nvision clients"
        values = [speeds["alone_tokens_per_s"], speeds["beside_tokens_per_s"]]
        text.bar_label(text.bar(["alone", label], values, color=["C7", "C0"]), fmt="%.0f")
        text.set(ylabel="tokens/s of text")
    else:
        text.set_axis_off()
    for axis in (alone, endpoint, text):
        axis.margins(y=0.12)
        axis.tick_params(labelsize="small")
    figure.savefig(file, dpi=110)
