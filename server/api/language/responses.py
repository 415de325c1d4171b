"""POST /v1/responses: OpenAI's newer form of a conversation, without memory between calls."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import Field

from server.api.body import NeutralValues, RequestBody, Text, WholeNumber
from server.api.errors import ApiError
from server.api.fields import check_fields
from server.api.gate import require_json
from server.api.language.answer import Wire
from server.api.language.chat import answer_chat
from server.api.language.generation import Generation
from server.api.language.pieces import Answer, CallPiece, Piece, TextPiece
from server.api.language.schemas import CacheSalt, Deadline, Priority
from server.api.language.translated import Part, as_chat, objects, unsupported
from server.api.openapi import ASKING, success
from server.api.reading import JsonRoute
from server.api.serving import CurrentServing
from server.api.sse import DONE, named_event

router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_json)], responses=ASKING)


class ResponsesBody(RequestBody):
    """POST /v1/responses. Nothing is stored, whatever ``store`` says."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            "store", "metadata", "user", "service_tier", "safety_identifier", "prompt_cache_key",
            "prompt_cache_retention", "max_tool_calls", "stream_options",
        }
    )  # fmt: skip
    neutral: ClassVar[NeutralValues] = {
        "previous_response_id": (), "conversation": (), "prompt": (), "background": (False,),
        "include": ([], ["reasoning.encrypted_content"]), "truncation": ("disabled",), "top_logprobs": (0,),
    }  # fmt: skip

    model: Text | None = Field(None, description="Left out: the language model this server has.")
    input: Text | list[dict[str, Any]] = Field(
        description="The user's text, or items: message, function_call, function_call_output, reasoning."
    )
    instructions: Text = Field("", description="The system's turn, before all others.")
    max_output_tokens: WholeNumber | None = Field(
        None, ge=1, description="Tokens of the answer; left out: what the context leaves."
    )
    temperature: float | None = Field(
        None, ge=0, le=2, description="0: always the likeliest token; left out: the model's own."
    )
    top_p: float | None = Field(
        None, ge=0, le=1, description="The likeliest tokens of so much probability in all; left out: the model's own."
    )
    stream: bool = Field(False, description="true: named server-sent events with rising sequence_number.")
    tools: list[dict[str, Any]] = Field([], description="Functions; tools that run at a provider are refused.")
    tool_choice: Text | dict[str, Any] = Field(
        "auto", description="none, auto, required, a function, or allowed_tools."
    )
    parallel_tool_calls: bool = Field(True, description="false: at most one call in an answer")
    text: dict[str, Any] = Field({}, description="format: text, json_object or json_schema")
    reasoning: dict[str, Any] = Field({}, description="effort: given to the chat template")
    cache_salt: CacheSalt = ""
    priority: Priority = 0
    deadline_ms: Deadline | None = None

    def chat_fields(self) -> dict[str, Any]:
        """The fields of the chat it stands for. Errors: InvalidValue, UnsupportedParameter."""
        turns = [{"role": "system", "content": self.instructions}] if self.instructions else []
        turns += [{"role": "user", "content": self.input}] if isinstance(self.input, str) else turns_of(self.input)
        fields = {
            "model": self.model,
            "messages": turns,
            "max_completion_tokens": self.max_output_tokens,
            "tools": [tool_of(tool) for tool in objects(self.tools, "tools")],
            "tool_choice": self.tool_choice,
            "response_format": self.text.get("format"),
            "reasoning_effort": self.reasoning.get("effort"),
            "verbosity": self.text.get("verbosity"),
        }
        names = ("temperature", "top_p", "stream", "parallel_tool_calls", "cache_salt", "priority", "deadline_ms")
        return fields | {name: getattr(self, name) for name in names}


def turns_of(items: Sequence[Part]) -> list[dict[str, Any]]:
    """Input items as a chat's turns; calls that follow each other are one turn."""
    turns: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message":
            turns.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not (turns and turns[-1]["role"] == "assistant"):
                turns.append({"role": "assistant", "content": ""})
            turns[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            turns.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind != "reasoning":  # templates leave earlier reasoning out
            raise unsupported(f"input.{index}", kind)
    return turns


def tool_of(tool: Part) -> dict[str, Any]:
    """A tool as chats know it. Errors: UnsupportedParameter for tools that run at the provider's."""
    if tool.get("type") != "function":
        raise unsupported("tools", tool.get("type"))
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool.get(name) for name in names}}


