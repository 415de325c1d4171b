"""POST /v1/chat/completions: a conversation in, the next turn out."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from server.api.answer import Reply
from server.api.fields import check_fields
from server.api.gate import require_json
from server.api.generation import Generation
from server.api.messages import ChatBody
from server.api.openapi import ASKING
from server.api.prompts import plan_requests
from server.api.schemas import AS_MUCH_AS_FITS
from server.api.serving import CurrentServing
from server.engine.stop import TextOutput

router = APIRouter(dependencies=[Depends(require_json)], responses=ASKING)


@dataclass(frozen=True)
class ChatChoices:
    """Choices of a chat completion: the role first and once, then content, then an empty delta with the reason."""

    id_prefix: str = "chatcmpl-"
    object_name: str = "chat.completion"
    chunk_object_name: str = "chat.completion.chunk"

    def whole(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """A complete choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The role."""
        return self._entry(index, {"role": "assistant", "content": ""}, None)

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Text as it comes."""
        return self._entry(index, {"content": text}, None)

    def closing(self, index: int, finish_reason: str) -> dict[str, Any]:
        """An empty delta, and the reason."""
        return self._entry(index, {}, finish_reason)

    def _entry(self, index: int, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatBody, request: HttpRequest, serving: CurrentServing) -> Response:
    """Answer a conversation. Without a limit the answer may fill the context."""
    check_fields(body, request, serving)
    model = serving.model_named(body.model)
    body.check_token_ids(model.codec.vocab_size)
    turns = [message.for_template() for message in body.messages]
    prompt = await asyncio.to_thread(model.codec.chat, turns)
    reply = Reply.to(body, model.name, ChatChoices(), serving.settings.keepalive_s)
    requests = plan_requests(
        reply.id,
        [prompt],
        body,
        model,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        default_max_tokens=AS_MUCH_AS_FITS,
        max_requests=serving.settings.max_waiting,
    )
    outputs = [TextOutput(model.codec, body.stop) for _ in requests]
    generation = Generation(serving, model, requests, outputs)
    return await reply.send(generation, request, stream=body.stream)
