"""One table of several reports of ``dovetail bench``: suites and temperatures down, contestants across."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.bench.contestants import LLAMA_CPP
from server.bench.report import DOVETAIL, LOOKUP, PLAIN
from server.bench.texts import BenchError

OWN = (PLAIN, LOOKUP, DOVETAIL)
SHARED = ("cpu", "threads")
Report = dict[str, Any]


def merge_reports(reports: Sequence[Report]) -> Report:
    """``hardware``, ``target``, ``drafter``, ``verify_ms`` and ``runs``, one for each suite and temperature.

    Reports of the same suite and temperature are more repeats of one run. Errors: BenchError for reports of different
    targets, drafters or machines.
    """
    first = reports[0]
    for report in reports[1:]:
        check_same(first, report)
    groups: dict[tuple[str, float], list[Report]] = {}
    for report in reports:
        conditions = report["conditions"]
        groups.setdefault((conditions["suite"], conditions["temperature"]), []).append(report)
    rows = first["verify_ms"]
    return {
        "hardware": first["hardware"],
        "target": first["target"],
        "drafter": first["drafter"],
        "verify_ms": {n: round(statistics.median(report["verify_ms"][n] for report in reports), 3) for n in rows},
        "runs": [merge_group(group) for group in groups.values()],
    }


def check_same(first: Report, other: Report) -> None:
    """Refuse what cannot stand in one table."""
    for what, keys in (("hardware", SHARED), ("target", ("name", "weights")), ("drafter", ("name", "rows"))):
        for key in keys:
            if first[what][key] != other[what][key]:
                raise BenchError(f"the reports are of different {what}: {first[what][key]!r} and {other[what][key]!r}")


def merge_group(reports: Sequence[Report]) -> Report:
    """One suite at one temperature. Speeds are medians over all repeats; the rest are means over the reports."""
    conditions = reports[0]["conditions"]
    speeds: dict[str, list[float]] = {}
    for report in reports:
        for name, figures in {**{name: report.get(name, {}) for name in OWN}, **report["peers"]}.items():
            speeds.setdefault(name, []).extend(figures.get("repeats_tokens_per_s", []))
    medians = {name: round(statistics.median(taken), 2) for name, taken in speeds.items() if taken}

    def mean(*path: str) -> float | None:
        values = [value for report in reports if (value := look_up(report, path)) is not None]
        return round(statistics.mean(values), 3) if values else None

    return {
        "suite": conditions["suite"],
        "temperature": conditions["temperature"],
        "chat": conditions["chat"],
        "texts": sum(report["conditions"]["texts"] for report in reports),
        "max_tokens": conditions["max_tokens"],
        "mean_output_tokens": mean("conditions", "mean_output_tokens"),
        "repeats": {name: len(taken) for name, taken in speeds.items()},
        "tokens_per_s": medians,
        "times_plain": ratios(medians, PLAIN),
        "times_llama_cpp": ratios(medians, LLAMA_CPP),
        "acceptance_length": {name: mean(name, "acceptance_length") for name in (LOOKUP, DOVETAIL)},
        "rows_per_round": {name: mean(name, "rows_per_round") for name in (LOOKUP, DOVETAIL)},
        "draft_share": mean(DOVETAIL, "draft_share"),
        "ngram_acceptance_length": mean("ngram_acceptance_length"),
        "repeated_4gram_share": mean("repeated_4gram_share"),
        "equal_texts": [
            [sum(report[name][key] for report in reports if name in report) for key in ("equal_texts", "texts")]
            for name in (LOOKUP, DOVETAIL)
        ],
    }


def look_up(report: Report, path: Sequence[str]) -> Any:
    """A figure inside a report, None where it is not there."""
    value: Any = report
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def ratios(speeds: dict[str, float], base: str) -> dict[str, float]:
    """Every speed over that of ``base``; empty where that did not take part."""
    if not speeds.get(base):
        return {}
    return {name: round(speed / speeds[base], 2) for name, speed in speeds.items()}


def contestants_of(merged: Report) -> list[str]:
    """Everybody who took part, llama.cpp's first and ours last."""
    names = dict.fromkeys(name for run in merged["runs"] for name in run["tokens_per_s"])
    return [*(name for name in names if name not in OWN), *(name for name in OWN if name in names)]


def as_markdown(merged: Report) -> str:
    """The table for a page."""
    names = contestants_of(merged)
    heads = ["suite", "temperature", *(f"{name}, tokens/s" for name in names)]
    heads += ["x plain", f"x {LLAMA_CPP}", "acceptance length", "lookup's", "rows", "draft share"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for run in merged["runs"]:
        speeds, accepted = run["tokens_per_s"], run["acceptance_length"]
        cells = [run["suite"], f"{run['temperature']:g}", *(shown(speeds.get(name), 1) for name in names)]
        cells += [shown(run[f"times_{base}"].get(DOVETAIL), 2) for base in ("plain", "llama_cpp")]
        cells += [shown(accepted[DOVETAIL], 2), shown(accepted[LOOKUP], 2)]
        cells += [shown(run["rows_per_round"][DOVETAIL], 1), f"{run['draft_share'] or 0:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(value: float | None, digits: int) -> str:
    """A number, or that there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def plot_speeds(merged: Report, file: Path) -> None:
    """Bars of tokens per second, a group for each suite and temperature; needs matplotlib (extra `train`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, runs = contestants_of(merged), merged["runs"]
    figure = Figure(figsize=(max(7.0, 1.8 * len(runs)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        heights = [run["tokens_per_s"].get(name, 0.0) for run in runs]
        places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(runs))]
        axes.bar_label(axes.bar(places, heights, width, label=name), fmt="%.0f", fontsize="xx-small")
    axes.set_xticks(range(len(runs)), [f"{run['suite']}\ntemperature {run['temperature']:g}" for run in runs])
    axes.set_ylabel("tokens/s while decoding")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small", ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, -0.14))
    target, hardware = merged["target"], merged["hardware"]
    axes.set_title(
        f"{target['name']} ({target['weights']}), {hardware['cpu']}, {hardware['threads']} threads", fontsize="medium"
    )
    figure.savefig(file, dpi=130)
