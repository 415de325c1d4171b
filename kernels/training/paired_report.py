"""The comparisons that a study's recipe asks for: read from its cells, written as JSON, rows of a table and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernels.training.options import RecipeError, take_table
from kernels.training.paired import Measured, PairedResult, PairingError, compare_pairs
from kernels.training.study import FAILED, FINISHED, Cell, Outcome, StudyOptions, read_outcome

HEAD = "| claim | compared | figure | gain, 95 % interval | n | smallest effect | verdict | seconds |"


@dataclass(frozen=True)
class PairedStudy:
    """``results`` in the recipe's order; ``seconds`` is the time of all trainings that they rest on."""

    results: tuple[PairedResult, ...]
    seeds: tuple[int, ...]
    seconds: float
    conditions: dict[str, Any]


def analyse(recipe: Mapping[str, Any], cells: Sequence[Cell]) -> PairedStudy:
    """Compare what ``[[study.comparisons]]`` of ``recipe`` names, over all its seeds; ``cells`` are its expansion.

    Errors: PairingError where a training that a comparison rests on is not finished, has diverged or does not report a
    finite figure: nothing is compared then; RecipeError where the recipe has no comparisons.
    """
    study = take_table(dict(recipe), "study", StudyOptions)
    comparisons = study.parsed_comparisons
    if not comparisons:
        raise RecipeError("the recipe has no [[study.comparisons]]; say there what is compared and what effect matters")
    named = {name for each in comparisons for name in (each.variant, each.against)}
    outcomes = [read_outcome(cell) for cell in cells if cell.variant in named]
    check_finished(outcomes)
    results = tuple(
        compare_pairs(
            each,
            measured(outcomes, each.variant, each.figure),
            measured(outcomes, each.against, each.figure),
            study.seeds,
        )
        for each in comparisons
    )
    training = cells[0].recipe["training"]
    conditions = {key: training[key] for key in ("steps", "batch_size", "threads") if key in training}
    return PairedStudy(results, study.seeds, sum(outcome.seconds for outcome in outcomes), conditions)


def check_finished(outcomes: Sequence[Outcome]) -> None:
    """Errors: PairingError naming every training that is not finished, and why."""
    faults = [
        f"{outcome.variant}/seed_{outcome.seed} "
        + (f"diverged: {outcome.reason}" if outcome.status == FAILED else outcome.status)
        for outcome in outcomes
        if outcome.status != FINISHED
    ]
    if faults:
        raise PairingError(
            f"{len(faults)} of {len(outcomes)} trainings are not finished: {'; '.join(faults)}. A study is "
            "compared whole: finish it; one that diverges needs another recipe, for all its variants"
        )


def measured(outcomes: Sequence[Outcome], variant: str, figure: str) -> list[Measured]:
    """The figures of one variant. Errors: PairingError where a report lacks it."""
    own = [outcome for outcome in outcomes if outcome.variant == variant]
    lacking = [str(outcome.seed) for outcome in own if figure not in outcome.final]
    if lacking:
        known = ", ".join(sorted({name for outcome in own for name in outcome.final}))
        raise PairingError(f"{variant} reports no {figure} with seeds {', '.join(lacking)}; it reports {known}")
    return [Measured(outcome.seed, outcome.final[figure]) for outcome in own]


def write_paired(study: PairedStudy, command: str, file: Path) -> dict[str, Any]:
    """The results as JSON in ``file``, a plot beside it (``.png``); returns the JSON object."""
    report = {
        "command": command,
        "seeds": list(study.seeds),
        "conditions": study.conditions,
        "seconds": round(study.seconds, 1),
        "comparisons": [
            asdict(result) | {"equivalent": result.equivalent, "verdict": result.verdict, "remark": result.remark}
            for result in study.results
        ],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(study.results, file.with_suffix(".png"))
    loaded: dict[str, Any] = json.loads(json.dumps(report))
    return loaded


def markdown(report: Mapping[str, Any]) -> str:
    """The table of a report in Markdown, a row for each comparison."""
    lines = [HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
    for result in report["comparisons"]:
        asked = result["comparison"]
        verdict = f"**{result['verdict']}**" + (f" ({result['remark']})" if result["remark"] else "")
        gain = f"{result['mean']:+.4f} [{result['low']:+.4f}, {result['high']:+.4f}]"
        lines.append(
            f"| {asked['claim']} | {asked['variant']} against {asked['against']} | {asked['figure']} | {gain} | "
            f"{len(result['differences'])} | {asked['smallest_effect']} | {verdict} | {report['seconds']:.0f} |"
        )
    return "\n".join(lines)


def plot(results: Sequence[PairedResult], file: Path) -> None:
    """Every pair's gain, its mean and interval, in units of the smallest effect; the band is what does not matter."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 1.3 + 0.42 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.axvspan(-1, 1, color="C7", alpha=0.15)
    axis.axvline(0, color="C7", linewidth=1)
    for place, result in enumerate(results):
        unit = result.comparison.smallest_effect
        gains = [gain / unit for gain in result.differences.values()]
        axis.plot(gains, [place + 0.18] * len(gains), ".", color="C0", alpha=0.6)
        low, high = (result.mean - result.low) / unit, (result.high - result.mean) / unit
        axis.errorbar(result.mean / unit, place, xerr=[[low], [high]], marker="o", capsize=3, color="C1")
    names = [f"{x.comparison.variant} - {x.comparison.against}\n{x.comparison.figure}: {x.verdict}" for x in results]
    axis.set_yticks(range(len(results)), names, fontsize="small")
    axis.set_ylim(len(results) - 0.5, -0.5)
    axis.set_xlabel("gain in units of the smallest effect of interest (dots: pairs; circle: mean and 95 % interval)")
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(file, dpi=110)
