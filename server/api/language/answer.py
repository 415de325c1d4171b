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
from server.api.language.generation import ChoiceDelta, Generation
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
        async with contextlib.aclosing(self.generation.rounds(self.keepalive_s)) as rounds:
            async for deltas in rounds:
                for delta in deltas or ():
                    self._fold(delta)
        return self.wire.whole(self.answers, self.generation)

    async def events(self, request_id: str) -> AsyncGenerator[bytes, None]:
        """The stream's events, those of a round together. An error after the first one is an event too, the last."""
        wire, generation = self.wire, self.generation
        try:
            if begun := b"".join(wire.begin(generation)):
                yield begun
            async with contextlib.aclosing(generation.rounds(self.keepalive_s)) as rounds:
                async for deltas in rounds:
                    events = [KEEPALIVE] if deltas is None else []
                    try:
                        for delta in deltas or ():
                            events += self._events_of(delta)
                    finally:  # what came before an error is sent before it
                        if events:
                            yield b"".join(events)
            yield b"".join(wire.end(generation))
        except ApiError as error:
            yield wire.error(error)
        except EngineError as error:
            yield wire.error(from_engine(error))
        except Exception:  # headers are out: the stream itself must tell
            logger.exception("request %s failed", request_id)
            yield wire.error(internal_error(request_id))

    def _fold(self, delta: ChoiceDelta) -> list[Piece]:
        """Add a delta to its choice's answer; its pieces."""
        parser, answer = self.parsers[delta.index], self.answers[delta.index]
        pieces = parser.push(delta.text)
        if delta.finish_reason is not None:
            pieces += parser.flush()
        pieces = with_tokens(pieces, delta.tokens)
        answer.take(pieces)
        if delta.finish_reason is not None:
            answer.finish(delta.finish_reason)
        return pieces

    def _events_of(self, delta: ChoiceDelta) -> list[bytes]:
        pieces, answer = self._fold(delta), self.answers[delta.index]
        events = self.wire.pieces(delta.index, pieces, self.generation) if pieces else []
        if answer.finish_reason is not None:
            events += self.wire.finish(delta.index, answer, self.generation)
        return events
