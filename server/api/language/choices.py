"""The wire format of answers that are lists of choices: completions and chat completions."""

from __future__ import annotations

import functools
import hashlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from server.api.errors import ApiError
from server.api.language.generation import Generation
from server.api.language.pieces import Answer, Piece
from server.api.language.schemas import GenerationBody
from server.api.language.tokens import ShownToken
from server.api.serving import ServedModel
from server.api.sse import DONE, ENCODER, event, line_event
from server.engine.completion import Completion
from server.installation import own_version

if TYPE_CHECKING:
    from server.targets.target import TargetInfo


class ChoiceFormat(Protocol):
    """How choices look on one route. Every method gives an entry of ``choices``; None means: send nothing."""

    @property
    def id_prefix(self) -> str:
        """What the answer's id begins with."""

    @property
    def object_name(self) -> str:
        """``object`` of a whole answer."""

    @property
    def chunk_object_name(self) -> str:
        """``object`` of a stream's chunk."""

    def whole(self, index: int, answer: Answer, completion: Completion) -> dict[str, Any]:
        """A complete choice."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream sends for a choice before its text."""

    def piece(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """A piece as it comes: one or several chunks."""

    def closing(self, index: int, finish_reason: str) -> dict[str, Any]:
        """The last entry of a choice."""


@dataclass
class ChoicesWire:
    """Identity and format of an answer, and what the stream was asked to carry."""

    format: ChoiceFormat
    model: str
    include_usage: bool = False
    continuous_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    num_finished: int = 0
    n: int = 1
    best_of: int = 1
    metrics: bool = False
    fingerprint: str = ""

    @classmethod
    def to(cls, body: GenerationBody, model: ServedModel, format: ChoiceFormat) -> ChoicesWire:
        """The answer that this body asks for."""
        usage = body.stream_options.include_usage
        continuous = usage and body.stream_options.continuous_usage_stats
        return cls(
            format,
            model.name,
            usage,
            continuous,
            n=body.n or 1,
            best_of=body.num_choices,
            metrics=body.return_metrics,
            fingerprint=fingerprint(model.info),
        )

    def whole(self, answers: Sequence[Answer], generation: Generation) -> dict[str, Any]:
        """A complete answer."""
        completions = [choice.completion for choice in generation.choices.values()]
        chosen = self.chosen(answers, len(completions))
        choices = [self.format.whole(index, answers[i], completions[i]) for index, i in enumerate(chosen)]
        return self.head() | {"choices": choices} | self.figures(generation)

    def chosen(self, answers: Sequence[Answer], count: int) -> list[int]:
        """Which answers are given, in order: of each prompt's ``best_of`` the ``n`` likeliest a token."""
        if self.best_of == self.n:
            return list(range(count))
        chosen: list[int] = []
        for first in range(0, count, self.best_of):
            places = range(first, first + self.best_of)
            chosen += sorted(places, key=lambda i: -mean_log_prob(answers[i].tokens))[: self.n]
        return chosen

    def begin(self, generation: Generation) -> list[bytes]:
        """What the format sends first, for each choice."""
        openings = [self.format.opening(index) for index in range(len(generation.choices))]
        return [self._chunk(generation, opening) for opening in openings if opening is not None]

    def pieces(self, index: int, pieces: Sequence[Piece], generation: Generation) -> list[bytes]:
        """A chunk for each piece."""
        return [self._chunk(generation, entry) for piece in pieces for entry in self.format.piece(index, piece)]

    def finish(self, index: int, answer: Answer, generation: Generation) -> list[bytes]:
        """The reason; with the last choice the timings, unless the usage follows."""
        self.num_finished += 1
        is_last = self.num_finished == len(generation.choices) and not self.include_usage
        more = f',"timings":{ENCODER.encode(generation.timings())}' if is_last else ""
        return [self._chunk(generation, self.format.closing(index, str(answer.finish_reason)), more)]

    def end(self, generation: Generation) -> list[bytes]:
        """The usage where it is wanted, and [DONE]."""
        if not self.include_usage:
            return [DONE]
        return [event(self.head(chunk=True) | {"choices": []} | self.figures(generation)), DONE]

    def figures(self, generation: Generation) -> dict[str, Any]:
        """What stands at the end: usage, timings and, where they are asked for, metrics."""
        usage, more = generation.usage(), dict[str, Any]()
        if self.metrics:
            usage["completion_tokens_details"] = generation.usage_details()
            more["metrics"] = generation.metrics()
        return {"usage": usage, "timings": generation.timings()} | more

    def error(self, error: ApiError) -> bytes:
        """The error object; no [DONE] follows."""
        return event(error.body())

    @functools.cached_property
    def chunk_head(self) -> str:
        """What every chunk's JSON begins with, up to its choice: made once, as there is one for every token."""
        return ENCODER.encode(self.head(chunk=True)).removesuffix("}") + ',"choices":['

    def _chunk(self, generation: Generation, choice: dict[str, Any], more: str = "") -> bytes:
        """A chunk of one choice; ``more`` follows it, as JSON."""
        if self.include_usage:
            more = f',"usage":{ENCODER.encode(generation.usage() if self.continuous_usage else None)}' + more
        return line_event(f"{self.chunk_head}{ENCODER.encode(choice)}]{more}}}")

    def head(self, *, chunk: bool = False) -> dict[str, Any]:
        """What every object of this answer begins with."""
        return {
            "id": self.format.id_prefix + self.id,
            "object": self.format.chunk_object_name if chunk else self.format.object_name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


@functools.cache
def fingerprint(info: TargetInfo) -> str:
    """Names what a seeded text depends on: this version and the target's weights as they are computed, no drafter."""
    parts = (own_version(), info.name, info.architecture, info.num_parameters, info.weights)
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def mean_log_prob(tokens: Sequence[ShownToken]) -> float:
    """Of an answer's tokens, the echoed prompt's left out."""
    values = [token.ranked.log_prob for token in tokens if token.ranked is not None and not token.is_echo]
    return sum(values) / max(len(values), 1)
