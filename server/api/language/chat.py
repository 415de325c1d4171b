"""POST /v1/chat/completions: a conversation in, the next turn out."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from server.api.fields import check_fields
from server.api.gate import require_json
from server.api.language.answer import Reply, Wire
from server.api.language.choices import ChoicesWire
from server.api.language.generation import Generation
from server.api.language.messages import ChatBody
from server.api.language.pieces import Answer, CallPiece, Piece, ReasoningPiece
from server.api.language.prompts import plan_requests, text_output, truncated, view_of
from server.api.language.schemas import AS_MUCH_AS_FITS
from server.api.language.structured import Calls, grammar_for, wanted
from server.api.language.tokens import ShownToken, TokenView
from server.api.language.tool_calls import GENERIC, HERMES, THINK, AnswerParser, CallFormat, call_format
from server.api.language.tools import Tool, chosen_tools, told_in_text
from server.api.openapi import ASKING, success
from server.api.reading import JsonRoute, in_thread
from server.api.serving import CurrentServing, ServedModel, Serving
from server.engine.completion import Completion
from server.text import TextCodec

NUM_TAIL = 16  # tokens of a prompt in which a template opens the reasoning

router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_json)], responses=ASKING)


@dataclass(frozen=True)
class ChatChoices:
    """Choices of a chat completion: the role first and once, then content, then an empty delta with the reason."""

    view: TokenView
    prompt_logprobs: int | None = None
    id_prefix: str = "chatcmpl-"
    object_name: str = "chat.completion"
    chunk_object_name: str = "chat.completion.chunk"

    def whole(self, index: int, answer: Answer, completion: Completion) -> dict[str, Any]:
        """A complete choice."""
        content = answer.text if answer.text or not answer.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [call_json(call) for call in answer.calls]
        choice = {"index": index, "message": message, "logprobs": self.view.of_chat(answer.tokens)}
        choice |= {"finish_reason": answer.finish_reason} | self.view.of_answer(answer.tokens)
        return choice | self.view.prompt(completion, self.prompt_logprobs)

    def opening(self, index: int) -> dict[str, Any] | None:
        """The role."""
        return self._entry(index, {"role": "assistant", "content": ""}, None)

    def piece(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Text as it comes; a call in two chunks, its name first."""
        if isinstance(piece, CallPiece):
            begun = call_json(piece, arguments="") | {"index": piece.index}
            rest = {"index": piece.index, "function": {"arguments": piece.arguments}}
            return [self._entry(index, {"tool_calls": [part]}, None) for part in (begun, rest)]
        name = "reasoning_content" if isinstance(piece, ReasoningPiece) else "content"
        return [self._entry(index, {name: piece.text}, None, piece.tokens)]

    def closing(self, index: int, finish_reason: str) -> dict[str, Any]:
        """An empty delta, and the reason."""
        return self._entry(index, {}, finish_reason)

    def _entry(
        self, index: int, delta: dict[str, Any], finish_reason: str | None, tokens: Sequence[ShownToken] = ()
    ) -> dict[str, Any]:
        entry = {"index": index, "delta": delta, "logprobs": self.view.of_chat(tokens), "finish_reason": finish_reason}
        return entry | self.view.of_answer(tokens)


def call_json(call: CallPiece, arguments: str | None = None) -> dict[str, Any]:
    """A call as the API writes it."""
    function = {"name": call.name, "arguments": call.arguments if arguments is None else arguments}
    return {"id": call.call_id, "type": "function", "function": function}


ANSWER = success(
    "The next turns.",
    streams=True,
    id=("string", "Of this answer."),
    object=("string", "chat.completion"),
    created=("integer", "Unix time, seconds."),
    model=("string", "The model that answered."),
    choices=("array", "The answers, by index."),
    usage=("object", "Tokens of prompt and answers."),
    timings=("object", "Milliseconds, tokens a second, and what drafting did."),
)


