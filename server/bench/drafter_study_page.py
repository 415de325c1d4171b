"""A drafter study as a page: a Markdown table with its conditions, and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.training.study import NOT_RUN

HEADINGS = ("variant", "fusion", "blocks", "unrolled steps", "seeds", "tree", "acceptance length", "ms/step",
            "tokens/s", "x plain", "ECE")  # fmt: skip
FIGURES = {"acceptance_length": "acceptance length", "tokens_per_s": "tokens/s"}


def markdown(report: Mapping[str, Any], command: str, picture: str) -> str:
    """The whole page; ``command`` is how to make it again, ``picture`` the file beside it."""
    lines = [
        "# Ablation of the drafter",
        "",
        "Written by",
        "",
        "```sh",
        command,
        "```",
        "",
        *conditions(report),
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
    ]
    for variant in report["variants"]:
        lines += ["| " + " | ".join(cells) + " |" for cells in rows(variant)]
    lines += ["", f"![acceptance length, speed and acceptance per depth]({picture})", ""]
    lines += ["## Against the papers", "", *claims(report)]
    return "\n".join(lines) + "\n"


def conditions(report: Mapping[str, Any]) -> list[str]:
    """What was measured, in sentences."""
    told, ngram, hardware = report["conditions"], report["ngram"], report["hardware"]
    tokens = sorted({run["tokens"] for run in report["runs"] if "tokens" in run})
    differing = [f"{run['variant']} seed {run['seed']}: {'; '.join(run['differs'])}" for run in report["runs"]
                 if run.get("differs")]  # fmt: skip
    sampling = "greedy" if not told["temperature"] else f"temperature {told['temperature']}, seed {told['seed']}"
    target, plain = report["target"], report["plain"]
    bound = "" if report["packed"] else "at most "
    lines = [
        f"A target of {target['num_parameters'] / 1e6:.1f} M parameters ({target['weights']}); {told['suite']}, "
        f"{told['texts']} texts of {told['max_tokens']} tokens, {sampling}, measured {told['repeats']} times; "
        f"{hardware['cpu']}, {hardware['threads']} threads. Every drafter was trained on "
        f"{bound}{', '.join(f'{count / 1e6:.2f}' for count in tokens)} M tokens and takes turns with plain decoding, "
        f"{plain['tokens_per_s']:.1f} tokens/s, in one run. The n-gram drafter reaches an acceptance length of "
        f"{ngram['acceptance_length']:.2f} and {ngram['tokens_per_s']:.1f} tokens/s; "
        f"{report['repeated_4gram_share']:.0%} of the texts' 4-grams are repeated.",
        "",
        "Trees are top-k x depth x rows. ms/step is one level of a tree. Figures are mean ± standard deviation over "
        "the seeds; a single seed has no deviation.",
    ]
    if told["interrupted"]:
        lines += ["", "The run was interrupted: the figures are those of the texts done by then."]
    if differing:
        lines += ["", "Cells trained by a recipe that departs from the study's: " + ". ".join(differing) + "."]
    return lines


def rows(variant: Mapping[str, Any]) -> list[list[str]]:
    """One line for each tree size; one that says NOT RUN for a variant without drafters."""
    steps = variant["unrolled_steps"]
    head = [variant["variant"], variant["fusion"], str(variant["num_blocks"]), "-" if steps == 1 else str(steps)]
    if not variant["settings"]:
        return [[*head, NOT_RUN, *["-"] * (len(HEADINGS) - len(head) - 1)]]
    num_seeds = len(variant["seeds"]) + len(variant["seeds_not_run"])
    lines = []
    for figures in variant["settings"]:
        numbers = [
            written(figures[name], digits)
            for name, digits in (("acceptance_length", 2), ("draft_ms_per_step", 2), ("tokens_per_s", 1),
                                 ("speedup", 2), ("ece", 3))
        ]  # fmt: skip
        tree = f"{figures['top_k']}x{figures['depth']}x{figures['rows']}"
        lines.append([*head, f"{len(variant['seeds'])} of {num_seeds}", tree, *numbers])
    return lines


def written(value: Mapping[str, Any] | None, digits: int) -> str:
    """Mean and deviation."""
    if value is None:
        return "-"
    mean = f"{value['mean']:.{digits}f}"
    return mean if value["std"] is None else f"{mean} ± {value['std']:.{digits}f}"


def claims(report: Mapping[str, Any]) -> list[str]:
    """The papers' statements beside what came out here."""
    if not report["claims"]:
        return ["No two variants that a paper compares were run."]
    return [
        "| statement | compared | difference here | verdict |",
        "|---|---|---|---|",
        *(
            f"| {claim['text']} | {FIGURES[claim['figure']]}, {claim['second']} - {claim['first']} | "
            f"{claim['difference']:+.2f} | {claim['verdict']} |"
            for claim in report["claims"]
        ),
        "",
        "*agrees* and *disagrees*: the values of all seeds of one side lie above all of the other's; *within the "
        "spread*: they overlap; *one seed*: a direction, not a result.",
    ]


def plot_study(report: Mapping[str, Any], file: Path) -> None:
    """Acceptance length and tokens/s of each variant with every seed's value, and acceptance per depth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    length, speed, by_depth = figure.subplots(1, 3)
    names = [variant["variant"] for variant in report["variants"]]
    for place, variant in enumerate(report["variants"]):
        for axes, name in zip((length, speed), FIGURES, strict=True):
            if not variant["settings"]:
                axes.text(
                    place, 0, f" {NOT_RUN}", rotation=90, ha="center", va="bottom", fontsize="small", color="grey"
                )
                continue
            value = variant["settings"][0][name]
            axes.bar(place, value["mean"], yerr=value["std"], capsize=3, alpha=0.7)
            axes.plot([place] * len(value["values"]), value["values"], "k.", markersize=4)
        if variant["settings"]:
            shares = variant["settings"][0]["acceptance_per_depth"]
            by_depth.plot(range(1, len(shares) + 1), shares, marker="o", label=variant["variant"])
    length.axhline(report["ngram"]["acceptance_length"], color="grey", linestyle="--", label="n-gram")
    speed.axhline(report["plain"]["tokens_per_s"], color="black", linestyle=":", label="plain")
    for axes, title in zip((length, speed), FIGURES.values(), strict=True):
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylabel(title)
        axes.legend(fontsize="small")
        axes.grid(axis="y", alpha=0.3)
    by_depth.set_xlabel("depth: tokens below the root")
    by_depth.set_ylabel("share accepted, given the token above was")
    by_depth.legend(fontsize="small")
    by_depth.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
