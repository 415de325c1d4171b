"""``dovetail generate``: one prompt, its continuation token by token."""

from __future__ import annotations

import json
import queue
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from server.commands.options import (
    Config,
    Context,
    Depth,
    Drafter,
    DrafterDevice,
    Engine,
    GPULayers,
    KVCache,
    Lookup,
    Rows,
    Target,
    Threads,
    TopK,
    Trees,
    Vram,
    Weights,
    settings_from,
)
from server.engine.completion import Completion, Completions
from server.engine.report import timings_json
from server.engine.request import EngineStopped, Event, Request, SamplingParams
from server.engine.stop import TextOutput

if TYPE_CHECKING:
    from server.api.serving import ServedModel

DEFAULT_MAX_TOKENS = 128
POLL_S = 1.0
DRAFTED_STYLE = "green"


@dataclass(frozen=True)
class GenerationResult:
    """A finished continuation. token_ids includes the stop id that ended it."""

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    finish_reason: str
    timings: dict[str, float | int]

    def json(self) -> str:
        """One line of JSON."""
        num_tokens = len(self.token_ids)
        usage = {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": self.num_prompt_tokens + num_tokens,
        }
        return json.dumps(
            {
                "text": self.text,
                "token_ids": self.token_ids,
                "finish_reason": self.finish_reason,
                "usage": usage,
                "timings": self.timings,
            }
        )

    def closing_line(self) -> str:
        """The figures a person wants to see."""
        return (
            f"{len(self.token_ids)} tokens, {self.timings['tokens_per_s']:.1f} tokens/s, "
            f"acceptance length {self.timings['acceptance_length']:.2f}"
        )


def generate(
    text: Annotated[str, typer.Argument(help="The text to continue.", show_default=False)],
    target: Target = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help=f"Longest continuation. Default: {DEFAULT_MAX_TOKENS}.", show_default=False),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.", show_default=False)] = None,
    no_draft: Annotated[bool, typer.Option("--no-draft", help="Decode plainly.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    drafter: Drafter = None,
    weights: Weights = None,
    engine: Engine = None,
    gpu_layers: GPULayers = None,
    kv_cache: KVCache = None,
    drafter_device: DrafterDevice = None,
    vram: Vram = None,
    threads: Threads = None,
    context: Context = None,
    rows: Rows = None,
    top_k: TopK = None,
    depth: Depth = None,
    lookup: Lookup = None,
    trees: Trees = None,
    config: Config = None,
) -> None:
    """Continue a text. Tokens that were drafted and accepted are green."""
    if no_draft and drafter not in (None, "none"):
        raise typer.BadParameter("--no-draft contradicts --drafter; give one of them")
    settings = settings_from(
        config,
        target=target,
        drafter="none" if no_draft else drafter,
        weights=weights,
        engine=engine,
        gpu_layers=gpu_layers,
        kv_cache=kv_cache,
        drafter_device=drafter_device,
        vram=vram,
        threads=threads,
        context=context,
        rows=rows,
        top_k=top_k,
        depth=depth,
        lookup=False if no_draft else lookup,
        trees=trees,
        max_seqs=1,
    )
    from server.launch import load_model

    model = load_model(settings)
    sampling = SamplingParams(temperature=temperature, seed=seed)
    console = None if as_json else Console(highlight=False, markup=False, soft_wrap=True)
    result = run_generation(model, text, sampling, max_tokens=max_tokens, draft=not no_draft, console=console)
    if console is None:
        typer.echo(result.json())
    else:
        console.print()
        Console(stderr=True, markup=False).print(Text(result.closing_line(), style="dim"), soft_wrap=True)


def run_generation(
    model: ServedModel,
    text: str,
    sampling: SamplingParams,
    *,
    max_tokens: int | None,
    draft: bool,
    console: Console | None,
) -> GenerationResult:
    """Continue ``text``, showing it on ``console`` as it grows. The engine is started and stopped here.

    max_tokens None: 128, or less where the context ends before. Errors: EngineError, InvalidText.
    """
    prompt_ids = model.codec.encode(text)
    limit = max_tokens or max(min(DEFAULT_MAX_TOKENS, model.context_length - len(prompt_ids)), 1)
    request = Request("generate", prompt_ids, limit, sampling, model.codec.stop_ids, draft=draft)
    batches: queue.Queue[list[Event]] = queue.Queue()
    model.engine.start(batches.put)
    try:
        model.engine.submit(request)
        if console is not None:
            console.print(Text(text, style="dim"), end="")
        return collect(model, request, batches, console)
    finally:
        model.engine.stop()


def collect(
    model: ServedModel, request: Request, batches: queue.Queue[list[Event]], console: Console | None
) -> GenerationResult:
    """Take the engine's events until the request ends. Errors: EngineError where it failed."""
    completion = Completion(request, TextOutput(model.codec, prompt_ids=request.prompt_ids))
    completions = Completions([completion])
    text: list[str] = []
    while completions.num_open:
        for event in next_batch(model, batches):
            _, delta = completions.take(event)
            text.append(delta.text)
            if console is not None:
                for piece in delta.pieces:
                    console.print(Text(piece.text, style=DRAFTED_STYLE if piece.drafted else ""), end="")
    completion.check()
    finished, token_ids = completion.finished, tuple(completion.token_ids)
    timings = timings_json([finished.stats], [finished.timings], [len(token_ids)])
    return GenerationResult("".join(text), token_ids, len(request.prompt_ids), finished.reason.value, timings)


def next_batch(model: ServedModel, batches: queue.Queue[list[Event]]) -> list[Event]:
    """The next round's events. Errors: EngineStopped where none will come."""
    while True:
        try:
            return batches.get(timeout=POLL_S)
        except queue.Empty:
            if not model.engine.alive:
                raise EngineStopped("the engine has stopped before the text was complete") from None
