"""The wire format of answers that are lists of choices: completions and chat completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.api.errors import ApiError
from server.api.language.generation import Generation
from server.api.language.pieces import Answer, Piece
from server.api.language.schemas import GenerationBody
from server.api.sse import DONE, event


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

    def whole(self, index: int, answer: Answer) -> dict[str, Any]:
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

    @classmethod
    def to(cls, body: GenerationBody, model: str, format: ChoiceFormat) -> ChoicesWire:
        """The answer that this body asks for."""
        options = body.stream_options
        return cls(format, model, options.include_usage, options.include_usage and options.continuous_usage_stats)

    def whole(self, answers: Sequence[Answer], generation: Generation) -> dict[str, Any]:
        """A complete answer."""
        choices = [self.format.whole(index, answer) for index, answer in enumerate(answers)]
        return self.head() | {"choices": choices, "usage": generation.usage(), "timings": generation.timings()}

    def begin(self, generation: Generation) -> list[bytes]:
        """What the format sends first, for each choice."""
        openings = [self.format.opening(index) for index in range(len(generation.choices))]
        return [event(self._chunk(generation, opening)) for opening in openings if opening is not None]

    def pieces(self, index: int, pieces: Sequence[Piece], generation: Generation) -> list[bytes]:
        """A chunk for each piece."""
        entries = [entry for piece in pieces for entry in self.format.piece(index, piece)]
        return [event(self._chunk(generation, entry)) for entry in entries]

    def finish(self, index: int, answer: Answer, generation: Generation) -> list[bytes]:
        """The reason; with the last choice the timings, unless the usage follows."""
        self.num_finished += 1
        chunk = self._chunk(generation, self.format.closing(index, str(answer.finish_reason)))
        is_last = self.num_finished == len(generation.choices) and not self.include_usage
        return [event(chunk | {"timings": generation.timings()} if is_last else chunk)]

    def end(self, generation: Generation) -> list[bytes]:
        """The usage where it is wanted, and [DONE]."""
        if not self.include_usage:
            return [DONE]
        figures = {"choices": [], "usage": generation.usage(), "timings": generation.timings()}
        return [event(self.head(chunk=True) | figures), DONE]

    def error(self, error: ApiError) -> bytes:
        """The error object; no [DONE] follows."""
        return event(error.body())

    def _chunk(self, generation: Generation, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = self.head(chunk=True) | {"choices": [choice]}
        if self.include_usage:
            chunk["usage"] = generation.usage() if self.continuous_usage else None
        return chunk

    def head(self, *, chunk: bool = False) -> dict[str, Any]:
        """What every object of this answer begins with."""
        return {
            "id": self.format.id_prefix + self.id,
            "object": self.format.chunk_object_name if chunk else self.format.object_name,
            "created": self.created,
            "model": self.model,
        }
