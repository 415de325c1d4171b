"""Many pictures through their models: the one place where rows of different requests become a network's batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vision.images import ImageError, Picture
from vision.serving.protocol import Answer, Answering, Ask, Model, Network, Outputs

# Rows that a network is given at once; more take turns, so that memory does not grow with the faces of an image.
MAX_ROWS = 32
# Decoded pixels that unfinished requests may hold together before the next image is decoded.
MAX_HELD_PIXELS = 26_000_000


@dataclass
class Request:
    """A picture's way through its model.

    ``open`` decodes it and says how many pixels its model keeps meanwhile; an ImageError of it, or of the answering
    itself, is the ``answer``.
    """

    open: Callable[[], tuple[Answering, int]]
    answering: Answering | None = None
    ask: Ask | None = None
    answer: Answer | ImageError | None = None
    pixels: int = 0
    opening_s: float = 0.0
    network_s: float = 0.0

    def start(self) -> None:
        """To the first question."""
        started = time.perf_counter()
        try:
            self.answering, self.pixels = self.open()
        except ImageError as error:
            self.answer = error
        else:
            self.advance(None)
        self.opening_s = time.perf_counter() - started

    def advance(self, outputs: Outputs | None) -> None:
        """To the next question, or to the answer."""
        assert self.answering is not None
        try:
            self.ask = next(self.answering) if outputs is None else self.answering.send(outputs)
        except StopIteration as end:
            self.answer, self.ask, self.pixels = end.value, None, 0
        except ImageError as error:
            self.answer, self.ask, self.pixels = error, None, 0


def answer_all(requests: Sequence[Request]) -> None:
    """Bring every request to its answer.

    Images are opened while those that wait hold few pixels; then all their questions to one network run together.
    """
    waiting: list[Request] = []
    unopened = list(requests)
    while unopened or waiting:
        while unopened and (not waiting or sum(entry.pixels for entry in waiting) < MAX_HELD_PIXELS):
            request = unopened.pop(0)
            request.start()
            waiting += [request] if request.ask is not None else []
        asked: dict[tuple[Network, tuple[int, ...]], list[Request]] = {}
        for request in waiting:
            assert request.ask is not None
            asked.setdefault((request.ask.network, request.ask.rows.shape[1:]), []).append(request)
        for (network, _), group in asked.items():
            exchange(network, group)
        waiting = [request for request in waiting if request.ask is not None]


def exchange(network: Network, group: Sequence[Request]) -> None:
    """Run the rows of ``group`` and hand every request its outputs and its share of the time."""
    rows = [request.ask.rows for request in group if request.ask is not None]
    started = time.perf_counter()
    outputs = run_rows(network, rows)
    seconds = (time.perf_counter() - started) / len(group)
    ends = np.cumsum([len(part) for part in rows])
    for request, end, part in zip(group, ends, rows, strict=True):
        request.network_s += seconds
        request.advance([output[end - len(part) : end] for output in outputs])


def run_rows(network: Network, parts: Sequence[Any]) -> Outputs:
    """The outputs for all rows of ``parts``, one behind the other."""
    rows = np.concatenate(parts)
    answers = [network.run(rows[start : start + MAX_ROWS]) for start in range(0, len(rows), MAX_ROWS)]
    return [np.concatenate(outputs) for outputs in zip(*answers, strict=True)]


def answer_pictures(model: Model, pictures: Sequence[Picture], options: Mapping[str, Any]) -> list[Answer]:
    """Answers of one model for decoded pictures.

    Errors: ModelError for options that are not its own, ImageError for a picture of which they ask too much.
    """
    requests = [Request(partial(opened, model, picture, options)) for picture in pictures]
    answer_all(requests)
    answers: list[Answer] = []
    for request in requests:
        if isinstance(request.answer, ImageError):
            raise request.answer
        assert request.answer is not None
        answers.append(request.answer)
    return answers


def opened(model: Model, picture: Picture, options: Mapping[str, Any]) -> tuple[Answering, int]:
    """A decoded picture on its way; its caller holds it anyway."""
    return model.answer(picture, options), 0
