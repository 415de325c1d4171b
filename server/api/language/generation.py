"""The running requests of one API call: tokens in from the engine, text out, counts and timings at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from server.api.errors import ApiError, internal_error
from server.api.language.tokens import ShownToken, TokenTrack
from server.api.serving import EngineHandle, ServedModel, Serving
from server.engine.completion import Completion, Completions, Delta
from server.engine.report import metrics_json, rate, timings_json
from server.engine.request import (
    DraftStats,
    EngineStopped,
    Event,
    FinishedEvent,
    FinishReason,
    PooledEvent,
    PromptEvent,
    Ranked,
    Request,
    Timings,
)
from server.engine.stop import TextOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChoiceDelta:
    """What one round added to a choice, the echoed prompt first; ``finish_reason`` is set once, on its last delta.

    tokens: those whose text it shows; the last delta holds also those that are not shown.
    """

    index: int
    text: str
    finish_reason: str | None = None
    tokens: Sequence[ShownToken] = ()


@dataclass(frozen=True)
class Echo:
    """The prompt as it stands before an answer: its text, and each token's share of that."""

    text: str
    token_ids: Sequence[int]
    texts: Sequence[str]


@dataclass
class Choice:
    """One choice: its number in the answer, what the engine has given for it, and the prompt it still has to echo."""

    index: int
    completion: Completion
    echo: Echo | None = None
    track: TokenTrack | None = None

    def begin(self) -> list[ChoiceDelta]:
        """The echo, once all that is told of its tokens has come."""
        echo, self.echo = self.echo, None
        if echo is None:
            return []
        if self.track is None:
            return [ChoiceDelta(self.index, echo.text)]
        ranks: list[Ranked | None] = [None, *self.completion.prompt_ranked]
        ranks += [None] * (len(echo.token_ids) - len(ranks))
        for token_id, text, ranked in zip(echo.token_ids, echo.texts, ranks, strict=True):
            self.track.add(token_id, text, ranked, is_echo=True)
        self.track.shown = self.track.end = len(echo.text)
        tokens, self.track.waiting = self.track.waiting, []
        return [ChoiceDelta(self.index, echo.text, tokens=tokens)]

    def grow(self, delta: Delta) -> list[ChoiceDelta]:
        """What an event of the engine's added."""
        tokens = [] if self.track is None else self.track.take(delta.pieces, delta.text)
        if self.track is not None and delta.finish_reason is not None:
            tokens += self.track.finish(delta.text, is_stopped=self.completion.stopped)
        if not (delta.text or tokens or delta.finish_reason):
            return []
        return [ChoiceDelta(self.index, delta.text, delta.finish_reason, tokens)]

    @property
    def num_tokens(self) -> int:
        """Tokens that count: none behind a stop string."""
        return len(self.completion.token_ids)

    @property
    def finished(self) -> FinishedEvent | None:
        """How it ended; None until then."""
        return self.completion.ending

    def log(self, reason: str) -> None:
        """One line for each finished request; never its text."""
        request, (stats, timings) = self.completion.request, self.figures()
        first = timings.first_token - timings.submitted if timings.first_token is not None else 0.0
        logger.info(
            "request %s: %d prompt and %d output tokens, ttft %.3f s, %.1f tokens/s, acceptance length %.2f, %s",
            request.request_id, len(request.prompt_ids), self.num_tokens, first,
            rate(self.num_tokens - 1, timings.decode_s), stats.acceptance_length, reason,
        )  # fmt: skip

    def figures(self) -> tuple[DraftStats, Timings]:
        """What drafting did and when; empty until it has ended."""
        ending = self.finished
        return (DraftStats(), Timings()) if ending is None else (ending.stats, ending.timings)


class Silence:
    """Events of a queue as they come, those that are there together, and none after each ``seconds`` without any.

    One timer for the whole stream, set again when it rings: a timeout for each event costs more than all the rest of
    waiting for it.
    """

    def __init__(self, events: asyncio.Queue[Event | None], seconds: float) -> None:
        self.events = events
        self.seconds = seconds
        self.loop = asyncio.get_running_loop()
        self.last = self.loop.time()
        self.timer = self.loop.call_later(seconds, self._ring)

    async def next(self) -> list[Event]:
        """The next events; empty for silence."""
        found = [await self.events.get()]
        while not self.events.empty():
            found.append(self.events.get_nowait())
        self.last = self.loop.time()
        return [event for event in found if event is not None]

    def close(self) -> None:
        """Wait for nothing any more."""
        self.timer.cancel()

    def _ring(self) -> None:
        left = self.last + self.seconds - self.loop.time()
        if left <= 0:
            self.events.put_nowait(None)
            left = self.seconds
        self.timer = self.loop.call_later(left, self._ring)


