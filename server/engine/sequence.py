"""A request in the engine: its tokens, where it stands and what it gave so far. No torch here."""

from __future__ import annotations

import enum
import secrets
from dataclasses import dataclass, field
from typing import Any

from server.engine.calibration import RequestRecord
from server.engine.penalties import Penalties
from server.engine.request import DraftStats, FinishReason, Request, Timings


class Status(enum.Enum):
    """Where a request stands. Only PREFILLING and DECODING ones hold a slot."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    ENDED = "ended"


@dataclass(eq=False)
class RunningSequence:
    """Everything the engine knows of one request, from submission to its end.

    token_ids: every committed token, prompt first; num_rows: tokens whose rows the target holds; streamed: of those,
    the first ones that a device read in whole blocks; reserved: rows of the pool that are kept for it; seed: of its
    sampling, drawn when the request names none; held_slot: None while it waits and once it has ended; drafts: whether
    it is drafted for, as it asked and until its rows in the drafter are spoilt; num_ranked: tokens of its prompt whose
    log-probabilities were told; pooled: the sum of its last features so far; urgency: the scheduler's order, the
    smallest first; penalties: what its tokens take from the logits; record: how its drafts fared.
    """

    request: Request
    token_ids: list[int]
    seed: int
    drafts: bool
    penalties: Penalties
    status: Status = Status.WAITING
    held_slot: int | None = None
    num_rows: int = 0
    streamed: int = 0
    reserved: int = 0
    num_ranked: int = 0
    pooled: Any = None
    urgency: tuple[int, float, int] = (0, 0.0, 0)
    stats: DraftStats = field(default_factory=DraftStats)
    timings: Timings = field(default_factory=Timings)
    record: RequestRecord = field(default_factory=RequestRecord)

    @classmethod
    def of(cls, request: Request) -> RunningSequence:
        """A request that has just come in."""
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        return cls(request, list(request.prompt_ids), seed, request.draft, Penalties(request))

    @property
    def request_id(self) -> str:
        """The request's name."""
        return self.request.request_id

    @property
    def slot(self) -> int:
        """The slot it holds; only to be asked of one that runs."""
        assert self.held_slot is not None
        return self.held_slot

    @property
    def is_running(self) -> bool:
        """Whether it holds a slot."""
        return self.status in (Status.PREFILLING, Status.DECODING)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_output(self) -> int:
        """Tokens committed behind the prompt."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens the request may still get."""
        return self.request.max_tokens - self.num_output

    @property
    def num_readable(self) -> int:
        """Tokens to read before it decodes: its prompt, or all but the newest token where it has begun to answer."""
        return len(self.token_ids) - 1 if self.num_output else self.num_prompt

    def streamable(self, block: int) -> int:
        """Tokens of its prompt in whole blocks: of the prompt alone, so that nothing else decides who reads them."""
        return self.num_prompt // block * block if block else 0

    def read(self, num_tokens: int) -> None:
        """The target holds so many more rows of its text; behind the last one to read it decodes."""
        self.num_rows += num_tokens
        if self.num_rows == self.num_readable:
            self.status = Status.DECODING

    def commit(self, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], FinishReason | None]:
        """Append tokens up to the first stop id or the token limit; (what was appended, why it ends or None)."""
        for count, token_id in enumerate(token_ids, 1):
            self.token_ids.append(token_id)
            if token_id in self.request.stop_ids:
                return token_ids[:count], FinishReason.STOP
            if self.num_left == 0:
                return token_ids[:count], FinishReason.LENGTH
        return token_ids, None
