"""Answers held to JSON schemas: whether every finished one validates, whether drafting changes any, and what it gives.

Every schema is answered three times by one engine: greedily by plain decoding, greedily as it is served, and with a
seed as it is served. Its prompt is read before, so every answer begins with a known one. A study may be ended at any
time and taken up again from its report.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.bench.contestants import GREEDY
from server.bench.lossless import read_report
from server.bench.schemas import Schema, SchemaCase
from server.bench.texts import Advance, BenchError
from server.engine.completion import Completion, generate
from server.engine.engine import Engine
from server.engine.grammar import GrammarCompiler
from server.engine.measure import replaced
from server.engine.request import FinishReason, Request, SamplingParams
from server.text import TextCodec

GROUP = 8  # schemas between two savings of the report
READ, PLAIN, DRAFTED, SAMPLED = "read", "greedy, plain", "greedy, drafted", "sampled, drafted"
SHOWN = 60  # characters of an answer that was cut
COUNTS = ("texts", "finished", "valid", "tokens", "rounds", "drafted", "accepted")


@dataclass(frozen=True)
class StudyOptions:
    """schemas: how many, drawn from ``seed``; streams: requests that run at once; temperature, top_p: of the sampled
    answers, each with its schema's number as its seed."""

    schemas: int = 300
    seed: int = 0
    max_tokens: int = 384
    streams: int = 1
    temperature: float = 0.8
    top_p: float = 0.95


class StudyReport:
    """What was answered so far, in a JSON file.

    answers: counts by mode; levels: of the drafted ones; ``invalid`` and ``differences`` name what must not be,
    ``unfinished`` the answers that ``max_tokens`` cut, with their last characters.
    """

    def __init__(self, file: Path, target: str, drafter: str, options: StudyOptions) -> None:
        """Takes up the study in ``file`` where there is one. Errors: BenchError for another study's file."""
        self.file = file
        head = {"target": target, "drafter": drafter, "conditions": dataclasses.asdict(options)}
        empty: dict[str, Any] = {"schemas": 0, "answers": {}, "levels": {}}
        self.content = head | empty | {name: [] for name in ("invalid", "differences", "unfinished")}
        if file.exists():
            self.content = read_report(file)
            if {name: self.content.get(name) for name in head} != head:
                raise BenchError(f"{file} holds another study; give its options, or name another file")
        self.saved = json.dumps(self.content)

    def add(self, mode: str, case: SchemaCase, completion: Completion, text: str) -> None:
        """Count an answer, check one that is finished."""
        finished = completion.finished
        is_whole = finished.reason is FinishReason.STOP
        fault = fault_of(case.schema, text) if is_whole else ""
        stats = finished.stats
        figures = (1, int(is_whole), int(is_whole and not fault), len(completion.token_ids), stats.rounds,
                   stats.drafted, stats.accepted)  # fmt: skip
        places = [self.content["answers"].setdefault(mode, {})]
        if mode != PLAIN:
            places.append(self.content["levels"].setdefault(str(case.level), {}))
        for counts in places:
            for name, figure in zip(COUNTS, figures, strict=True):
                counts[name] = counts.get(name, 0) + figure
        if not is_whole:
            self.content["unfinished"].append([case.name, mode, finished.reason.value, text[-SHOWN:]])
        elif fault:
            self.content["invalid"].append([case.name, mode, f"{fault}: {text}"])

    def spent(self, mode: str, seconds: float) -> None:
        """Add to the time that the answers of a mode took."""
        counts = self.content["answers"].setdefault(mode, {})
        counts["seconds"] = round(counts.get("seconds", 0.0) + seconds, 3)

    def finish(self, hardware: dict[str, Any]) -> dict[str, Any]:
        """The content, with the share of finished answers and tokens a second of all streams."""
        self.content["hardware"] = hardware
        for counts in self.content["answers"].values():
            counts["finished_share"] = round(counts["finished"] / counts["texts"], 4)
            counts["acceptance_length"] = round(counts["tokens"] / max(counts["rounds"], 1), 3)
            counts["tokens_per_s"] = round(counts["tokens"] / counts["seconds"], 1)
        self.save()
        return self.content

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.saved = json.dumps(self.content)
        with replaced(self.file) as partial:
            partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def forget_unsaved(self) -> None:
        """Drop what was counted of a group that was not finished."""
        self.content = json.loads(self.saved)


class Study:
    """A study with one loaded engine; ``engine`` is the one that serves. Errors: BenchError without jsonschema."""

    def __init__(self, engine: Engine, codec: TextCodec, options: StudyOptions, report: StudyReport) -> None:
        if importlib.util.find_spec("jsonschema") is None:
            raise BenchError("answers are checked with jsonschema, of the extra dev: pip install jsonschema")
        self.engine = engine
        self.codec = codec
        self.options = options
        self.report = report
        self.compiler = GrammarCompiler(codec.tokenizer, codec.stop_ids)

    def run(self, cases: Sequence[SchemaCase], advance: Advance) -> None:
        """Every schema that the report has not seen yet. Errors: GrammarError for one that does not compile."""
        content = self.report.content
        while content["schemas"] < len(cases):
            start = content["schemas"]
            group = cases[start : start + GROUP]
            generate(self.engine, [self.request(case, number, READ) for number, case in enumerate(group, start)])
            plain, drafted, _ = (self.answers(group, start, mode) for mode in (PLAIN, DRAFTED, SAMPLED))
            for case, one, other in zip(group, plain, drafted, strict=True):
                if one.token_ids != other.token_ids:
                    content["differences"].append([case.name, one.token_ids, other.token_ids])
            content["schemas"] += len(group)
            self.report.save()
            advance("schemas", content["schemas"], len(cases))

    def answers(self, cases: Sequence[SchemaCase], start: int, mode: str) -> list[Completion]:
        """One answer to each schema, as many at once as the engine has slots; counted and checked."""
        requests = [self.request(case, number, mode) for number, case in enumerate(cases, start)]
        began = time.perf_counter()
        results = generate(self.engine, requests)
        self.report.spent(mode, time.perf_counter() - began)
        completions = [results[request.request_id] for request in requests]
        for case, completion in zip(cases, completions, strict=True):
            self.report.add(mode, case, completion, self.codec.decode(completion.token_ids))
        return completions

    def request(self, case: SchemaCase, number: int, mode: str) -> Request:
        """What the engine is asked."""
        sampled = SamplingParams(self.options.temperature, self.options.top_p, seed=number)
        return Request(
            f"{case.name}, {mode}",
            self.codec.chat([{"role": "user", "content": case.request}]),
            0 if mode == READ else self.options.max_tokens,
            sampled if mode == SAMPLED else GREEDY,
            self.codec.stop_ids,
            draft=mode != PLAIN,
            grammar=self.compiler.compile("json_schema", case.schema),
        )


def fault_of(schema: Schema, text: str) -> str:
    """Why an answer does not follow its schema; empty where it does."""
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    try:
        validator.validate(json.loads(text))
    except ValueError as error:
        return f"no JSON: {error}"
    except jsonschema.ValidationError as error:
        return str(error.message)
    return ""
