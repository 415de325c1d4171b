"""POST /v1/completions: text in, its continuation out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from server.api.errors import InvalidValue
from server.api.fields import check_fields
from server.api.gate import require_json
from server.api.language.answer import Reply
from server.api.language.choices import ChoicesWire
from server.api.language.generation import Echo, Generation
from server.api.language.pieces import Answer, Piece, TextPiece
from server.api.language.prompts import plan_requests, text_output, truncated, view_of
from server.api.language.schemas import CompletionBody
from server.api.language.structured import grammar_for
from server.api.language.tokens import ShownToken, TokenView
from server.api.openapi import ASKING, success
from server.api.reading import JsonRoute, in_thread
from server.api.serving import CurrentServing, ServedModel
from server.engine.completion import Completion
from server.engine.request import ContextTooLong
from server.text import TextCodec

DEFAULT_MAX_TOKENS = 16

router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_json)], responses=ASKING)


@dataclass(frozen=True)
class CompletionChoices:
    """Choices of a text completion; an echoed prompt is the first of a choice's text."""

    view: TokenView
    prompt_logprobs: int | None = None
    id_prefix: str = "cmpl-"
    object_name: str = "text_completion"
    chunk_object_name: str = "text_completion"

    def whole(self, index: int, answer: Answer, completion: Completion) -> dict[str, Any]:
        """A complete choice."""
        entry = self._entry(index, answer.text, answer.finish_reason, answer.tokens)
        return entry | self.view.prompt(completion, self.prompt_logprobs)

    def opening(self, index: int) -> dict[str, Any] | None:  # noqa: ARG002
        """Nothing."""
        return None

    def piece(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Text as it comes; a completion has no other pieces."""
        return [self._entry(index, piece.text, None, piece.tokens)] if isinstance(piece, TextPiece) else []

    def closing(self, index: int, finish_reason: str) -> dict[str, Any]:
        """No text, and the reason."""
        return self._entry(index, "", finish_reason)

    def _entry(
        self, index: int, text: str, finish_reason: str | None, tokens: Sequence[ShownToken] = ()
    ) -> dict[str, Any]:
        entry = {"text": text, "index": index, "logprobs": self.view.of_text(tokens), "finish_reason": finish_reason}
        return entry | self.view.of_answer(tokens)


ANSWER = success(
    "The continuations.",
    streams=True,
    id=("string", "Of this answer."),
    object=("string", "text_completion"),
    created=("integer", "Unix time, seconds."),
    model=("string", "The model that answered."),
    choices=("array", "The answers, by index."),
    usage=("object", "Tokens of prompt and answers."),
    timings=("object", "Milliseconds, tokens a second, and what drafting did."),
)


@router.post("/v1/completions", responses=ANSWER)
async def create_completion(body: CompletionBody, request: HttpRequest, serving: CurrentServing) -> Response:
    """Continue one or several prompts."""
    check_fields(body, request, serving)
    model = serving.model_named(body.model)
    body.check_token_ids(model.codec.vocab_size)
    prompts = await in_thread(request, encode_prompts, model, body)
    check_room(prompts, body.max_tokens, model.context_length)
    wire = ChoicesWire.to(body, model, CompletionChoices(view_of(body, model.codec), body.prompt_logprobs))
    requests = plan_requests(
        wire.id,
        prompts,
        body,
        model,
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        max_requests=serving.settings.max_waiting,
        grammar=await grammar_for(body, None, serving, model),
    )
    outputs = [text_output(model.codec, body, each, each.prompt_ids) for each in requests]
    echoes = await in_thread(request, echoes_of, model.codec, body, prompts)
    generation = Generation(serving, model, requests, outputs, echoes, tells_tokens=body.tells_tokens)
    return await Reply(wire, generation, serving.settings.keepalive_s).send(request, stream=body.stream)


def encode_prompts(model: ServedModel, body: CompletionBody) -> list[list[int]]:
    """Token ids of every prompt; ids that were sent are taken as they are, nothing is put before them."""
    encoded = [model.codec.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompt]
    prompts = [truncated(prompt, body, model.context_length) for prompt in encoded]
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


def echoes_of(codec: TextCodec, body: CompletionBody, prompts: Sequence[Sequence[int]]) -> list[Echo]:
    """What is put before each choice; empty without echo."""
    if not body.echo:
        return []
    sent = [prompt if body.truncate_prompt_tokens is None else None for prompt in body.prompt]
    echoes = [echo_of(codec, text, ids) for text, ids in zip(sent, prompts, strict=True)]
    return [echo for echo in echoes for _ in range(body.num_choices)]


def echo_of(codec: TextCodec, sent: object, token_ids: Sequence[int]) -> Echo:
    """A prompt as it was sent, or as its ids read; with each token's share of that.

    A text comes back to the letter: special tokens that the codec put before it have no share, those written in it do.
    """
    is_text = isinstance(sent, str)
    decoder = codec.stream(skip_special_tokens=not is_text)
    shares = [decoder.push(token_id) for token_id in token_ids]
    shares[-1] += decoder.flush()
    text = "".join(shares)
    if not isinstance(sent, str):
        return Echo(text, token_ids, shares)
    for place, share in enumerate(shares):
        if len(text) <= len(sent) or not text.endswith(sent):
            break
        text, shares[place] = text[len(share) :], ""
    return Echo(sent, token_ids, shares)
