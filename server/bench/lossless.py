"""A search for a text that serving changes: every prompt plainly, then as it is served, greedy and with a seed.

Served means everything at once: rows by cost, the drafter and lookup, positions the drafter has not seen yet, cached
prompts, several requests in a pass. The plain twin is one request at a time without any of it, on the same target. A
search may be ended at any time and taken up again from its report.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.bench.contestants import GREEDY, Case, EngineContestant
from server.bench.near_ties import movement_json, near_tie, seeded_gap
from server.bench.prompts import Prompt, load_prompts
from server.bench.texts import Advance, BenchError
from server.engine.completion import generate
from server.engine.engine import Engine
from server.engine.measure import replaced
from server.engine.request import Request, SamplingParams
from server.engine.sampling import uniform
from server.targets.target import PrefillChunk, Target
from server.text import TextCodec

MODES = ("greedy", "seeded")
GROUP = 4  # prompts between two savings of the report


@dataclass(frozen=True)
class SearchOptions:
    """suites: prompts are taken from all of them in turn, ``limit`` in all; streams: requests at once, one pass over
    the texts for each; modes: ``greedy``, ``seeded`` or both; temperature, top_p: of the seeded texts."""

    suites: tuple[str, ...] = ("humaneval", "mt-bench", "gsm8k")
    limit: int = 500
    max_tokens: int = 64
    streams: tuple[int, ...] = (1, 4)
    modes: tuple[str, ...] = MODES
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.limit < 1 or self.max_tokens < 2 or not self.streams or min(self.streams) < 1:
            raise BenchError("a search needs a prompt, two tokens a text and one stream at least")
        if not self.modes or not set(self.modes) <= set(MODES):
            raise BenchError(f"texts are {' or '.join(MODES)}, not {', '.join(self.modes) or 'none of them'}")


@dataclass(frozen=True)
class Job:
    """One text to compare: the case, how it is sampled, and what the target alone writes."""

    case: Case
    mode: str
    sampling: SamplingParams
    plain: tuple[int, ...]


class Report:
    """What was compared so far, in a JSON file: for each format of the weights the prompts done and the counts."""

    def __init__(
        self, file: Path, target: str, drafter: str, options: SearchOptions, engine: str | None = None
    ) -> None:
        """``engine``: which one was asked for, if any. Takes up the search in ``file`` where there is one.

        Errors: BenchError for another search's file.
        """
        self.file = file
        conditions = json.loads(json.dumps(dataclasses.asdict(options)))
        head = {"target": target, "engine": engine, "drafter": drafter, "conditions": conditions}
        self.content: dict[str, Any] = head | {"weights": {}, "counter_examples": []}
        if file.exists():
            self.content = read_report(file)
            if {name: self.content.get(name) for name in head} != head:
                raise BenchError(f"{file} holds another search; give its options, or name another file")

    def counts(self, weights: str) -> dict[str, Any]:
        """Of one format: ``prompts`` done, ``too_long``, and for each mode and number of streams the texts."""
        empty = {"prompts": 0, "too_long": 0, "texts": {}}
        counts: dict[str, Any] = self.content["weights"].setdefault(weights, empty)
        return counts

    def add(self, weights: str, name: str, figures: dict[str, int]) -> None:
        """Count a text under the name of its mode and streams."""
        texts = self.counts(weights)["texts"].setdefault(name, dict.fromkeys(figures, 0))
        for key, value in figures.items():
            texts[key] += value

    @property
    def counter_examples(self) -> list[dict[str, Any]]:
        """The texts that differ."""
        found: list[dict[str, Any]] = self.content["counter_examples"]
        return found

    @property
    def faults(self) -> int:
        """Texts that differ and must not."""
        return sum(not found["tie"] for found in self.counter_examples)

    def save(self) -> None:
        """Write the file, whole or not at all; near-ties are counted apart from faults, with the largest gap of each
        mode."""
        ties: dict[str, list[float]] = {}
        for found in self.counter_examples:
            if found["tie"]:
                ties.setdefault(found["mode"], []).append(abs(found["gap"]))
        self.content["near_ties"] = {
            mode: {"texts": len(gaps), "largest_gap": max(gaps)} for mode, gaps in ties.items()
        }
        self.content["faults"] = self.faults
        with replaced(self.file) as partial:
            partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")


def read_report(file: Path) -> dict[str, Any]:
    """Errors: BenchError for a file that holds no search."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{file} cannot be read as a search's report: {error}") from error
    if not isinstance(content, dict):
        raise BenchError(f"{file} holds no search's report")
    return content


def search_prompts(options: SearchOptions) -> list[Prompt]:
    """The suites' prompts in turn, so that a search cut short has seen all suites. Errors: SuiteError."""
    suites = [load_prompts(suite) for suite in options.suites]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*suites))
    return [prompt for prompt in in_turn if prompt is not None][: options.limit]


