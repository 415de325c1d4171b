"""The running requests of one API call: tokens in from the engine, text out, counts and timings at the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from server.api.errors import internal_error
from server.api.serving import EngineHandle, ServedModel, Serving
from server.engine.completion import Completion, Completions
from server.engine.report import rate, timings_json
from server.engine.request import (
    DraftStats,
    EngineStopped,
    Event,
    FinishedEvent,
    FinishReason,
    Request,
    Timings,
)
from server.engine.stop import TextOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChoiceDelta:
    """What one round added to a choice; ``finish_reason`` is set once, on its last delta."""

    index: int
    text: str
    finish_reason: str | None = None


@dataclass(frozen=True)
class Choice:
    """One choice: its number in the answer, and what the engine has given for it."""

    index: int
    completion: Completion

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


class Generation:
    """Submits a call's requests, merges their events, and cancels what is unfinished when it is closed.

    choices: prompt-major, so the choice ``c`` of prompt ``p`` has index ``p * n + c``. outputs: where the text of each
    request comes from.
    """

    def __init__(
        self, serving: Serving, model: ServedModel, requests: Sequence[Request], outputs: Sequence[TextOutput]
    ) -> None:
        self.serving = serving
        self.engine: EngineHandle = model.engine
        self.dispatcher = serving.dispatcher
        self.choices = {
            request.request_id: Choice(index, Completion(request, output))
            for index, (request, output) in enumerate(zip(requests, outputs, strict=True))
        }
        self.running = Completions(choice.completion for choice in self.choices.values())
        self.events: asyncio.Queue[Event] = self.dispatcher.open(self.choices)
        try:
            for request in requests:
                self.engine.submit(request)
        except BaseException:
            self.close()
            raise

    async def deltas(self, keepalive_s: float) -> AsyncGenerator[ChoiceDelta | None, None]:
        """Every delta of every choice as it comes; None after ``keepalive_s`` of silence. Errors: the choices' own."""
        while self.running.num_open:
            try:
                async with asyncio.timeout(keepalive_s):
                    event = await self.events.get()
            except TimeoutError:
                if not self.engine.alive:
                    raise EngineStopped("The engine has stopped; restart the server.") from None
                yield None
                continue
            completion, delta = self.running.take(event)
            if isinstance(event, FinishedEvent):
                self.check(completion, event)
                self.choices[event.request_id].log(str(delta.finish_reason))
            elif completion.stopped:
                self.engine.cancel(event.request_id)
            if delta.text or delta.finish_reason:
                yield ChoiceDelta(self.choices[event.request_id].index, delta.text, delta.finish_reason)

    def check(self, completion: Completion, event: FinishedEvent) -> None:
        """Errors: ApiError 500 where the engine failed on the request, NotServing where it was cancelled by no client.

        What failed is logged here and not told to the client.
        """
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

    def timings(self) -> dict[str, float | int]:
        """Draft statistics and times of all choices together."""
        figures = [choice.figures() for choice in self.choices.values()]
        num_tokens = [choice.num_tokens for choice in self.choices.values()]
        return timings_json([stats for stats, _ in figures], [timings for _, timings in figures], num_tokens)
