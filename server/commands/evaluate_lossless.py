"""``dovetail eval lossless``: search for a text that serving changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from server.commands.options import (
    Config,
    Context,
    Drafter,
    DrafterDevice,
    Engine,
    Target,
    Threads,
    Trees,
    check_folder,
    settings_from,
)  # fmt: skip
from server.commands.progress import progress_bar


def evaluate_lossless(
    json_file: Annotated[
        Path, typer.Option("--json", dir_okay=False, help="Report; a search in it that was ended is taken up again.")
    ],
    target: Target = None,
    weights: Annotated[
        str | None, typer.Option(help="Formats, by commas; nothing: as stored.", show_default=False)
    ] = None,
    suite: Annotated[str, typer.Option(help="Suites or JSONL files, by commas; prompts come from each in turn.")] = (
        "humaneval,mt-bench,gsm8k"
    ),
    limit: Annotated[int, typer.Option(min=1, help="Prompts in all.")] = 500,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest text.")] = 64,
    streams: Annotated[str, typer.Option(help="Requests at once, by commas.")] = "1,4",
    modes: Annotated[str, typer.Option(help="greedy, seeded or both, by commas.")] = "greedy,seeded",
    engine: Engine = None,
    drafter: Drafter = None,
    drafter_device: DrafterDevice = None,
    trees: Trees = None,
    threads: Threads = None,
    context: Context = None,
    config: Config = None,
) -> None:
    """Write every text plainly and as it is served, greedily and with a seed, and report each one that differs.

    Ctrl-C ends a search; the same command goes on with it. Exit code 1 where a text differs that must not: where rows
    are equal up to rounding (--engine llama.cpp), near-ties are counted apart, with the largest gap.
    The last line printed is the report as JSON.
    """
    check_folder(json_file, "--json")
    given = {
        "target": target, "engine": engine, "drafter": drafter, "drafter_device": drafter_device, "trees": trees,
        "threads": threads, "context": context,
    }  # fmt: skip
    from server.bench.lossless import Report, SearchOptions
    from server.bench.texts import BenchError

    try:
        numbers = tuple(int(number) for number in streams.split(","))
        options = SearchOptions(tuple(suite.split(",")), limit, max_tokens, numbers, tuple(modes.split(",")))
    except (ValueError, BenchError) as error:
        raise typer.BadParameter(str(error), param_hint="--streams, --modes") from error
    named = settings_from(config, **given)
    report = Report(json_file, named.served_name, named.drafter or "its own", options, named.engine)
    try:
        for each in weights.split(",") if weights else [None]:
            search_format(settings_from(config, **given, weights=each, max_seqs=max(numbers)), options, report)
    except KeyboardInterrupt:
        typer.echo(f"ended; the same command goes on from {json_file}", err=True)
    typer.echo(json.dumps(report.content))
    if report.faults:
        raise typer.Exit(1)


def search_format(settings: Any, options: Any, report: Any) -> None:
    """Load a target in one format of its weights, and search behind a progress bar on stderr."""
    from server.bench.lossless import Search, search_prompts
    from server.launch import load_codec, load_engine, resolve_target

    prompts = search_prompts(options)
    engine = load_engine(settings)
    codec = load_codec(resolve_target(settings.target))
    with progress_bar() as advance:
        Search(engine, codec, options, report).run(prompts, advance)
