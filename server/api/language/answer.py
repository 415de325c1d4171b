"""One API call's answer, whole or as a stream, for any wire format."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from server.api.errors import ApiError, from_engine, internal_error
from server.api.language.generation import Generation
from server.api.language.pieces import Answer, Parser, Piece, PlainText, with_tokens
from server.api.leaving import unless_left
from server.api.sse import KEEPALIVE, EventStream
from server.engine.request import EngineError

logger = logging.getLogger(__name__)


class Wire(Protocol):
    """How an answer looks on one route. The methods of a stream give the events to send, in order."""

    def whole(self, answers: Sequence[Answer], generation: Generation) -> dict[str, Any]:
        """A complete answer."""
        ...

    def begin(self, generation: Generation) -> list[bytes]:
        """What a stream sends before any text."""
        ...

    def pieces(self, index: int, pieces: Sequence[Piece], generation: Generation) -> list[bytes]:
        """Pieces of a choice as they come."""
        ...

    def finish(self, index: int, answer: Answer, generation: Generation) -> list[bytes]:
        """The end of a choice."""
        ...

    def end(self, generation: Generation) -> list[bytes]:
        """The end of the stream."""
        ...

    def error(self, error: ApiError) -> bytes:
        """A failure after the stream has begun; nothing follows."""
        ...


@dataclass
class Reply:
    """A generation on its way to the client; one parser for each choice. A silent stream sends comments."""

    wire: Wire
    generation: Generation
    keepalive_s: float = 10.0
    parser: Callable[[], Parser] = PlainText
    parsers: list[Parser] = field(init=False)
    answers: list[Answer] = field(init=False)

    def __post_init__(self) -> None:
        self.parsers = [self.parser() for _ in self.generation.choices]
        self.answers = [Answer() for _ in self.generation.choices]

    async def send(self, request: HttpRequest, *, stream: bool) -> Response:
        """Stream the generation, or collect it while watching for the client to leave."""
        generation = self.generation
        if stream:
            return EventStream(self.events(request.state.request_id), generation.close)
        try:
            return await unless_left(request, self.collect())
        finally:
            generation.close()

    async def collect(self) -> dict[str, Any]:
        """The whole answer."""
        async for _ in self._grow():
            pass
        return self.wire.whole(self.answers, self.generation)

    async def events(self, request_id: str) -> AsyncGenerator[bytes, None]:
        """The stream's events. An error after the first one is an event too; then the stream ends."""
        wire, generation = self.wire, self.generation
        try:
            for event in wire.begin(generation):
                yield event
            async with contextlib.aclosing(self._grow()) as grown:
                async for step in grown:
                    for event in [KEEPALIVE] if step is None else self._step_events(*step):
                        yield event
            for event in wire.end(generation):
                yield event
        except ApiError as error:
            yield wire.error(error)
        except EngineError as error:
            yield wire.error(from_engine(error))
        except Exception:  # headers are out: the stream itself must tell
            logger.exception("request %s failed", request_id)
            yield wire.error(internal_error(request_id))

    def _step_events(self, index: int, pieces: list[Piece]) -> list[bytes]:
        events = self.wire.pieces(index, pieces, self.generation) if pieces else []
        answer = self.answers[index]
        return events if answer.finish_reason is None else events + self.wire.finish(index, answer, self.generation)

    async def _grow(self) -> AsyncGenerator[tuple[int, list[Piece]] | None, None]:
        """Fold the generation into ``answers``; gives every step: a choice and its new pieces, None for silence."""
        async with contextlib.aclosing(self.generation.deltas(self.keepalive_s)) as deltas:
            async for delta in deltas:
                if delta is None:
                    yield None
                    continue
                parser, answer = self.parsers[delta.index], self.answers[delta.index]
                pieces = parser.push(delta.text)
                if delta.finish_reason is not None:
                    pieces += parser.flush()
                pieces = with_tokens(pieces, delta.tokens)
                answer.take(pieces)
                if delta.finish_reason is not None:
                    answer.finish(delta.finish_reason)
                yield delta.index, pieces
