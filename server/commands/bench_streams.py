"""``dovetail bench streams``: many requests at once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.commands.options import Config, Drafter, Target, Threads, Weights, check_folder, settings_from

if TYPE_CHECKING:
    from drafters.drafter import Drafter as AnyDrafter
    from server.bench.streams import Setup
    from server.bench.texts import Texts
    from server.settings import Settings
    from server.text import TextCodec

MEASUREMENTS = ("decode", "waits", "trees", "servers")
ROWS, TOP_K, DEPTH = 8, 2, 6  # the serving default
MOST_ROWS = 32
CONTEXT = 4096
CHAT_TOKENS, LONG_TOKENS = 1499, 2999
FOLLOW_UP = "\nThank you. Now say the same in one short sentence, please.\n"
STREAM = "The history of the steam engine begins"


def streams(
    target: Target = None,
    measure: Annotated[str, typer.Option(help=f"{', '.join(MEASUREMENTS)}, by commas.")] = "decode,waits,trees",
    streams: Annotated[str, typer.Option(help="Numbers of streams, by commas.")] = "1,2,4,8,16",
    suite: Annotated[
        str, typer.Option(help="humaneval, mt-bench, gsm8k or JSONL files, by commas; trees are measured on each.")
    ] = "humaneval",
    against: Annotated[
        str,
        typer.Option(help="Servers beside this one: llama.cpp, transformers; NAME=MODEL gives one a model of its own."),
    ] = ("llama.cpp,transformers"),
    limit: Annotated[int, typer.Option(min=1, help="Texts for trees.")] = 6,
    max_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each stream or text.")] = 64,
    turns: Annotated[int, typer.Option(min=1, help="Times each is measured.")] = 5,
    drafter: Drafter = None,
    weights: Weights = None,
    threads: Threads = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the report here.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw the streams' speeds here.", show_default=False)
    ] = None,
    config: Config = None,
) -> None:
    """Several streams beside plain decoding, what a request waits for, rows by cost beside fixed trees, other servers.

    Figures are medians of alternating turns. The last line printed is the report as JSON.
    """
    check_folder(json_file, "--json")
    check_folder(plot, "--plot")
    if plot is not None and not {"decode", "servers"} & set(measure.split(",")):
        raise typer.BadParameter("only decode and servers have a picture", param_hint="--plot")
    wanted, counts = measure.split(","), [int(count) for count in streams.split(",")]
    if unknown := set(wanted) - set(MEASUREMENTS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: known are {', '.join(MEASUREMENTS)}")
    plan = Plan(suite.split(","), limit, max_tokens, turns)
    settings = settings_from(
        config, target=target, drafter=drafter, weights=weights, threads=threads, max_seqs=max(counts), context=CONTEXT,
        rows=MOST_ROWS, top_k=TOP_K, depth=MOST_ROWS - 2, trees="fixed",
    )  # fmt: skip
    report = run(settings, wanted, counts, plan)
    if "servers" in wanted:
        ours = ([target] if target else []) + (["--weights", weights] if weights else [])
        report["servers"] = servers(settings, [*ours, "--max-seqs", str(max(counts))], against.split(","), counts, plan)
    line = json.dumps(report)
    if plot is not None:
        from server.bench.streams_plot import plot_streams

        plot_streams(report, plot)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    typer.echo(line)


@dataclasses.dataclass(frozen=True)
class Plan:
    """suites: where prompts come from; limit: texts for trees; max_tokens: of each; turns: times each is measured."""

    suites: list[str]
    limit: int
    max_tokens: int
    turns: int


def run(settings: Settings, wanted: list[str], counts: list[int], plan: Plan) -> dict[str, Any]:
    """Load once and measure what of this process is wanted."""
    from drafters.proposal import Budget
    from server.bench.prompts import load_prompts
    from server.bench.streams import Setup, contestants, decode_report, trees_report, useless_drafter
    from server.launch import load_codec, load_engine, resolve_target
    from server.placement.machine import measure_machine
    from server.targets.context import slot_capacity

    loaded = load_engine(settings)
    codec = load_codec(resolve_target(settings.target))
    context, target, drafter = loaded.options.context_length, loaded.target, loaded.drafting.drafter
    setup = Setup(target, settings.max_seqs, context, Budget(ROWS, TOP_K, DEPTH))
    report: dict[str, Any] = {
        "hardware": measure_machine().json(),
        "target": dataclasses.asdict(target.info),
        "drafter": None if drafter is None else drafter.name,
        "conditions": dataclasses.asdict(plan),
    }
    if "decode" in wanted:
        useless = useless_drafter(target, settings.max_seqs, slot_capacity(context, [loaded.options.budget]))
        found = load_prompts(plan.suites[0], max(counts))
        prompts = [codec.encode(prompt.text or prompt.turns[0]) for prompt in found]
        engines = contestants(setup, drafter, useless)
        report["decode"] = decode_report(engines, prompts, counts, plan.max_tokens, plan.turns, tell)
    if "waits" in wanted:
        report["waits"] = waits(setup, drafter, codec, plan.turns)
    if "trees" in wanted:
        report["trees"] = {
            suite: trees_report(setup, drafter, texts(setup, codec, suite, plan), plan.turns, tell)
            for suite in plan.suites
        }
    return report


def servers(settings: Settings, ours: list[str], against: list[str], counts: list[int], plan: Plan) -> dict[str, Any]:
    """This server and others, with as many clients at once as there are streams; chats of all suites in turn."""
    from server.bench.lossless import SearchOptions, search_prompts
    from server.bench.server_race import OURS, ServerUnavailable, contender, servers_report
    from server.launch import load_codec, resolve_target
    from server.placement.machine import compute_threads

    target, unavailable = resolve_target(settings.target), dict[str, str]()
    codec, contenders = load_codec(target), []
    for entry in (OURS, *against):
        name, _, own = entry.partition("=")
        try:
            threads = settings.threads or compute_threads()
            contenders.append(contender(name, resolve_target(own) if own else target, ours, threads, CONTEXT))
        except ServerUnavailable as reason:
            unavailable[name] = str(reason)
    chats = search_prompts(SearchOptions(tuple(plan.suites), plan.turns * sum(counts)))
    prompts = [chat.text or chat.turns[0] for chat in chats]
    report = servers_report(
        contenders, prompts, counts, plan.max_tokens, plan.turns, lambda text: len(codec.encode(text)), tell
    )
    report["unavailable"] |= unavailable
    return report


def waits(setup: Setup, drafter: AnyDrafter | None, codec: TextCodec, turns: int) -> dict[str, Any]:
    """What a request waits for, on prompts made of the chats of a suite."""
    from server.bench.prompts import load_prompts
    from server.bench.streams import choices_report, gap_report, second_turn_report

    words = " ".join(turn for prompt in load_prompts("mt-bench") for turn in prompt.turns)
    token_ids = codec.encode(words * (1 + 2 * LONG_TOKENS // len(words.split())))
    chat, long, follow = token_ids[:CHAT_TOKENS], token_ids[-LONG_TOKENS:], codec.encode(FOLLOW_UP)
    engine = setup.engine(drafter, lookup=True)
    return {
        "second_turn": second_turn_report(engine, chat, follow, turns),
        "choices": choices_report(setup.engine(drafter, lookup=True), chat, turns),
        "gap": gap_report(setup.engine(drafter, lookup=True), codec.encode(STREAM), long, turns),
    }


def texts(setup: Setup, codec: TextCodec, suite: str, plan: Plan) -> Texts:
    """Prompts of a suite, and what the target alone writes after them."""
    from server.bench.contestants import EngineContestant
    from server.bench.prompts import load_prompts
    from server.bench.streams import PLAIN
    from server.bench.texts import generate_references

    plain = EngineContestant(PLAIN, setup.engine(None, lookup=False, by_cost=False))
    return generate_references(plain, codec, load_prompts(suite, plan.limit), plan.max_tokens, True, lambda *_: None)


def tell(what: str) -> None:
    """What has just been measured."""
    typer.echo(what, err=True)
