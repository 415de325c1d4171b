"""``dovetail eval structured``: answers held to JSON schemas, with and without drafting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from server.commands.options import (
    Config,
    Context,
    Drafter,
    DrafterDevice,
    Target,
    Threads,
    Trees,
    Weights,
    check_folder,
    settings_from,
)  # fmt: skip
from server.commands.progress import progress_bar


def evaluate_structured(
    json_file: Annotated[
        Path, typer.Option("--json", dir_okay=False, help="Report; a study in it that was ended is taken up again.")
    ],
    target: Target = None,
    weights: Weights = None,
    limit: Annotated[int, typer.Option(min=1, help="Schemas, of growing difficulty.")] = 300,
    seed: Annotated[int, typer.Option(help="What the schemas are drawn from.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 384,
    streams: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    drafter: Drafter = None,
    drafter_device: DrafterDevice = None,
    trees: Trees = None,
    threads: Threads = None,
    context: Context = None,
    config: Config = None,
) -> None:
    """Answer every schema greedily, plainly and with drafts, and with drafts and a seed, and check every answer.

    Ctrl-C ends a study; the same command goes on with it. Exit code 1 where a finished answer does not validate or
    drafting changed one. The last line printed is the report as JSON.
    """
    check_folder(json_file, "--json")
    settings = settings_from(
        config, target=target, weights=weights, drafter=drafter, drafter_device=drafter_device, trees=trees,
        threads=threads, context=context, max_seqs=streams,
    )  # fmt: skip
    from server.bench.schemas import schema_cases
    from server.bench.structured import Study, StudyOptions, StudyReport
    from server.launch import load_codec, load_engine, resolve_target
    from server.placement.machine import measure_machine

    options = StudyOptions(limit, seed, max_tokens, streams)
    report = StudyReport(json_file, settings.served_name, settings.drafter or "its own", options)
    engine = load_engine(settings)
    study = Study(engine, load_codec(resolve_target(settings.target)), options, report)
    try:
        with progress_bar() as advance:
            study.run(schema_cases(limit, seed), advance)
    except KeyboardInterrupt:
        report.forget_unsaved()
        typer.echo(f"ended; the same command goes on from {json_file}", err=True)
    content = report.finish(measure_machine().json())
    typer.echo(json.dumps(content))
    if content["invalid"] or content["differences"]:
        raise typer.Exit(1)
