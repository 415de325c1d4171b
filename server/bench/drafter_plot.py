"""The picture of an evaluation: acceptance per depth, and the reliability of the drafter's probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LONGEST_LABEL = 40  # letters of a drafter's folder: a legend wider than its panel leaves no room for the curves


def plot_evaluation(report: dict[str, Any], file: Path) -> None:
    """Both panels for every drafter and tree size of ``report``; needs matplotlib (extra `train`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    by_depth, reliability = figure.subplots(1, 2)
    reliability.plot([0, 1], [0, 1], color="grey", linewidth=0.8, label="calibrated")
    settings = [(entry["drafter"], one) for entry in report["drafters"] for one in entry["settings"]]
    for label, figures in [*settings, ("n-gram", report["ngram"])]:
        short = label if len(label) <= LONGEST_LABEL else f"...{label[-LONGEST_LABEL:]}"
        name = f"{short} {figures['top_k']}x{figures['depth']}x{figures['rows']}"
        shares = {row["depth"]: row["share"] for row in figures["acceptance_per_depth"]}
        by_depth.plot(list(shares), list(shares.values()), marker="o", label=name)
        if figures["calibration"] is not None:
            bins = figures["calibration"]["bins"]
            means, accepted = [one["mean_probability"] for one in bins], [one["accepted_share"] for one in bins]
            reliability.plot(means, accepted, marker="o", label=f"{name}: ECE {figures['calibration']['ece']:.3f}")
    by_depth.set_xlabel("depth: tokens below the root")
    by_depth.set_ylabel("share accepted, given the token above was")
    by_depth.set_ylim(0, 1)
    reliability.set_xlabel("the drafter's probability")
    reliability.set_ylabel("share accepted")
    conditions = report["conditions"]
    figure.suptitle(
        f"{report['target']['name']} ({report['target']['weights']}), {conditions['suite']}: {conditions['texts']} "
        f"texts of at most {conditions['max_tokens']} tokens; tree sizes are top-k x depth x rows",
        fontsize="medium",
    )
    for axes in (by_depth, reliability):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=130)
