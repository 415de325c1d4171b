"""``dovetail bench kernels`` as one report: products and whole models, checked, as a table and as a plot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from kernels.linear_lowbit.bench import OURS, SHAPES, BenchOptions, Entry, Limits, Say, bench_products, describe_machine
from server.bench.beside import bench_beside
from server.bench.whole_model import bench_models

HONEST = 1.05  # T(1) may be so much above T(2) and T(4): a slow T(1) would flatter every ratio
CURVE = ("shape", "scope", "weights", "group", "context", "engine", "layers")


def bench_kernels(
    options: BenchOptions, scopes: Sequence[str], contexts: Sequence[int], beside: Sequence[int], say: Say
) -> dict[str, Any]:
    """The JSON of ``bench kernels``. Errors: ValueError for a scope that is not known."""
    if unknown := set(scopes) - {"products", "model"}:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}; known are products, model")
    limits = Limits()
    results: list[Entry] = []
    skipped: dict[str, str] = {}
    outside: list[Entry] = []
    parts: list[Entry] = []
    if "products" in scopes:
        found, missing = bench_products(options, limits, say)
        results, skipped = results + found, skipped | missing
    if "model" in scopes:
        models = bench_models(options, contexts, limits, say)
        results, skipped = results + models.results, skipped | models.skipped
        outside, parts = models.outside, models.parts
    report = describe_machine(limits) | {"results": results, "skipped": skipped, "outside_products": outside}
    report |= {"parts": parts}
    if beside:
        loaded, missing = bench_beside(options, beside, min(contexts), say)
        report |= {"beside": loaded, "skipped": skipped | missing}
    return report | {"checks": honest_checks(results), "flatness": flatness(results)}


def curves(results: Sequence[Entry]) -> dict[tuple[Any, ...], dict[int, float]]:
    """Milliseconds by number of rows for each engine and setting."""
    found: dict[tuple[Any, ...], dict[int, float]] = {}
    for entry in results:
        found.setdefault(tuple(entry[name] for name in CURVE), {})[entry["rows"]] = entry["ms"]
    return found


def honest_checks(results: Sequence[Entry]) -> list[Entry]:
    """Whether each of our curves has T(1) <= 1.05 min(T(2), T(4)), where those were measured."""
    checks = []
    for setting, curve in curves(results).items():
        named = dict(zip(CURVE, setting, strict=True))
        if named["engine"] == OURS and {1, 2, 4} <= curve.keys():
            ratio = curve[1] / min(curve[2], curve[4])
            checks.append(named | {"t1_over_min_t2_t4": round(ratio, 3), "holds": ratio <= HONEST})
    return checks


def flatness(results: Sequence[Entry]) -> list[Entry]:
    """T(8) / T(1) of each whole model at each context, and how far it is above that of the shortest context.

    A pass is flat over the context where eight rows read the keys once: then the first ratio stays what the products
    make it.
    """
    found: list[Entry] = []
    shortest: dict[tuple[Any, ...], float] = {}
    for setting, curve in sorted(curves(results).items(), key=lambda item: item[0][CURVE.index("context")]):
        named = dict(zip(CURVE, setting, strict=True))
        if named["scope"] == "model" and {1, 8} <= curve.keys():
            ratio = curve[8] / curve[1]
            base = shortest.setdefault(tuple(named[key] for key in CURVE if key != "context"), ratio)
            found.append(named | {"t8_over_t1": round(ratio, 3), "over_shortest": round(ratio / base, 3)})
    return found


def tables(report: dict[str, Any]) -> Iterator[Table]:
    """Milliseconds and T(n) / T(1), a table for each setting, a line for each engine; they fit 80 columns.

    ``read`` is the share of the streaming bandwidth at which one row of ours reads its weights.
    """
    shares = stream_shares(report)
    alike = itertools.groupby(sorted(curves(report["results"]).items(), key=_settings_in_order(report)), key=_setting)
    for title, found in alike:
        lines = list(found)
        rows = sorted({count for _, curve in lines for count in curve})
        view = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
        view.add_column("ms, T(n)/T(1)")
        for count in rows:
            view.add_column(f"{count} rows", justify="right", no_wrap=True)
        view.add_column("read", justify="right", no_wrap=True)
        for setting, curve in lines:
            first = curve[min(curve)]
            cells = [f"{curve[n]:.3g} x{curve[n] / first:.3g}" if n in curve else "" for n in rows]
            group = setting[CURVE.index("group")]
            name = setting[CURVE.index("engine")] + ("" if group is None else f"/{group}")
            share = shares.get(setting)
            view.add_row(name, *cells, "" if share is None else f"{share:.0%}")
        yield view


def parts_tables(report: dict[str, Any]) -> Iterator[Table]:
    """Where a pass of ours goes: milliseconds by part, the mean over threads; a table for each model and context."""
    for title, found in itertools.groupby(report["parts"], key=lambda entry: describe_setting(entry | {"group": None})):
        entries = list(found)
        heading = f"{title}: where a thread's time goes"
        view = Table(title=heading, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
        view.add_column("ms")
        for entry in entries:
            view.add_column(f"{entry['rows']} rows", justify="right", no_wrap=True)
        for part in entries[0]["parts_ms"]:
            view.add_row(part, *(f"{entry['parts_ms'][part]:.3f}" for entry in entries))
        view.add_row("the pass", *(f"{entry['ms']:.3f}" for entry in entries))
        yield view


def beside_tables(report: dict[str, Any]) -> Iterator[Table]:
    """Passes per second beside busy processes, by what of the cores is left, a table for each model."""
    loaded = report.get("beside", [])
    for (shape, weights), found in itertools.groupby(loaded, key=lambda entry: (entry["shape"], entry["weights"])):
        title = f"{shape} {weights}: one-row passes per second beside busy processes"
        view = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in ("engine", "beside", "passes/s", "of idle", "fair share", "of fair share"):
            view.add_column(heading, justify="left" if heading == "engine" else "right", no_wrap=True)
        for entry in found:
            shares = (f"{entry[key]:.2f}" for key in ("of_idle", "fair_share", "of_fair_share"))
            view.add_row(entry["engine"], str(entry["beside"]), f"{entry['passes_per_s']:.4g}", *shares)
        yield view


def _setting(line: tuple[tuple[Any, ...], dict[int, float]]) -> str:
    named = dict(zip(CURVE, line[0], strict=True))
    return describe_setting(named | {"group": None})


def _settings_in_order(report: dict[str, Any]) -> Callable[[tuple[tuple[Any, ...], dict[int, float]]], int]:
    order = list(dict.fromkeys(_setting(line) for line in curves(report["results"]).items()))
    return lambda line: order.index(_setting(line))


def describe_setting(named: Entry) -> str:
    """What was measured, short: ``1B model int4/32 at 1024``, with the number of layers where it is a share."""
    layers = "" if named["layers"] == SHAPES[named["shape"]].num_layers else f" ({named['layers']} layers)"
    group = "" if named["group"] is None else f"/{named['group']}"
    context = f" at {named['context']}" if named["scope"] == "model" else ""
    return f"{named['shape']}{layers} {named['scope']} {named['weights']}{group}{context}"


def stream_shares(report: dict[str, Any]) -> dict[tuple[Any, ...], float]:
    """Of the streaming bandwidth, what one row of ours reads its weights at."""
    stream = report["stream_gb_per_s"]
    return {
        tuple(entry[name] for name in CURVE): entry["bytes"] / entry["ms"] / 1e6 / stream
        for entry in report["results"]
        if stream and entry["rows"] == 1 and "bytes" in entry
    }


def remarks(report: dict[str, Any]) -> list[str]:
    """What stands below the tables: machine, who could not take part, T(1)'s honesty, flatness, what is no product."""
    lines = [
        f"{report['hardware']}: {report['stream_gb_per_s']} GB/s streamed, {report['dot_gmac_per_s']} G multiply-adds/s"
    ]
    lines += [f"{name}: {reason}" for name, reason in report["skipped"].items()]
    for check in report["checks"]:
        verdict = "holds" if check["holds"] else "FAILS: the ratios of this curve flatter"
        setting = (
            f"{check['shape']} {check['scope']} {check['weights']} group {check['group']} context {check['context']}"
        )
        lines.append(f"T(1) <= {HONEST} min(T(2), T(4)): {check['t1_over_min_t2_t4']:.3f} {verdict}, {setting}")
    for entry in report["flatness"]:
        lines.append(
            f"{describe_setting(entry)}, {entry['engine']}: T(8)/T(1) {entry['t8_over_t1']:.2f}, "
            f"x{entry['over_shortest']:.2f} of that at the shortest context"
        )
    for entry in report["outside_products"]:
        lines.append(
            f"{describe_setting(entry)}: {entry['ms_per_layer']:.3f} ms a layer outside the products at "
            f"{entry['rows']} rows"
        )
    return lines


def plot(report: dict[str, Any], path: Path) -> None:
    """T(n) / T(1) over n as an image, one panel for each scope and context; needs matplotlib (extra ``train``)."""
    from matplotlib.figure import Figure

    found = curves(report["results"])
    panels = list(dict.fromkeys((setting[0], setting[1], setting[4]) for setting in found))
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for setting, curve in found.items():
            if (setting[0], setting[1], setting[4]) != panel:
                continue
            named = dict(zip(CURVE, setting, strict=True))
            first = curve[min(curve)]
            label = f"{named['engine']} {named['weights']}" + (
                "" if named["group"] in (None, 32) else f"/{named['group']}"
            )
            style = "-" if named["engine"] == OURS else "--"
            axes.plot(list(curve), [ms / first for ms in curve.values()], style, marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xlabel("rows in one pass")
        axes.set_ylabel("time / time of one row")
        axes.set_title(f"{panel[0]} {panel[1]}" + (f", context {panel[2]}" if panel[1] == "model" else ""))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(report["hardware"], fontsize=9)
    figure.savefig(path, dpi=130)
