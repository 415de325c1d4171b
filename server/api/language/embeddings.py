"""POST /v1/embeddings: texts in, one vector each, from the model's own last features."""

from __future__ import annotations

import base64
import struct
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from server.api.body import NeutralValues, RequestBody, Text
from server.api.errors import InvalidValue
from server.api.fields import check_fields
from server.api.gate import require_json
from server.api.language.generation import Generation
from server.api.language.prompts import answer_limit
from server.api.language.schemas import TokenIds, check_ids, parse_prompts
from server.api.leaving import unless_left
from server.api.openapi import ASKING, success
from server.api.reading import JsonRoute, in_thread
from server.api.serving import CurrentServing, ServedModel, Serving
from server.engine.request import Request
from server.engine.stop import TextOutput
from server.text import TextCodec

MAX_INPUTS = 2048
AT_ONCE = 8

router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_json)], responses=ASKING)


class EmbeddingsBody(RequestBody):
    """POST /v1/embeddings."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"user", "metadata"})
    neutral: ClassVar[NeutralValues] = {"dimensions": ()}

    model: Text | None = Field(None, description="Left out: the language model this server has.")
    input: Annotated[
        list[str | TokenIds],
        BeforeValidator(parse_prompts, json_schema_input_type=str | TokenIds | list[str | TokenIds]),
    ] = Field(max_length=MAX_INPUTS, description="The four shapes of a completion's prompt.")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: little-endian 32-bit floats")


ANSWER = success(
    "One vector for each text.",
    object=("string", "list"),
    data=("array", "Objects with index and embedding: numbers, or base64 of them."),
    model=("string", "The model that answered."),
    usage=("object", "Tokens of the texts."),
)


@router.post("/v1/embeddings", responses=ANSWER)
async def create_embeddings(body: EmbeddingsBody, request: HttpRequest, serving: CurrentServing) -> Response:
    """The mean of each text's last features, scaled to length 1."""
    check_fields(body, request, serving)
    model = serving.model_named(body.model)
    prompts = await in_thread(request, encode_inputs, model.codec, body.input)
    for prompt in prompts:
        answer_limit(len(prompt), 0, 0, model.context_length)
    return await unless_left(request, embed(serving, model, prompts, body.encoding_format))


def encode_inputs(codec: TextCodec, inputs: Sequence[str | TokenIds]) -> list[list[int]]:
    """Token ids of every text. Errors: InvalidValue for one without tokens, and for ids outside the vocabulary."""
    prompts = [codec.encode(text) if isinstance(text, str) else text for text in inputs]
    for prompt in prompts:
        check_ids("input", prompt, codec.vocab_size)
    if not all(prompts):
        raise InvalidValue("input", "An input has no tokens; send more text.")
    return prompts


async def embed(serving: Serving, model: ServedModel, prompts: Sequence[list[int]], encoding: str) -> dict[str, Any]:
    """The answer; ``AT_ONCE`` texts are read at a time, so that many of them leave room for others."""
    call_id, data = uuid.uuid4().hex, list[dict[str, Any]]()
    step = min(AT_ONCE, serving.settings.max_waiting)
    for first in range(0, len(prompts), step):
        requests = [
            Request(f"{call_id}-{first + place}", prompt, 0, model.sampling, pools=True)
            for place, prompt in enumerate(prompts[first : first + step])
        ]
        generation = Generation(serving, model, requests, [TextOutput(model.codec) for _ in requests])
        try:
            async for deltas in generation.rounds(serving.settings.keepalive_s):
                for _ in deltas or ():
                    pass
        finally:
            generation.close()
        for choice in generation.choices.values():
            vector = encoded(choice.completion.vector, encoding)
            data.append({"object": "embedding", "index": first + choice.index, "embedding": vector})
    num_tokens = sum(map(len, prompts))
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model.name, "usage": usage}


def encoded(vector: Sequence[float], encoding: str) -> list[float] | str:
    """Numbers, or their little-endian 32-bit floats in base64."""
    if encoding == "float":
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
