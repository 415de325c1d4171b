"""What a study found: figures of every variant over its seeds, and its gain over one of them, seed by seed."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.training.options import RecipeError
from kernels.training.study import FINISHED, NOT_RUN, Cell, Outcome, Spread, read_outcome, summarise_seeds


@dataclass(frozen=True)
class StudyRow:
    """One variant. ``figures`` are over its finished seeds, None where none has the figure.

    ``gain`` is the difference of the first figure to the baseline's, taken seed by seed, so that what a seed does to
    both (initial weights, order of images) cancels; None for the baseline itself. ``wins`` counts the seeds in which it
    is above zero. ``seconds`` is the time of a training, ``seeds`` says for each how it stands.
    """

    variant: str
    figures: dict[str, Spread | None]
    gain: Spread | None
    wins: int
    seconds: Spread | None
    seeds: dict[int, str]


def study_rows(cells: Sequence[Cell], figures: Sequence[str], baseline: str | None = None) -> list[StudyRow]:
    """A row for each variant in the study's order; ``figures`` are names in the reports' ``final``.

    Errors: RecipeError where no finished cell has one of the figures, ``baseline`` is no variant, or a cell's recipe
    has changed since it was trained.
    """
    outcomes = [read_outcome(cell) for cell in cells]
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    if baseline is not None and baseline not in variants:
        raise RecipeError(f"the study has no variant {baseline}; it has {', '.join(variants)}")
    known = sorted({name for outcome in outcomes for name in outcome.final})
    unknown = [name for name in figures if name not in known]
    if not figures or (known and unknown):
        raise RecipeError(f"no report has {', '.join(unknown) or 'no figure'}; the reports have {', '.join(known)}")
    return [row_of(variant, outcomes, figures, baseline) for variant in variants]


def row_of(variant: str, outcomes: Sequence[Outcome], figures: Sequence[str], baseline: str | None) -> StudyRow:
    """The row of one variant."""
    own = {outcome.seed: outcome for outcome in outcomes if outcome.variant == variant}
    finished = {seed: outcome for seed, outcome in own.items() if outcome.status == FINISHED}
    values = {name: [run.final[name] for run in finished.values() if name in run.final] for name in figures}
    main = figures[0]
    base = {run.seed: run.final[main] for run in outcomes if run.variant == baseline and main in run.final}
    differences = [run.final[main] - base[seed] for seed, run in finished.items() if seed in base and main in run.final]
    return StudyRow(
        variant,
        {name: spread(found) for name, found in values.items()},
        None if variant == baseline else spread(differences),
        0 if variant == baseline else sum(difference > 0 for difference in differences),
        spread([run.seconds for run in finished.values()]),
        {seed: run.status for seed, run in own.items()},
    )


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and sample deviation (0 for a single value) of what is there; None where nothing is."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    return Spread(statistics.fmean(present), statistics.stdev(present) if len(present) > 1 else 0.0, len(present))


def write_study(rows: Sequence[StudyRow], cells: Sequence[Cell], baseline: str | None, file: Path) -> dict[str, Any]:
    """Rows and conditions as JSON in ``file``, a plot beside it (``.png``); returns the JSON object."""
    training = cells[0].recipe["training"]
    report = {
        "conditions": {key: training[key] for key in ("steps", "batch_size", "threads") if key in training},
        "baseline": baseline,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(rows, baseline, file.with_suffix(".png"))
    return report


def markdown(report: Mapping[str, Any]) -> str:
    """The table of a report in Markdown."""
    rows, baseline = report["rows"], report["baseline"]
    names = list(rows[0]["figures"])
    gained = [f"gain over {baseline}"] if baseline else []
    lines = [
        "| " + " | ".join(["variant", *names, *gained, "seeds"]) + " |",
        "|---" * (len(names) + len(gained) + 2) + "|",
    ]
    for row in rows:
        gain = []
        if baseline:
            gained_in = f", {row['wins']} of {row['gain']['runs']}" if row["gain"] else ""
            gain = ["-" if row["gain"] is None else number(row["gain"], signed=True) + gained_in]
        figures = [number(row["figures"][name]) for name in names]
        lines.append("| " + " | ".join([row["variant"], *figures, *gain, summarise_seeds(row["seeds"])]) + " |")
    return "\n".join(lines)


def number(spread: Mapping[str, Any] | None, signed: bool = False) -> str:
    """A mean with its deviation where there is more than one run."""
    if spread is None:
        return NOT_RUN
    deviation = f" ± {spread['std']:.4f}" if spread["runs"] > 1 else ""
    return f"{spread['mean']:{'+' if signed else ''}.4f}{deviation}"


def plot(rows: Sequence[StudyRow], baseline: str | None, file: Path) -> None:
    """Mean and deviation of every figure, variants from top to bottom; the baseline's mean is a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(rows[0].figures)
    shown = [row for row in rows if any(row.figures.values())]
    figure = Figure(figsize=(2.4 + 2.4 * len(names), 1.2 + 0.32 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        for place, row in enumerate(shown):
            found = row.figures[name]
            if found is not None:
                colour = "C1" if row.variant == baseline else "C0"
                axis.errorbar(found.mean, place, xerr=found.std, marker="o", capsize=3, color=colour)
                if row.variant == baseline:
                    axis.axvline(found.mean, color="C1", alpha=0.4, linewidth=1)
        axis.set(xlabel=name.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(shown)), [row.variant for row in shown], fontsize="small")
    axes[0].invert_yaxis()
    figure.savefig(file, dpi=110)
