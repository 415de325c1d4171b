"""POST /v1/completions: text in, its continuation out."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from server.api.errors import InvalidValue, UnsupportedParameter
from server.api.fields import check_fields
from server.api.gate import require_json
from server.api.language.answer import Reply
from server.api.language.choices import ChoicesWire
from server.api.language.generation import Generation
from server.api.language.pieces import Answer, Piece, TextPiece
from server.api.language.prompts import answer_limit, plan_requests
from server.api.language.schemas import CompletionBody
from server.api.language.structured import grammar_for
from server.api.openapi import ASKING
from server.api.serving import CurrentServing
from server.engine.report import timings_json
from server.engine.request import ContextTooLong
from server.engine.stop import TextOutput
from server.text import TextCodec

DEFAULT_MAX_TOKENS = 16

router = APIRouter(dependencies=[Depends(require_json)], responses=ASKING)


@dataclass(frozen=True)
class CompletionChoices:
    """Choices of a text completion. ``echoes``: the prompt's text for each choice, empty without echo."""

    echoes: tuple[str, ...]
    id_prefix: str = "cmpl-"
    object_name: str = "text_completion"
    chunk_object_name: str = "text_completion"

    def whole(self, index: int, answer: Answer) -> dict[str, Any]:
        """A complete choice, the echoed prompt first."""
        return self._entry(index, self.echoes[index] + answer.text, answer.finish_reason)

    def opening(self, index: int) -> dict[str, Any] | None:
        """The echoed prompt."""
        return self._entry(index, self.echoes[index], None) if self.echoes[index] else None

    def piece(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Text as it comes; a completion has no other pieces."""
        return [self._entry(index, piece.text, None)] if isinstance(piece, TextPiece) else []

    def closing(self, index: int, finish_reason: str) -> dict[str, Any]:
        """No text, and the reason."""
        return self._entry(index, "", finish_reason)

    def _entry(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"text": text, "index": index, "logprobs": None, "finish_reason": finish_reason}


@router.post("/v1/completions")
async def create_completion(body: CompletionBody, request: HttpRequest, serving: CurrentServing) -> Response:
    """Continue one or several prompts."""
    check_fields(body, request, serving)
    check_best_of(body)
    model = serving.model_named(body.model)
    body.check_token_ids(model.codec.vocab_size)
    prompts = await asyncio.to_thread(encode_prompts, model.codec, body)
    check_room(prompts, body.max_tokens, model.context_length)
    echoes = await asyncio.to_thread(echo_texts, model.codec, body)
    wire = ChoicesWire.to(body, model.name, CompletionChoices(echoes))
    if body.max_tokens == 0:
        return only_echo(wire, prompts, body, model.context_length)
    requests = plan_requests(
        wire.id,
        prompts,
        body,
        model,
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        max_requests=serving.settings.max_waiting,
        grammar=await grammar_for(body, (), serving, model),
    )
    outputs = [TextOutput(model.codec, body.stop, request.prompt_ids) for request in requests]
    generation = Generation(serving, model, requests, outputs)
    return await Reply(wire, generation, serving.settings.keepalive_s).send(request, stream=body.stream)


def check_best_of(body: CompletionBody) -> None:
    """Refuse ``best_of`` other than ``n``: picking among hidden answers is not offered."""
    if body.best_of is not None and body.best_of != body.num_choices:
        message = f"best_of is {body.best_of}; only null or the value of n ({body.num_choices}) is supported."
        raise UnsupportedParameter("best_of", message)


def encode_prompts(codec: TextCodec, body: CompletionBody) -> list[list[int]]:
    """Token ids of every prompt; ids that were sent are taken as they are, nothing is put before them."""
    prompts = [codec.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompt]
    if not all(prompts):
        raise InvalidValue("prompt", "A prompt has no tokens; send more text.")
    return prompts


def check_room(prompts: list[list[int]], max_tokens: int | None, context_length: int) -> None:
    """Refuse a count of tokens that is smaller than the context and does not fit behind a prompt.

    OpenAI's completions refuse it too: who names such a count means it. The whole context or more (clients send 4096
    always) is read as "as much as fits", and so is every count of a chat. Errors: ContextTooLong.
    """
    if max_tokens is None or max_tokens >= context_length:
        return
    longest = max(map(len, prompts))
    if longest + max_tokens > context_length:
        raise ContextTooLong(longest, max_tokens, context_length)


def echo_texts(codec: TextCodec, body: CompletionBody) -> tuple[str, ...]:
    """The text to put before each choice."""
    if not body.echo:
        return ("",) * (len(body.prompt) * body.num_choices)
    texts = [prompt if isinstance(prompt, str) else codec.decode(prompt) for prompt in body.prompt]
    return tuple(text for text in texts for _ in range(body.num_choices))


def only_echo(wire: ChoicesWire, prompts: list[list[int]], body: CompletionBody, context_length: int) -> Response:
    """max_tokens 0 with echo: the prompts come back; the engine is not asked."""
    for prompt in prompts:
        answer_limit(len(prompt), 0, DEFAULT_MAX_TOKENS, context_length)
    if body.stream:
        raise UnsupportedParameter("stream", "max_tokens 0 has nothing to stream; leave stream out.")
    num_tokens = sum(len(prompt) for prompt in prompts)
    usage = {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens}
    choices = [
        wire.format.whole(index, Answer(finish_reason="length")) for index in range(len(prompts) * body.num_choices)
    ]
    return JSONResponse(wire.head() | {"choices": choices, "usage": usage, "timings": timings_json([], [], [])})
