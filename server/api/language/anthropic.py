"""POST /v1/messages: conversations as Anthropic's clients send them, and their tokens counted."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from server.api.body import NeutralValues, RequestBody, Text, WholeNumber
from server.api.errors import ApiError, InvalidValue, shown
from server.api.fields import check_fields
from server.api.gate import require_json
from server.api.language.answer import Wire
from server.api.language.chat import answer_chat, chat_prompt
from server.api.language.generation import Generation
from server.api.language.messages import ChatBody
from server.api.language.pieces import Answer, CallPiece, Piece, TextPiece
from server.api.language.schemas import MAX_STOP_CHARS, MAX_STOPS, CacheSalt, Deadline, Priority
from server.api.language.tools import chosen_tools
from server.api.language.translated import Part, as_chat, objects, unsupported
from server.api.openapi import ASKING, success
from server.api.reading import JsonRoute, in_thread
from server.api.serving import CurrentServing
from server.api.sse import named_event

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}

router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_json)], responses=ASKING)


class CountBody(RequestBody):
    """POST /v1/messages/count_tokens."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"metadata", "service_tier", "cache_control", "betas"})
    neutral: ClassVar[NeutralValues] = {"mcp_servers": ([],), "container": ()}

    model: Text | None = Field(None, description="Left out: the language model this server has.")
    messages: list[dict[str, Any]] = Field(
        min_length=1, description="The turns: a text, or blocks of text, tool_use and tool_result."
    )
    system: Text | list[dict[str, Any]] = Field("", description="The system's turn, a text or blocks of text.")
    tools: list[dict[str, Any]] = Field([], description="Functions: name, description and input_schema.")
    tool_choice: dict[str, Any] = Field({}, description="type auto, any, none, or tool with a name.")
    thinking: dict[str, Any] = Field({}, description="type enabled, disabled or adaptive: given to the chat template")
    output_config: dict[str, Any] = Field(
        {},
        description="format: type json_schema with a schema, which the answer follows; effort: given to the template.",
    )

    def chat_fields(self) -> dict[str, Any]:
        """The fields of the chat it stands for. Errors: InvalidValue, UnsupportedParameter."""
        system = text_of(self.system, "system")
        turns = [{"role": "system", "content": system}] if system else []
        for index, message in enumerate(self.messages):
            turns += turns_of(message, f"messages.{index}")
        fields: dict[str, Any] = {"model": self.model, "messages": turns}
        if self.thinking:
            fields["chat_template_kwargs"] = thinking_of(self.thinking)
        fields["response_format"] = self.output_config.get("format")
        fields["reasoning_effort"] = self.output_config.get("effort")
        if self.tools:
            fields["tools"] = [tool_of(tool) for tool in self.tools]
            fields["tool_choice"] = choice_of(self.tool_choice)
            fields["parallel_tool_calls"] = self.tool_choice.get("disable_parallel_tool_use") is not True
        return fields


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: WholeNumber = Field(ge=1, description="Tokens of the answer; cut to what the context leaves.")
    temperature: float | None = Field(
        None, ge=0, le=2, description="0: always the likeliest token; left out: the model's own."
    )
    top_p: float | None = Field(
        None, ge=0, le=1, description="The likeliest tokens of so much probability in all; left out: the model's own."
    )
    top_k: WholeNumber | None = Field(None, ge=-1, description="So many of the likeliest tokens; 0 or -1: all.")
    stop_sequences: list[Text] = Field(
        [], max_length=MAX_STOPS, description=f"Texts that end the answer, of {MAX_STOP_CHARS} characters at most."
    )
    stream: bool = Field(False, description="true: Anthropic's named server-sent events.")
    cache_salt: CacheSalt = ""
    priority: Priority = 0
    deadline_ms: Deadline | None = None

    def chat_fields(self) -> dict[str, Any]:
        """The chat's fields, those of sampling included."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "stream", "cache_salt", "priority", "deadline_ms")
        return super().chat_fields() | {name: getattr(self, name) for name in names} | {"stop": self.stop_sequences}


def thinking_of(thinking: Part) -> dict[str, Any]:
    """``thinking`` as templates know it; one that asks for no reasoning passes it over. Errors: InvalidValue."""
    kind = thinking.get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise InvalidValue("thinking.type", f"thinking.type is {shown(kind)}; send enabled, disabled or adaptive.")
    return {} if kind == "adaptive" else {"enable_thinking": kind == "enabled"}


def usage_of(generation: Generation) -> dict[str, int]:
    """Anthropic's counts so far: a prompt's tokens that were known stand apart from those that were read."""
    usage = generation.usage()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }


def text_of(content: Any, param: str) -> str:
    """Text, or blocks of text. Errors: InvalidValue, UnsupportedParameter."""
    if isinstance(content, str):
        return content
    blocks = objects(content, param)
    for block in blocks:
        if block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise unsupported(param, block.get("type"))
    return "\n".join(block["text"] for block in blocks)


def turns_of(message: Part, param: str) -> list[dict[str, Any]]:
    """A message as a chat's turns: results of tools are turns of their own, before what else it says."""
    content = message.get("content")
    if not isinstance(content, list):
        return [{"role": message.get("role"), "content": content}]
    results, calls, texts = list[dict[str, Any]](), list[dict[str, Any]](), list[Any]()
    for block in objects(content, f"{param}.content"):
        kind = block.get("type")
        if kind == "tool_result":
            text = text_of(block.get("content", ""), f"{param}.content")
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input", {}), ensure_ascii=False)}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "text":
            texts.append(block.get("text"))
        elif kind not in ("thinking", "redacted_thinking"):  # templates leave earlier reasoning out
            raise unsupported(f"{param}.content", kind)
    if not (texts or calls):
        return results
    said = "\n".join(texts) if all(isinstance(text, str) for text in texts) else texts
    return [*results, {"role": message.get("role"), "content": said} | ({"tool_calls": calls} if calls else {})]


