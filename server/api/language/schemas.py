"""Request bodies of completions: the fields this server honours, their types and ranges."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from server.api.body import Body, NeutralValues, RequestBody, Text, WholeNumber
from server.api.errors import InvalidValue, shown
from server.engine.request import SamplingParams
from server.text import check_text

MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_CHOICES = 128
MAX_DEADLINE_MS = 24 * 3600 * 1000
MAX_SALT_CHARS = 256
MAX_LOGPROBS = 20
AS_MUCH_AS_FITS = -1

TokenIds = list[int]
CacheSalt = Annotated[
    Text,
    Field(max_length=MAX_SALT_CHARS, description="Prompts already read are shared only among requests with this one."),
]


Priority = Annotated[
    WholeNumber,
    Field(ge=-(2**31), le=2**31 - 1, description="Smaller numbers go first, and take the place of larger ones."),
]
Deadline = Annotated[
    WholeNumber,
    Field(
        ge=1,
        le=MAX_DEADLINE_MS,
        description="Milliseconds until the first token is wanted; orders the queue, cancels nothing.",
    ),
]


def parse_prompts(value: Any) -> list[str | TokenIds]:
    """The shapes of ``prompt`` as a list, each entry a text or token ids."""
    prompts = [value] if isinstance(value, str) or (value and is_id_list(value)) else value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("send a text, token ids, or a list of such")
    if not all(isinstance(prompt, str) or is_id_list(prompt) for prompt in prompts):
        raise ValueError("each prompt is a text or a list of token ids (whole numbers), not a mixture within one")
    return [check_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def is_id_list(value: Any) -> bool:
    """Whether a value is a list of whole numbers; an empty one counts."""
    return isinstance(value, list) and all(type(token_id) is int for token_id in value)


def parse_stops(value: Any) -> list[str]:
    """``stop`` as a list: one string, or several. An empty one, which stops nothing, is dropped."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("send a text or a list of texts")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"{len(stops)} stop strings were given; at most {MAX_STOPS} are allowed")
    if any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise ValueError(f"a stop string may have at most {MAX_STOP_CHARS} characters")
    return [check_text(stop) for stop in stops if stop]


def parse_logit_bias(value: Any) -> dict[int, float]:
    """``logit_bias``: token ids, as JSON object keys or in pairs, to -100 .. 100."""
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        value = {str(token_id): bias for token_id, bias in value}
    if not isinstance(value, dict):
        raise ValueError('send an object such as {"50256": -100}')
    if len(value) > MAX_LOGIT_BIASES:
        raise ValueError(f"{len(value)} entries were given; at most {MAX_LOGIT_BIASES} are allowed")
    for key, bias in value.items():
        if not re.fullmatch(r"[0-9]{1,9}", str(key)):
            raise ValueError(f"the key {shown(key)} is no token id; write it in digits")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the value of {key} must be a number from -100 to 100")
    return {int(key): float(bias) for key, bias in value.items()}


class StreamOptions(Body):
    """include_usage: a closing chunk with the usage; continuous_usage_stats: with it, running counts on every chunk."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})  # pads events, changes no text

    include_usage: bool = Field(default=False, description="A closing chunk without choices holds the usage.")
    continuous_usage_stats: bool = Field(
        default=False, description="With include_usage: every chunk holds the counts so far."
    )


class Speculative(Body):
    """Extension: how this request is drafted for. It changes the speed, never the text."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"n_min", "p_min"})  # when llama.cpp drafts at all

    enabled: bool = Field(default=True, description="false: plain decoding")
    max_rows: WholeNumber | None = Field(
        default=None, ge=1, description="Rows of a verify pass, the root included; 1 is plain."
    )
    n_max: WholeNumber | None = Field(
        default=None, ge=0, description="Drafts of a verify pass, which is a row less: llama.cpp's name."
    )
    lookup: bool = Field(default=True, description="false: no drafts are copied from the text itself")

    @property
    def most_rows(self) -> int | None:
        """Rows that a verify pass of the request may have; None: as many as pay."""
        limits = [self.max_rows, None if self.n_max is None else self.n_max + 1]
        return min((limit for limit in limits if limit is not None), default=None)