@router.post("/v1/chat/completions", responses=ANSWER)
async def create_chat_completion(body: ChatBody, request: HttpRequest, serving: CurrentServing) -> Response:
    """Answer a conversation. Without a limit the answer may fill the context."""
    check_fields(body, request, serving)
    model = serving.model_named(body.model)
    format = ChatChoices(view_of(body, model.codec), body.prompt_logprobs)
    return await answer_chat(body, model, ChoicesWire.to(body, model, format), request, serving)


async def answer_chat(
    body: ChatBody, model: ServedModel, wire: Wire, request: HttpRequest, serving: Serving
) -> Response:
    """What every route of conversations does: encode, generate, and write the answer the route's way."""
    body.check_token_ids(model.codec.vocab_size)
    tools, is_forced = chosen_tools(body.tools, body.tool_choice)
    format = GENERIC if is_forced else family_format(model.codec)
    calls = Calls(tools, format, is_forced, not body.parallel_tool_calls) if tools else None
    grammar = await grammar_for(body, calls, serving, model)
    prompt = await in_thread(request, chat_prompt, model.codec, body, tools)
    prompt = truncated(prompt, body, model.context_length)
    requests = plan_requests(
        uuid.uuid4().hex,
        [prompt],
        body,
        model,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        default_max_tokens=AS_MUCH_AS_FITS,
        max_requests=serving.settings.max_waiting,
        grammar=grammar,
    )
    shown = shown_markers(format.begin, tools)
    outputs = [text_output(model.codec, body, each, (), shown) for each in requests]
    generation = Generation(serving, model, requests, outputs, tells_tokens=body.tells_tokens)
    names = [tool.function.name for tool in tools]
    has_text = grammar is None or not (is_forced or wanted(body))  # other grammars leave no room for reasoning
    thinking = not body.continue_final_message and opens_reasoning(model.codec, prompt)

    def parser() -> AnswerParser:
        return AnswerParser(format, names, thinking=thinking and has_text, one_call=not body.parallel_tool_calls)

    reply = Reply(wire, generation, serving.settings.keepalive_s, parser)
    return await reply.send(request, stream=body.stream)


def chat_prompt(codec: TextCodec, body: ChatBody, tools: Sequence[Tool]) -> list[int]:
    """Token ids of the conversation. Errors: TextError."""
    return codec.chat(**conversation(codec, body, tools))


def chat_text(codec: TextCodec, body: ChatBody, tools: Sequence[Tool]) -> str:
    """The conversation as its template writes it. Errors: TextError."""
    return "".join(codec.render_chat(**conversation(codec, body, tools)))


def conversation(codec: TextCodec, body: ChatBody, tools: Sequence[Tool]) -> dict[str, Any]:
    """What the codec is given of a chat."""
    turns = [message.for_template() for message in body.messages]
    variables = dict(body.chat_template_kwargs)
    for name in ("reasoning_effort", "verbosity"):
        if (value := getattr(body, name)) is not None:
            variables.setdefault(name, value)
    return {
        "messages": turns if knows_tools(codec) else told_in_text(turns, tools),
        "tools": [tool.for_template() for tool in tools] or None,
        "variables": variables,
        "add_generation_prompt": body.add_generation_prompt and not body.continue_final_message,
        "continue_final": body.continue_final_message,
    }


def family_format(codec: TextCodec) -> CallFormat:
    """How the model writes calls; one whose template has no place for tools is told to write them so."""
    return call_format(template_sources(codec)) if knows_tools(codec) else HERMES


def template_sources(codec: TextCodec) -> list[str]:
    """The Jinja of the model's templates."""
    return [template.source for template in codec.templates.values()]


def knows_tools(codec: TextCodec) -> bool:
    """Whether a template has a place for tools."""
    return any("tools" in source for source in template_sources(codec))


def shown_markers(begin: str, tools: Sequence[Tool]) -> list[str]:
    """Special tokens that the parser must see."""
    return [THINK, "</think>"] + ([begin, begin.replace("<", "</", 1)] if tools and begin else [])


def opens_reasoning(codec: TextCodec, prompt: Sequence[int]) -> bool:
    """Whether the prompt ends inside the reasoning."""
    return str(codec.tokenizer.decode(list(prompt[-NUM_TAIL:]), skip_special_tokens=False)).rstrip().endswith(THINK)
