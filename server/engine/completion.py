"""What requests give, as it grows: the one reader of the engine's events, for server, commands and scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from server.engine.request import (
    EngineError,
    Event,
    FinishedEvent,
    FinishReason,
    PooledEvent,
    PromptEvent,
    Ranked,
    Request,
)
from server.engine.stop import TextOutput

if TYPE_CHECKING:
    from server.engine.engine import Engine


class Piece(NamedTuple):
    """What one token added to the text, and whether it was a draft; the text at the very end is no token's.

    text: what may be shown by now; decoded: what the token completed, though it be held back or cut off; ranked: how
    likely it was, where the request asks.
    """

    text: str
    drafted: bool = False
    token_id: int | None = None
    decoded: str = ""
    ranked: Ranked | None = None


class Delta(NamedTuple):
    """What one event added; ``finish_reason`` is set once, by the last: "stop" or "length" as clients know them."""

    pieces: tuple[Piece, ...] = ()
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        """All pieces in one."""
        return "".join(piece.text for piece in self.pieces)


class Completion:
    """One request's tokens and, with an ``output``, its text.

    token_ids, drafted and, where asked, ranked hold what counts: nothing behind the token that completed a stop string.
    ``stopped``: such a string was met, so the engine may be told to end the request. prompt_ranked: of the prompt's
    tokens, from the second on; vector: of the whole prompt.
    """

    def __init__(self, request: Request, output: TextOutput | None = None) -> None:
        self.request = request
        self.output = output
        self.token_ids: list[int] = []
        self.drafted: list[bool] = []
        self.ranked: list[Ranked] = []
        self.prompt_ranked: list[Ranked] = []
        self.vector: tuple[float, ...] = ()
        self.stopped = False
        self.ending: FinishedEvent | None = None

    @property
    def finished(self) -> FinishedEvent:
        """How it ended; only to be asked of one that has."""
        assert self.ending is not None
        return self.ending

    def check(self) -> None:
        """Errors: EngineError where the engine failed on the request, or its grammar could not go on."""
        if self.ending is not None and self.ending.reason in (FinishReason.FAILED, FinishReason.STUCK):
            raise EngineError(self.ending.error or "the engine failed on this request")

    def take(self, event: Event) -> Delta:
        """Take in one event of this request."""
        if isinstance(event, FinishedEvent):
            return self._finish(event)
        if isinstance(event, PromptEvent):
            self.prompt_ranked += event.ranked
            return Delta()
        if isinstance(event, PooledEvent):
            self.vector = event.vector
            return Delta()
        pieces: list[Piece] = []
        ranks = event.ranked or [None] * len(event.token_ids)
        for token_id, drafted, ranked in zip(event.token_ids, event.drafted, ranks, strict=True):
            if self.stopped:
                break
            self.token_ids.append(token_id)
            self.drafted.append(drafted)
            self.ranked += [] if ranked is None else [ranked]
            if self.output is not None:
                text, decoded = self.output.push(token_id)
                self.stopped = self.output.stopped
                pieces.append(Piece(text, drafted, token_id, decoded, ranked))
        return Delta(tuple(pieces))

    def _finish(self, event: FinishedEvent) -> Delta:
        self.ending = event
        rest = ""
        if self.output is not None and not self.stopped:
            rest = self.output.flush()
            self.stopped = self.output.stopped
        is_cut = event.reason is FinishReason.LENGTH and not self.stopped
        return Delta((Piece(rest),), "length" if is_cut else "stop")


class Completions:
    """Requests that run together: those that have not ended."""

    def __init__(self, completions: Iterable[Completion] = ()) -> None:
        self.by_id: dict[str, Completion] = {}
        for completion in completions:
            self.add(completion)

    def add(self, completion: Completion) -> None:
        """One more. Errors: EngineError for an id that another one has."""
        request_id = completion.request.request_id
        if request_id in self.by_id:
            raise EngineError(f"two requests are called {request_id!r}; every request needs an id of its own")
        self.by_id[request_id] = completion

    @property
    def num_open(self) -> int:
        """Those that have not ended."""
        return len(self.by_id)

    def take(self, event: Event) -> tuple[Completion, Delta]:
        """Whose event it is, and what it added; one that ends is forgotten."""
        completion = self.by_id[event.request_id]
        delta = completion.take(event)
        if completion.ending is not None:
            del self.by_id[event.request_id]
        return completion, delta


def step(engine: Engine, completions: Completions) -> list[Completion]:
    """One step of an engine that no thread owns, every event taken in; the completions that ended in it."""
    ended: list[Completion] = []
    for event in engine.step():
        completion, delta = completions.take(event)
        if delta.finish_reason is not None:
            ended.append(completion)
    return ended


def generate(engine: Engine, requests: Sequence[Request]) -> dict[str, Completion]:
    """Submit all requests and step until every one has ended; results by request id."""
    completions = Completions(Completion(request) for request in requests)
    for request in requests:
        engine.submit(request)
    results = dict(completions.by_id)
    while completions.num_open:
        step(engine, completions)
    return results