class Generation:
    """Submits a call's requests, merges their events, and cancels what is unfinished when it is closed.

    choices: prompt-major, so the choice ``c`` of prompt ``p`` has index ``p * n + c``. outputs: where the text of each
    request comes from. echoes: the prompts to be given back before the answers; empty: none are. tells_tokens: whether
    deltas hold the tokens behind their text.
    """

    def __init__(
        self,
        serving: Serving,
        model: ServedModel,
        requests: Sequence[Request],
        outputs: Sequence[TextOutput],
        echoes: Sequence[Echo] = (),
        *,
        tells_tokens: bool = False,
    ) -> None:
        self.serving = serving
        self.engine: EngineHandle = model.engine
        self.dispatcher = serving.dispatcher
        self.choices = {
            request.request_id: Choice(
                index,
                Completion(request, output),
                echoes[index] if echoes else None,
                TokenTrack() if tells_tokens else None,
            )
            for index, (request, output) in enumerate(zip(requests, outputs, strict=True))
        }
        self.running = Completions(choice.completion for choice in self.choices.values())
        self.events: asyncio.Queue[Event | None] = self.dispatcher.open(self.choices)
        serving.observations.begin(requests, model.name)
        try:
            for request in requests:
                self.engine.submit(request)
        except BaseException:
            self.close()
            raise

    async def rounds(self, keepalive_s: float) -> AsyncGenerator[Iterator[ChoiceDelta] | None, None]:
        """What comes: the deltas of all choices that came together, to be gone through before the next are asked for;
        None after ``keepalive_s`` of silence. Errors: the choices' own, in their place among the deltas."""
        with contextlib.closing(Silence(self.events, keepalive_s)) as silence:
            while self.running.num_open:
                if events := await silence.next():
                    yield self._deltas(events)
                else:
                    self._check_engine()
                    yield None

    def _deltas(self, events: Iterable[Event]) -> Iterator[ChoiceDelta]:
        for event in events:
            completion, delta = self.running.take(event)
            choice = self.choices[event.request_id]
            if isinstance(event, FinishedEvent):
                self.check(completion, event)
                choice.log(str(delta.finish_reason))
            elif completion.stopped:
                self.engine.cancel(event.request_id)
            if not isinstance(event, PromptEvent | PooledEvent):
                yield from choice.begin()
                yield from choice.grow(delta)

    def _check_engine(self) -> None:
        """Errors: EngineStopped, NotServing where nothing can come any more."""
        if not self.engine.alive:
            raise EngineStopped("The engine has stopped; restart the server.")
        self.serving.check_not_stuck()

    def check(self, completion: Completion, event: FinishedEvent) -> None:
        """Errors: ApiError 500 where the engine failed on the request, 400 where its grammar could not be followed to
        an end, NotServing where it was cancelled by no client.

        What failed is logged here and not told to the client.
        """
        if event.reason is FinishReason.STUCK:
            raise ApiError(400, f"{event.error}; nothing of the answer counts.", code="invalid_json_schema")
        if event.reason is FinishReason.FAILED:
            logger.error("request %s failed: %s", event.request_id, event.error)
            raise internal_error(event.request_id)
        if event.reason is FinishReason.CANCELLED and not completion.stopped:
            raise self.serving.interruption()

    def close(self) -> None:
        """Cancel what still runs and stop listening. May be called again."""
        self.dispatcher.close(self.choices)
        for request_id in list(self.running.by_id):
            del self.running.by_id[request_id]
            self.engine.cancel(request_id)
            logger.info("request %s: cancelled after %d output tokens", request_id, self.choices[request_id].num_tokens)

    def usage(self) -> dict[str, Any]:
        """OpenAI's counts so far: a prompt counts once whatever its number of choices."""
        requests = [choice.completion.request for choice in self.choices.values()]
        prompt = sum(len(request.prompt_ids) for request in requests if request.choice == 0)
        completion = sum(choice.num_tokens for choice in self.choices.values())
        cached = sum(c.figures()[0].cached for c in self.choices.values() if c.completion.request.choice == 0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def usage_details(self) -> dict[str, int]:
        """Drafted tokens that were kept and those that were not, under OpenAI's names for predicted ones."""
        figures = [choice.figures()[0] for choice in self.choices.values()]
        accepted = sum(stats.accepted for stats in figures)
        return {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(stats.drafted for stats in figures) - accepted,
        }

    def metrics(self) -> dict[str, Any] | None:
        """The request's own figures; None for several choices, whose times run beside each other."""
        if len(self.choices) > 1:
            return None
        choice = next(iter(self.choices.values()))
        return metrics_json(*choice.figures(), choice.num_tokens)

    def timings(self) -> dict[str, float | int]:
        """Draft statistics and times of all choices together."""
        figures = [choice.figures() for choice in self.choices.values()]
        num_tokens = [choice.num_tokens for choice in self.choices.values()]
        return timings_json([stats for stats, _ in figures], [timings for _, timings in figures], num_tokens)
