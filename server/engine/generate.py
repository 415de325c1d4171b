"""Run an engine that no thread owns until its requests are done: for benchmarks, tests and scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.engine import Engine
from server.engine.request import EngineError, FinishedEvent, Request, TokensEvent


@dataclass(frozen=True)
class Generated:
    """The tokens of one request, which of them were drafts, and how it ended."""

    token_ids: tuple[int, ...]
    drafted: tuple[bool, ...]
    finished: FinishedEvent


def generate(engine: Engine, requests: Sequence[Request]) -> dict[str, Generated]:
    """Submit all requests and step until every one has ended; results by request id."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    drafted: dict[str, list[bool]] = {request.request_id: [] for request in requests}
    if len(tokens) != len(requests):
        raise EngineError(f"{len(requests)} requests share {len(tokens)} ids; every request needs its own")
    results: dict[str, Generated] = {}
    for request in requests:
        engine.submit(request)
    while len(results) < len(requests):
        for event in engine.step():
            if isinstance(event, TokensEvent):
                tokens[event.request_id] += event.token_ids
                drafted[event.request_id] += event.drafted
            else:
                name = event.request_id
                results[name] = Generated(tuple(tokens[name]), tuple(drafted[name]), event)
    return results
