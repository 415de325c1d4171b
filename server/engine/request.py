"""A request as the engine sees it: prompt and sampling in, events out. No torch here."""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class EngineError(Exception):
    """Base of everything the engine refuses or fails with."""


class QueueFull(EngineError):
    """The waiting queue is at its bound. ``retry_after_s`` is an estimate for the client."""

    def __init__(self, limit: int, retry_after_s: float) -> None:
        super().__init__(
            f"{limit} requests are waiting already, the server's limit; try again in {retry_after_s:.0f} s"
        )
        self.retry_after_s = retry_after_s


class ContextTooLong(EngineError):
    """Prompt and requested tokens do not fit the context."""

    def __init__(self, prompt_tokens: int, max_tokens: int, context: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.context = context
        super().__init__(
            f"This model's maximum context length is {context} tokens. However, {prompt_tokens} tokens are in the "
            f"prompt and {max_tokens} were requested for the completion; shorten the prompt or lower max_tokens."
        )


class GrammarStuck(EngineError):
    """An answer's grammar leaves nothing that may follow, or takes too much work: what was asked for, not a fault."""


class EngineStopped(EngineError):
    """The engine no longer runs; the server must be restarted."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. temperature 0 is greedy.

    Applied in this order: logit bias and penalties on the logits, temperature, top-k, typical-p, top-p, min-p.
    ``seed`` None means: the server draws one for this request.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    @property
    def is_plain_greedy(self) -> bool:
        """Whether nothing here changes the order of the logits."""
        return (
            self.temperature == 0
            and not self.logit_bias
            and self.presence_penalty == 0
            and self.frequency_penalty == 0
            and self.repetition_penalty == 1
        )


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"
    STUCK = "stuck"


class TokenFilter(Protocol):
    """Says which tokens may follow an answer so far; ``server.engine.grammar.Grammar`` is one."""

    def allowed(self, output_ids: Sequence[int]) -> Any:
        """[vocabulary] booleans, as a numpy array. Errors: GrammarStuck."""
        ...

    def forced(self, output_ids: Sequence[int]) -> Sequence[int]:
        """Tokens that must follow, as far as there is no choice."""
        ...

    def follows(self, output_ids: Sequence[int], token_ids: Sequence[int]) -> int:
        """How many of these tokens may follow, from the first on."""
        ...


@dataclass(frozen=True)
class Request:
    """One choice of one API call. ``choice`` numbers the choices that share a prompt and a seed.

    stop_ids end the text when the target emits one of them; the stop id itself is the last token reported.
    max_tokens 0 reads the prompt and ends. ``draft`` False asks for plain decoding; max_rows: of its trees, the root
    included; lookup: whether drafts may be copied from its text. grammar: what the answer follows; min_tokens: before a
    stop id may come. num_logprobs: each answer token's log-probability is told with so many of the likeliest;
    prompt_logprobs: the same of the prompt's tokens; None: not told. pools: the prompt's features are told as one
    vector. Cached prompts are shared only among requests of one ``cache_salt``. priority: requests of a smaller number
    go first and may take the place of those of a larger one, which wait; deadline_s: seconds within which the first
    token is wanted, None: the longer the prompt, the later.
    """

    request_id: str
    prompt_ids: Sequence[int]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    choice: int = 0
    draft: bool = True
    grammar: TokenFilter | None = None
    min_tokens: int = 0
    num_logprobs: int | None = None
    prompt_logprobs: int | None = None
    pools: bool = False
    max_rows: int | None = None
    lookup: bool = True
    cache_salt: str = ""
    priority: int = 0
    deadline_s: float | None = None

    @property
    def wants_prompt_rows(self) -> bool:
        """Whether every row of the prompt must be read, though it be known."""
        return self.prompt_logprobs is not None or self.pools

    @property
    def takes_argmax(self) -> bool:
        """Whether the arg-max of the raw logits is the next token, so no logits need to be looked at."""
        return self.sampling.is_plain_greedy and self.grammar is None and self.min_tokens == 0


@dataclass
class DraftStats:
    """What drafting did for one request, and how much of its prompt was ``cached``.

    acceptance_length counts the target's own token of every round as well.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    committed: int = 0
    cached: int = 0

    @property
    def acceptance_length(self) -> float:
        """Tokens committed per verify pass."""
        return self.committed / self.rounds if self.rounds else 0.0


@dataclass
class Timings:
    """Moments of one request on the monotonic clock, in seconds."""

    submitted: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None

    @property
    def decode_s(self) -> float:
        """Seconds spent decoding after the first token."""
        if self.first_token is None or self.finished is None:
            return 0.0
        return self.finished - self.first_token


@dataclass(frozen=True)
class Ranked:
    """How likely the model found a token in its place: natural log-probability of the raw logits, before any sampling
    field. place: 1 is the likeliest; top: the likeliest tokens there with theirs, falling."""

    token_id: int
    log_prob: float
    place: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptEvent:
    """What a chunk of the prompt gave, where a request asks: its tokens' ranks in order, from the second token on."""

    request_id: str
    ranked: tuple[Ranked, ...]


@dataclass(frozen=True)
class PooledEvent:
    """The vector of a whole prompt [hidden], of length 1."""

    request_id: str
    vector: tuple[float, ...]


@dataclass(frozen=True)
class TokensEvent:
    """Tokens committed for a request in one round, in order; ``drafted[i]`` says whether token i was a draft.

    ``ranked``: one for each token where the request asks for log-probabilities, else empty.
    """

    request_id: str
    token_ids: tuple[int, ...]
    drafted: tuple[bool, ...]
    ranked: tuple[Ranked, ...] = ()


@dataclass(frozen=True)
class FinishedEvent:
    """The end of a request; nothing follows. ``error`` is set when the reason is FAILED or STUCK."""

    request_id: str
    reason: FinishReason
    stats: DraftStats
    timings: Timings
    error: str | None = None


Event = PromptEvent | PooledEvent | TokensEvent | FinishedEvent