@dataclass
class ResponsesWire:
    """A response, whole and as events with rising numbers."""

    model: str
    body: ResponsesBody
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    items: list[dict[str, Any]] = field(default_factory=list)
    is_open: bool = False
    number: int = -1

    def response(self, status: str, generation: Generation) -> dict[str, Any]:
        """The response object as it stands."""
        usage = generation.usage()
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "model": self.model,
            "output": self.items, "error": None, "instructions": self.body.instructions or None, "metadata": {},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "max_output_tokens": self.body.max_output_tokens, "parallel_tool_calls": self.body.parallel_tool_calls,
            "previous_response_id": None, "store": False, "temperature": self.body.temperature,
            "text": self.body.text or {"format": {"type": "text"}}, "tool_choice": self.body.tool_choice,
            "tools": self.body.tools, "top_p": self.body.top_p, "truncation": "disabled",
            "usage": {
                "input_tokens": usage["prompt_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }  # fmt: skip

    def whole(self, answers: Sequence[Answer], generation: Generation) -> dict[str, Any]:
        """The complete response: the stream's own items."""
        answer = answers[0]
        if answer.text or not answer.calls:
            self._piece(TextPiece(answer.text))
        for call in answer.calls:
            self._piece(call)
        self._closed()
        return self.response(status_of(answer), generation) | {"timings": generation.timings()}

    def begin(self, generation: Generation) -> list[bytes]:
        """Created, and in progress."""
        response = self.response("in_progress", generation)
        return [self._event(f"response.{what}", response=response) for what in ("created", "in_progress")]

    def pieces(self, index: int, pieces: Sequence[Piece], generation: Generation) -> list[bytes]:  # noqa: ARG002
        """Items as they grow."""
        return [event for piece in pieces for event in self._piece(piece)]

    def finish(self, index: int, answer: Answer, generation: Generation) -> list[bytes]:  # noqa: ARG002
        """The last item's end, and the response."""
        events = self._closed()
        status = status_of(answer)
        return [*events, self._event(f"response.{status}", response=self.response(status, generation))]

    def end(self, generation: Generation) -> list[bytes]:  # noqa: ARG002
        """[DONE], which some clients of the older routes wait for; those of this one pass it over."""
        return [DONE]

    def error(self, error: ApiError) -> bytes:
        """An error event."""
        return self._event("error", **error.body()["error"] | {"type": "error"})

    def _event(self, kind: str, **fields: Any) -> bytes:
        self.number += 1
        return named_event(fields | {"type": kind, "sequence_number": self.number})

    def _piece(self, piece: Piece) -> list[bytes]:
        if isinstance(piece, CallPiece):
            return [*self._closed(), *self._call(piece)]
        if not isinstance(piece, TextPiece):  # reasoning is not shown on this route
            return []
        events = [] if self.is_open else self._opened()
        self.items[-1]["content"][0]["text"] += piece.text
        return [*events, self._event("response.output_text.delta", **self._place(), delta=piece.text, logprobs=[])]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}

    def _opened(self) -> list[bytes]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "status": "in_progress", "role": "assistant"}
        self.items.append(item | {"content": [part]})
        self.is_open = True
        added = self._event("response.output_item.added", output_index=len(self.items) - 1, item=item | {"content": []})
        return [added, self._event("response.content_part.added", **self._place(), part=part)]

    def _closed(self) -> list[bytes]:
        if not self.is_open:
            return []
        self.is_open = False
        item = self.items[-1]
        item["status"] = "completed"
        part, place = item["content"][0], self._place()
        return [
            self._event("response.output_text.done", **place, text=part["text"], logprobs=[]),
            self._event("response.content_part.done", **place, part=part),
            self._event("response.output_item.done", output_index=len(self.items) - 1, item=item),
        ]

    def _call(self, call: CallPiece) -> list[bytes]:
        item = {
            "type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call.call_id, "name": call.name,
            "arguments": call.arguments, "status": "completed",
        }  # fmt: skip
        self.items.append(item)
        index = len(self.items) - 1
        place = {"item_id": item["id"], "output_index": index}
        begun = item | {"arguments": "", "status": "in_progress"}
        return [
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event("response.function_call_arguments.delta", **place, delta=call.arguments),
            self._event("response.function_call_arguments.done", **place, arguments=call.arguments, name=call.name),
            self._event("response.output_item.done", output_index=index, item=item),
        ]


def status_of(answer: Answer) -> str:
    """Whether the answer was cut."""
    return "incomplete" if answer.finish_reason == "length" else "completed"


ANSWER = success(
    "The response.",
    streams=True,
    id=("string", "Of this response."),
    object=("string", "response"),
    created_at=("integer", "Unix time, seconds."),
    status=("string", "completed, or incomplete where max_output_tokens cut it."),
    model=("string", "The model that answered."),
    output=("array", "Items: message, function_call."),
    usage=("object", "Tokens in and out."),
)


@router.post("/v1/responses", responses=ANSWER)
async def create_response(body: ResponsesBody, request: HttpRequest, serving: CurrentServing) -> Response:
    """Answer a conversation."""
    check_fields(body, request, serving)
    model = serving.model_named(body.model)
    wire: Wire = ResponsesWire(model.name, body)
    return await answer_chat(as_chat(body.chat_fields()), model, wire, request, serving)
