"""The picture of a plan: what lies where in GiB, and what each of the plans would give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FORMATS = (".png", ".svg")
PLACES = {
    "GPU": (("drafter", "drafter_bytes"), ("layers", "gpu_layer_bytes"), ("keys and values", "gpu_kv_bytes")),
    "main memory": (("the target and the rest", "cpu_bytes"),),
}


def draw_plan(found: dict[str, Any], file: Path) -> None:
    """Bars of the report of ``dovetail plan``, into a .png or .svg file; needs matplotlib (extra `train`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    bytes_of, speeds = figure.subplots(1, 2)
    placed = found["placement"]
    on_gpu = placed["drafter_device"] == "gpu"
    for place, parts in PLACES.items():
        start = 0.0
        for label, key in parts:
            size = placed[key] / 2**30 if on_gpu or place != "GPU" else 0.0
            bytes_of.barh(place, size, left=start, label=f"{label}: {size:.2f} GiB")
            start += size
    if found["budget_bytes"] is not None:
        bytes_of.axvline(found["budget_bytes"] / 2**30, color="grey", linestyle="--", label="budget of the GPU")
    bytes_of.set_xlabel("GiB")
    bytes_of.legend(fontsize="small")
    entries = [found, *found["alternatives"]]
    names = [f"{one['placement']['drafter_blocks']} blocks, {one['placement']['gpu_layers']} layers" for one in entries]
    rates = [one["predicted"]["tokens_per_s"] for one in entries]
    places = range(len(entries), 0, -1)
    speeds.barh(places, rates, tick_label=names)
    speeds.axvline(found["predicted"]["plain_tokens_per_s"], color="grey", linestyle="--", label="plain, on the CPU")
    speeds.set_xlabel("tokens/s, predicted")
    speeds.legend(fontsize="small")
    figure.suptitle(f"{found['shape']['name']}, {found['weights']}, context {found['context']}", fontsize="medium")
    figure.savefig(file, dpi=120)
