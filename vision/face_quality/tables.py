"""A face-quality report's tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vision.face_quality.report import FaceQualityReport


def markdown(report: FaceQualityReport) -> str:
    """Every table."""
    tables = [method_table(report), defect_table(report), template_table(report)]
    if report.groups:
        tables.append(group_table(report))
    return "\n\n".join(tables)


def method_table(report: FaceQualityReport) -> str:
    """Each way of scoring, the best first."""
    rows = []
    for name, row in sorted(report.methods.items(), key=lambda entry: entry[1].pauc):
        low, high = row.interval
        order = report.ordered[name]["all"] if name in report.ordered else None
        rows.append(
            [name, f"{row.pauc:.3f}", f"{low:.3f} to {high:.3f}"]
            + [shown(value) for value in (row.spearman, row.spearman_severity, order)]
        )
    head = ["score", "pAUC(0.3)/FNMR(0)", "95 % interval", "Spearman, label", "Spearman, severity", "ordered defects"]
    return table(head, rows)


def defect_table(report: FaceQualityReport) -> str:
    """The share of pairs of severities in the right order, by defect."""
    kinds = list(next(iter(report.ordered.values())))
    return table(
        ["score", *kinds],
        ([name, *(shown(shares[kind]) for kind in kinds)] for name, shares in report.ordered.items()),
    )


def template_table(report: FaceQualityReport) -> str:
    """FNMR of templates by what their images are weighted with, the lowest first."""
    entries = sorted(report.templates.items(), key=lambda entry: entry[1])
    return table(["templates weighted by", "FNMR"], ([name, shown(fnmr)] for name, fnmr in entries))


def group_table(report: FaceQualityReport, discard: str = "0.2") -> str:
    """What discarding the lowest ``discard`` of all images does to each group of people."""
    rows = []
    for kind, by_discard in report.groups.items():
        for name, row in by_discard[discard].items():
            figures = (row["mean_quality"], row["discarded"], row["fnmr_before"], row["fnmr_after"])
            rows.append([kind, name, f"{row['images']:.0f}", *(shown(value) for value in figures)])
    return table(["grouping", "group", "images", "mean score", "discarded", "FNMR before", "FNMR after"], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def shown(value: float | None) -> str:
    """Three digits; a dash where there is no figure (None, or NaN)."""
    return "-" if value is None or value != value else f"{value:.3f}"