class Search:
    """A search with one loaded engine; ``engine`` is the one that serves."""

    def __init__(self, engine: Engine, codec: TextCodec, options: SearchOptions, report: Report) -> None:
        self.engine = engine
        self.codec = codec
        self.options = options
        self.report = report
        self.weights = engine.target.info.weights
        self.alone = Engine(engine.target, None, dataclasses.replace(engine.options, lookup=False, cache_bytes=0))
        self.numbers = itertools.count()

    def run(self, prompts: Sequence[Prompt], advance: Advance) -> None:
        """Every prompt that the report has not seen yet. Errors: EngineError where plain decoding fails."""
        counts = self.report.counts(self.weights)
        if not self.engine.target.info.exact_rows and "near_tie" not in counts:
            texts = [self.prompt_ids(prompt) for prompt in prompts]
            counts["near_tie"] = movement_json(self.engine.target, texts)
        while counts["prompts"] < len(prompts):
            start = counts["prompts"]
            group = prompts[start : start + GROUP]
            jobs = [job for number, prompt in enumerate(group, start) for job in self.jobs(number, prompt)]
            for streams in self.options.streams:
                for first in range(0, len(jobs), streams):
                    self.compare(jobs[first : first + streams], streams)
            counts["prompts"] += len(group)
            self.report.save()
            advance(self.weights, counts["prompts"], len(prompts))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The first turn, as the target reads it."""
        if prompt.text is not None:
            return self.codec.encode(prompt.text)
        return self.codec.chat([{"role": "user", "content": prompt.turns[0]}])

    def jobs(self, number: int, prompt: Prompt) -> Iterator[Job]:
        """A prompt's texts as the target alone writes them; a chat's later turns follow its own earlier answers."""
        seeded = SamplingParams(self.options.temperature, self.options.top_p, seed=number)
        for mode in self.options.modes:
            sampling = GREEDY if mode == "greedy" else seeded
            plain = EngineContestant(f"plain {mode}", self.alone, sampling)
            messages: list[dict[str, str]] = []
            for turn in prompt.turns or (None,):
                if turn is None:
                    prompt_ids = self.codec.encode(prompt.text or "")
                else:
                    messages.append({"role": "user", "content": turn})
                    prompt_ids = self.codec.chat(messages)
                if len(prompt_ids) + self.options.max_tokens > self.engine.options.context_length:
                    self.report.counts(self.weights)["too_long"] += 1
                    break
                case = Case(prompt.name, tuple(prompt_ids), self.options.max_tokens, self.codec.stop_ids)
                text = plain.run(case).token_ids
                yield Job(case, mode, sampling, text)
                messages.append({"role": "assistant", "content": self.codec.decode(text)})

    def compare(self, jobs: Sequence[Job], streams: int) -> None:
        """Serve these texts at once and note what they cost and where they differ."""
        names = [f"search-{next(self.numbers)}" for _ in jobs]
        requests = [
            Request(name, job.case.prompt_ids, job.case.max_tokens, job.sampling, job.case.stop_ids)
            for name, job in zip(names, jobs, strict=True)
        ]
        results = generate(self.engine, requests)
        for name, job in zip(names, jobs, strict=True):
            served, stats = tuple(results[name].token_ids), results[name].finished.stats
            figures = {"texts": 1, "tokens": len(served), "drafted": stats.drafted, "accepted": stats.accepted}
            self.report.add(self.weights, f"{job.mode}, {streams}", figures | {"cached": stats.cached})
            if served != job.plain:
                found = {"weights": self.weights, "mode": job.mode, "streams": streams, "prompt": job.case.name}
                found |= {"error": results[name].finished.error} | difference(self.engine.target, job, served)
                self.report.counter_examples.append(found)


def difference(target: Target, job: Job, served: Sequence[int]) -> dict[str, Any]:
    """Where two texts part, and by how much the target alone prefers its own token there, in logits.

    gap: of the two tokens' logits; of a seeded choice ``near_ties.seeded_gap``. tie: nearer than rows that depend on
    their neighbours can be told apart.
    """
    shorter = min(len(job.plain), len(served))
    position = next((i for i in range(shorter) if job.plain[i] != served[i]), shorter)
    found: dict[str, Any] = {"position": position, "plain": job.plain[position:], "served": tuple(served[position:])}
    if position == shorter:
        return found | {"gap": None, "tie": False}
    logits = target.prefill(PrefillChunk(0, [*job.case.prompt_ids, *job.plain[:position]])).logits
    target.release(0)
    own, other, tie = job.plain[position], served[position], near_tie(target.info)
    if job.sampling.temperature == 0:
        gap: float | None = float(logits[own] - logits[other])
    else:
        assert job.sampling.seed is not None
        number = uniform(job.sampling.seed, 0, position)
        gap = seeded_gap(logits, job.sampling, number, other, tie)
    return found | {"gap": gap, "tie": gap is not None and abs(gap) < tie}
