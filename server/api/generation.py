"""The running requests of one API call: tokens in from the engine, text out, counts and timings at the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from server.api.errors import internal_error
from server.api.serving import EngineHandle, ServedModel, Serving
from server.engine.report import rate, timings_json
from server.engine.request import (
    DraftStats,
    EngineStopped,
    Event,
    FinishedEvent,
    FinishReason,
    Request,
    Timings,
    TokensEvent,
)
from server.engine.stop import TextOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChoiceDelta:
    """What one round added to a choice; ``finish_reason`` is set once, on its last delta."""

    index: int
    text: str
    finish_reason: str | None = None


@dataclass
class Choice:
    """One choice as it grows."""

    index: int
    request: Request
    output: TextOutput
    num_tokens: int = 0
    stopped: bool = False
    finished: bool = False
    stats: DraftStats = field(default_factory=DraftStats)
    timings: Timings = field(default_factory=Timings)

    def add(self, event: TokensEvent) -> ChoiceDelta:
        """Take a burst; what follows a stop string is dropped."""
        if self.stopped:
            return ChoiceDelta(self.index, "")
        delta = self.output.push(event.token_ids)
        self.num_tokens += delta.num_tokens_used
        self.stopped = delta.stopped
        return ChoiceDelta(self.index, delta.text)

    def finish(self, event: FinishedEvent) -> ChoiceDelta:
        """The last delta. Errors: ApiError 500 where the engine failed on the request."""
        self.finished, self.stats, self.timings = True, event.stats, event.timings
        if event.reason is FinishReason.FAILED:
            logger.error("request %s failed: %s", self.request.request_id, event.error)
            raise internal_error(self.request.request_id)
        rest = "" if self.stopped else self.output.flush().text
        reason = "length" if event.reason is FinishReason.LENGTH and not self.output.matcher.stopped else "stop"
        self.log(reason)
        return ChoiceDelta(self.index, rest, reason)

    def log(self, reason: str) -> None:
        """One line for each finished request; never its text."""
        timings = self.timings
        first = timings.first_token - timings.submitted if timings.first_token is not None else 0.0
        logger.info(
            "request %s: %d prompt and %d output tokens, ttft %.3f s, %.1f tokens/s, acceptance length %.2f, %s",
            self.request.request_id, len(self.request.prompt_ids), self.num_tokens, first,
            rate(self.num_tokens - 1, timings.decode_s), self.stats.acceptance_length, reason,
        )  # fmt: skip


class Generation:
    """Submits a call's requests, merges their events, and cancels what is unfinished when it is closed.

    choices: prompt-major, so the choice ``c`` of prompt ``p`` has index ``p * n + c``.
    """

    def __init__(self, serving: Serving, model: ServedModel, requests: Sequence[Request], stops: Sequence[str]) -> None:
        self.serving = serving
        self.engine: EngineHandle = model.engine
        self.dispatcher = serving.dispatcher
        self.choices = {
            request.request_id: Choice(index, request, TextOutput(model.codec, stops))
            for index, request in enumerate(requests)
        }
        self.events: asyncio.Queue[Event] = self.dispatcher.open(self.choices)
        try:
            for request in requests:
                self.engine.submit(request)
        except BaseException:
            self.close()
            raise

    async def deltas(self, keepalive_s: float) -> AsyncGenerator[ChoiceDelta | None, None]:
        """Every delta of every choice as it comes; None after ``keepalive_s`` of silence. Errors: the choices' own."""
        num_open = len(self.choices)
        while num_open:
            try:
                async with asyncio.timeout(keepalive_s):
                    event = await self.events.get()
            except TimeoutError:
                if not self.engine.alive:
                    raise EngineStopped("The engine has stopped; restart the server.") from None
                yield None
                continue
            choice = self.choices[event.request_id]
            if isinstance(event, FinishedEvent):
                if event.reason is FinishReason.CANCELLED and not choice.stopped:
                    raise self.serving.interruption()
                num_open -= 1
                yield choice.finish(event)
                continue
            delta = choice.add(event)
            if choice.stopped:
                self.engine.cancel(event.request_id)
            if delta.text:
                yield delta

    def close(self) -> None:
        """Cancel what still runs and stop listening. May be called again."""
        self.dispatcher.close(self.choices)
        for choice in self.choices.values():
            if not choice.finished:
                choice.finished = True
                self.engine.cancel(choice.request.request_id)

    def usage(self) -> dict[str, int]:
        """OpenAI's counts so far: a prompt counts once whatever its number of choices."""
        prompt = sum(len(choice.request.prompt_ids) for choice in self.choices.values() if choice.request.choice == 0)
        completion = sum(choice.num_tokens for choice in self.choices.values())
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def timings(self) -> dict[str, float | int]:
        """Draft statistics and times of all choices together."""
        choices = list(self.choices.values())
        return timings_json([c.stats for c in choices], [c.timings for c in choices], [c.num_tokens for c in choices])