def tool_of(tool: Part) -> dict[str, Any]:
    """A tool as chats know it. Errors: UnsupportedParameter for tools that run at the provider's."""
    if tool.get("type", "custom") != "custom":
        raise unsupported("tools", tool.get("type"))
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
        "strict": tool.get("strict"),
    }
    return {"type": "function", "function": function}


def choice_of(choice: Part) -> Any:
    """``tool_choice`` as chats know it. Errors: InvalidValue."""
    kind = choice.get("type", "auto")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind not in CHOICES:
        raise InvalidValue("tool_choice", "tool_choice.type must be auto, any, tool or none.")
    return CHOICES[kind]


@dataclass
class MessagesWire:
    """Anthropic's message, whole and as events."""

    model: str
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex[:24]}")
    num_blocks: int = 0
    open_kind: str | None = None

    def message(self, generation: Generation) -> dict[str, Any]:
        """The message without content."""
        return {
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": [],
            "stop_reason": None, "stop_sequence": None, "usage": usage_of(generation),
        }  # fmt: skip

    def whole(self, answers: Sequence[Answer], generation: Generation) -> dict[str, Any]:
        """The complete message."""
        answer = answers[0]
        content: list[dict[str, Any]] = []
        if answer.reasoning:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
        if answer.text or not answer.calls:
            content.append({"type": "text", "text": answer.text})
        content += [tool_use(call, json.loads(call.arguments)) for call in answer.calls]
        reason = STOP_REASONS[str(answer.finish_reason)]
        return self.message(generation) | {"content": content, "stop_reason": reason, "timings": generation.timings()}

    def begin(self, generation: Generation) -> list[bytes]:
        """The message before its content."""
        return [named_event({"type": "message_start", "message": self.message(generation)})]

    def pieces(self, index: int, pieces: Sequence[Piece], generation: Generation) -> list[bytes]:  # noqa: ARG002
        """Blocks as they grow."""
        return [event for piece in pieces for event in self._piece(piece)]

    def _piece(self, piece: Piece) -> list[bytes]:
        if isinstance(piece, CallPiece):
            delta = {"type": "input_json_delta", "partial_json": piece.arguments}
            return [*self._opened("", tool_use(piece, {})), self._delta(delta), *self._closed()]
        if isinstance(piece, TextPiece):
            return [
                *self._opened("text", {"type": "text", "text": ""}),
                self._delta({"type": "text_delta", "text": piece.text}),
            ]
        block = {"type": "thinking", "thinking": "", "signature": ""}
        return [*self._opened("thinking", block), self._delta({"type": "thinking_delta", "thinking": piece.text})]

    def _opened(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        if kind and self.open_kind == kind:
            return []
        events = self._closed()
        self.open_kind = kind
        return [*events, named_event({"type": "content_block_start", "index": self.num_blocks, "content_block": block})]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return named_event({"type": "content_block_delta", "index": self.num_blocks, "delta": delta})

    def _closed(self) -> list[bytes]:
        if self.open_kind is None:
            return []
        self.open_kind = None
        self.num_blocks += 1
        return [named_event({"type": "content_block_stop", "index": self.num_blocks - 1})]

    def finish(self, index: int, answer: Answer, generation: Generation) -> list[bytes]:  # noqa: ARG002
        """The last block's end, and why."""
        delta = {"stop_reason": STOP_REASONS[str(answer.finish_reason)], "stop_sequence": None}
        ended = {"type": "message_delta", "delta": delta, "usage": usage_of(generation)}
        return [*self._closed(), named_event(ended)]

    def end(self, generation: Generation) -> list[bytes]:
        """The stop."""
        return [named_event({"type": "message_stop", "timings": generation.timings()})]

    def error(self, error: ApiError) -> bytes:
        """An error event."""
        return named_event({"type": "error", **error.body()})


def tool_use(call: CallPiece, given: Any) -> dict[str, Any]:
    """A call as a block."""
    return {"type": "tool_use", "id": call.call_id, "name": call.name, "input": given}


ANSWER = success(
    "The next turn.",
    streams=True,
    id=("string", "Of this message."),
    type=("string", "message"),
    role=("string", "assistant"),
    model=("string", "The model that answered."),
    content=("array", "Blocks: text, thinking, tool_use."),
    stop_reason=("string", "end_turn, max_tokens or tool_use."),
    usage=("object", "Tokens in and out."),
)
COUNT = success("The count.", input_tokens=("integer", "Tokens of the prompt."))


@router.post("/v1/messages", responses=ANSWER)
async def create_message(body: MessagesBody, request: HttpRequest, serving: CurrentServing) -> Response:
    """Answer a conversation."""
    check_fields(body, request, serving)
    model = serving.model_named(body.model)
    wire: Wire = MessagesWire(model.name)
    return await answer_chat(as_chat(body.chat_fields()), model, wire, request, serving)


@router.post("/v1/messages/count_tokens", responses=COUNT)
async def count_tokens(body: CountBody, request: HttpRequest, serving: CurrentServing) -> JSONResponse:
    """How many tokens a conversation has as a prompt."""
    check_fields(body, request, serving)
    model = serving.model_named(body.model)
    chat: ChatBody = as_chat(body.chat_fields())
    tools, _ = chosen_tools(chat.tools, chat.tool_choice)
    prompt = await in_thread(request, chat_prompt, model.codec, chat, tools)
    return JSONResponse({"input_tokens": len(prompt)})