class GenerationBody(RequestBody):
    """What completions and chat completions share."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
            "parallel_tool_calls", "cache_prompt", "store",
        }
    )  # fmt: skip
    neutral: ClassVar[NeutralValues] = {"include_stop_str_in_output": (False,)}

    model: Text | None = Field(None, description="Left out: the language model this server has.")
    max_tokens: WholeNumber | None = Field(
        None, ge=AS_MUCH_AS_FITS, description="Tokens of the answer; cut to what the context leaves; -1: all of that."
    )
    temperature: float | None = Field(
        None, ge=0, le=2, description="0: always the likeliest token; left out: the model's own."
    )
    top_p: float | None = Field(
        None, ge=0, le=1, description="The likeliest tokens of so much probability in all; left out: the model's own."
    )
    n: WholeNumber | None = Field(None, ge=1, le=MAX_CHOICES, description="Answers to each prompt; left out: 1.")
    stop: Annotated[list[str], BeforeValidator(parse_stops, json_schema_input_type=str | list[str])] = Field(
        [], description=f"Texts that end the answer, which holds none: {MAX_STOPS} of {MAX_STOP_CHARS} characters."
    )
    stream: bool = Field(False, description="true: server-sent events, the last of them [DONE].")
    stream_options: StreamOptions = Field(StreamOptions(), description="What a stream tells beside its text.")
    seed: WholeNumber | None = Field(
        None, ge=-(2**63), le=2**63 - 1, description="The same seed gives the same text; left out: drawn anew."
    )
    logit_bias: Annotated[
        dict[int, float],
        BeforeValidator(parse_logit_bias, json_schema_input_type=dict[str, float] | list[list[float]]),
    ] = Field({}, description=f"Token ids with what is added to their logits, -100 to 100; at most {MAX_LOGIT_BIASES}.")
    presence_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="Subtracted from the logit of every token the answer holds; left out: the model's own.",
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="The same for every time it holds the token; left out: the model's own."
    )
    top_k: WholeNumber | None = Field(
        None, ge=-1, description="So many of the likeliest tokens; 0 or -1: all; left out: the model's own."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="Tokens of at least this share of the likeliest one's probability."
    )
    typical_p: float | None = Field(None, gt=0, le=1, description="Locally typical sampling; 1: all tokens.")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=10, description="Logits of tokens in prompt and answer are divided by it; 1: none."
    )
    stop_token_ids: list[WholeNumber] = Field(
        [], max_length=MAX_STOP_TOKEN_IDS, description="Token ids that end the answer, beside the model's own."
    )
    ignore_eos: bool = Field(False, description="The model's own end of text does not end the answer.")
    min_tokens: WholeNumber = Field(0, ge=0, description="Tokens before the model may end the text.")
    priority: Priority = 0
    deadline_ms: Deadline | None = None
    skip_special_tokens: bool = Field(True, description="false: special tokens are part of the text.")
    prompt_logprobs: WholeNumber | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Log-probabilities of the prompt's tokens, with so many alternatives."
    )
    return_token_ids: bool = Field(False, description="Choices hold the token ids of the prompt and of the answer.")
    return_drafted: bool = Field(
        False, description="Each choice has tokens: the text of each, and whether it was an accepted draft."
    )
    return_tokens_as_token_ids: bool = Field(False, description="Log-probabilities name tokens as token_id:N.")
    truncate_prompt_tokens: WholeNumber | None = Field(
        None, ge=-1, description="Only so many of the prompt's last tokens; -1: as many as the context leaves room for."
    )
    response_format: dict[str, Any] | None = Field(None, description="type text, json_object or json_schema")
    structured_outputs: dict[str, Any] | None = Field(None, description="json, regex, choice, grammar or json_object")
    guided_json: dict[str, Any] | str | None = Field(None, description="A JSON schema that the answer follows.")
    guided_regex: str | None = Field(None, description="A regular expression that the whole answer matches.")
    guided_choice: list[str] | None = Field(None, description="Texts of which the answer is one.")
    guided_grammar: str | None = Field(None, description="A grammar that the answer follows, GBNF or Lark.")
    json_schema: dict[str, Any] | None = Field(None, description="The same as guided_json, under llama.cpp's name.")
    grammar: str | None = Field(None, description="The same as guided_grammar, under llama.cpp's name.")
    speculative: Speculative = Field(Speculative(), description="How the request is drafted for; never changes text.")
    return_metrics: bool = Field(False, description="metrics, and completion_tokens_details in the usage")
    cache_salt: CacheSalt = ""

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def num_shown_logprobs(self) -> int | None:
        """Alternatives told with each token of the answer; None: log-probabilities are not asked for."""
        return None

    @property
    def num_logprobs(self) -> int | None:
        """The same as the engine is asked for."""
        return self.num_shown_logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same of the prompt's tokens."""
        return self.prompt_logprobs

    @property
    def tells_tokens(self) -> bool:
        """Whether the answer tells of single tokens."""
        return self.num_logprobs is not None or self.return_token_ids or self.return_drafted

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """The sampling fields, the model's own where the request says nothing."""
        names = (
            "temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
            "seed",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)
        return dataclasses.replace(defaults, logit_bias=self.logit_bias, **given)

    def stop_ids(self, model_stop_ids: frozenset[int]) -> frozenset[int]:
        """Ids that end the text: the model's, unless ignored, and the request's."""
        own = frozenset(self.stop_token_ids)
        return own if self.ignore_eos else own | model_stop_ids

    @model_validator(mode="after")
    def _what_a_prompt_allows(self) -> GenerationBody:
        if self.truncate_prompt_tokens == 0:
            raise InvalidValue("truncate_prompt_tokens", "truncate_prompt_tokens is 0; at least 1 is needed, or -1.")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidValue("prompt_logprobs", "prompt_logprobs cannot be streamed; completions have echo for that.")
        return self

    def check_token_ids(self, vocab_size: int) -> None:
        """Refuse ids outside the vocabulary."""
        check_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        check_ids("logit_bias", tuple(self.logit_bias), vocab_size)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    neutral: ClassVar[NeutralValues] = GenerationBody.neutral | {"suffix": ("",)}

    prompt: Annotated[
        list[str | TokenIds],
        BeforeValidator(parse_prompts, json_schema_input_type=str | TokenIds | list[str | TokenIds]),
    ] = Field(description="A text, token ids, or a list of such; ids are taken as they are.")
    echo: bool = Field(False, description="The prompt stands before each answer.")
    logprobs: WholeNumber | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Log-probabilities, each with so many alternatives."
    )
    best_of: WholeNumber | None = Field(
        None, ge=1, le=MAX_CHOICES, description="So many answers are made, and the n likeliest a token are given."
    )

    @property
    def num_choices(self) -> int:
        """Answers made to each prompt."""
        return self.best_of or super().num_choices

    @property
    def num_shown_logprobs(self) -> int | None:
        """Alternatives told with each token."""
        return self.logprobs

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to each token; choosing among answers needs each token's own at least."""
        chooses = self.num_choices > (self.n or 1)
        return 0 if self.logprobs is None and chooses else self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The echoed prompt's as well."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in asked if number is not None), default=None)

    @model_validator(mode="after")
    def _fields_that_need_others(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidValue("max_tokens", "max_tokens is 0, which only echo: true allows; ask for at least 1.")
        if self.num_choices < (self.n or 1):
            raise InvalidValue("best_of", f"best_of is {self.best_of}, less than n, {self.n}.")
        if self.stream and self.num_choices > (self.n or 1):
            raise InvalidValue("best_of", "best_of above n cannot be streamed: the best is known at the end.")
        return self

    def check_token_ids(self, vocab_size: int) -> None:
        """Refuse ids outside the vocabulary, the prompt's included."""
        super().check_token_ids(vocab_size)
        for prompt in self.prompt:
            if not isinstance(prompt, str):
                check_ids("prompt", prompt, vocab_size)


def check_ids(param: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Errors: InvalidValue naming the first id outside the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidValue(
                param, f"{param} holds the token id {shown(token_id)}; allowed are 0 to {vocab_size - 1}."
            )
