"""Request bodies: the fields this server honours, their types and ranges."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from server.api.errors import InvalidValue, UnsupportedParameter, shown
from server.engine.request import SamplingParams
from server.text import check_text

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_CHOICES = 128

Text = Annotated[str, AfterValidator(check_text)]
TokenIds = list[int]


def parse_prompts(value: Any) -> list[str] | list[TokenIds]:
    """The four shapes of ``prompt`` as a list of texts or of token-id lists."""
    prompts = [value] if isinstance(value, str) or is_id_list(value) else value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(
            "send a text, a list of texts, a list of token ids, or a list of such lists; none may be empty"
        )
    texts = all(isinstance(prompt, str) for prompt in prompts)
    if not texts and not all(is_id_list(prompt) for prompt in prompts):
        raise ValueError("send either texts or lists of token ids (whole numbers), not a mixture of types")
    if not all(prompts):
        raise ValueError("a prompt is empty; send at least one character or token id")
    return [check_text(prompt) for prompt in prompts] if texts else prompts


def is_id_list(value: Any) -> bool:
    """Whether a value is a list of whole numbers; an empty one counts."""
    return isinstance(value, list) and all(type(token_id) is int for token_id in value)


def parse_stops(value: Any) -> list[str]:
    """``stop`` as a list: one string, several, or null."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("send a text or a list of texts")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"{len(stops)} stop strings were given; at most {MAX_STOPS} are allowed")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise ValueError(f"every stop string must have 1 to {MAX_STOP_CHARS} characters")
    return [check_text(stop) for stop in stops]


def parse_logit_bias(value: Any) -> dict[int, float]:
    """``logit_bias``: token ids, as JSON object keys, to -100 .. 100."""
    entries = {} if value is None else value
    if not isinstance(entries, dict):
        raise ValueError('send an object such as {"50256": -100}')
    if len(entries) > MAX_LOGIT_BIASES:
        raise ValueError(f"{len(entries)} entries were given; at most {MAX_LOGIT_BIASES} are allowed")
    for key, bias in entries.items():
        if not re.fullmatch(r"[0-9]{1,9}", str(key)):
            raise ValueError("every key must be a token id written in digits")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError("every value must be a number from -100 to 100")
    return {int(key): float(bias) for key, bias in entries.items()}


class Body(BaseModel):
    """Strict types, finite numbers; what is not declared is kept and judged by ``fields.check_extra_fields``."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(Body):
    """include_usage: a closing chunk with the usage; continuous_usage_stats: running counts on every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Speculative(Body):
    """Extension. ``enabled`` false asks for plain decoding of this request."""

    enabled: bool | None = None


class GenerationBody(Body):
    """What completions and chat completions share; null means the default everywhere."""

    model: Text
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Annotated[list[str], BeforeValidator(parse_stops)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    logit_bias: Annotated[dict[int, float], BeforeValidator(parse_logit_bias)] = {}
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    top_k: int | None = Field(None, ge=-1, description="0 or -1: all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool | None = None
    speculative: Speculative | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise InvalidValue("stream_options", "stream_options is allowed only with stream: true.")
        return self

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def wants_draft(self) -> bool:
        """Whether drafting may be used."""
        return self.speculative is None or self.speculative.enabled is not False

    def sampling(self) -> SamplingParams:
        """The sampling fields, defaults filled in."""
        names = (
            "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParams(top_k=max(self.top_k or 0, 0), logit_bias=self.logit_bias, **given)

    def stop_ids(self, model_stop_ids: frozenset[int]) -> frozenset[int]:
        """Ids that end the text: the model's, unless ignored, and the request's."""
        own = frozenset(self.stop_token_ids or ())
        return own if self.ignore_eos else own | model_stop_ids

    def check_token_ids(self, vocab_size: int) -> None:
        """Refuse ids outside the vocabulary."""
        check_ids("stop_token_ids", self.stop_token_ids or (), vocab_size)
        check_ids("logit_bias", tuple(self.logit_bias), vocab_size)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[list[str] | list[TokenIds], BeforeValidator(parse_prompts)]
    echo: bool | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _zero_only_with_echo(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidValue("max_tokens", "max_tokens is 0, which only echo: true allows; ask for at least 1.")
        return self

    def check_token_ids(self, vocab_size: int) -> None:
        """Refuse ids outside the vocabulary, the prompt's included."""
        super().check_token_ids(vocab_size)
        for prompt in self.prompt:
            if not isinstance(prompt, str):
                check_ids("prompt", prompt, vocab_size)


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: Text


def parse_content(value: Any) -> str:
    """A message's content as one text; parts are joined by newlines."""
    if isinstance(value, str):
        return check_text(value)
    if not isinstance(value, list) or not value:
        raise ValueError("send a text, or a list of parts of type text")
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError("every part must be an object with a type, such as {'type': 'text', 'text': '...'}")
        if part["type"] != "text":
            kind = shown(part["type"])
            raise UnsupportedParameter("messages", f"Content parts of type {kind} are not supported; send type text.")
    return "\n".join(TextPart.model_validate(part).text for part in value)


class Message(Body):
    """One turn. ``developer`` is the newer name of ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(parse_content)]
    name: Text | None = None

    def for_template(self) -> dict[str, str]:
        """The turn as chat templates know it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content} | ({} if self.name is None else {"name": self.name})


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @field_validator("messages", mode="before")
    @classmethod
    def _no_tool_turns(cls, value: Any) -> Any:
        for index, turn in enumerate(value if isinstance(value, list) else []):
            if isinstance(turn, dict) and turn.get("role") in ("tool", "function"):
                param = f"messages.{index}.role"
                raise UnsupportedParameter(param, f"{param} is {turn['role']}; this server does not support tools.")
        return value

    @model_validator(mode="after")
    def _one_limit(self) -> ChatBody:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidValue("max_tokens", "max_tokens and max_completion_tokens differ; send one of them.")
        return self


def check_ids(param: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Errors: InvalidValue naming the first id outside the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidValue(param, f"{param} holds the token id {token_id}; allowed are 0 to {vocab_size - 1}.")
