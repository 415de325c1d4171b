"""The model's tokenizer and chat template over HTTP: /tokenize, /detokenize, /apply-template, /tokenizer_info."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator

from server.api.body import NeutralValues, RequestBody, Text, WholeNumber
from server.api.errors import InvalidValue
from server.api.fields import check_fields
from server.api.gate import require_json
from server.api.language.chat import chat_prompt, chat_text
from server.api.language.messages import ChatBody
from server.api.language.schemas import check_ids
from server.api.language.tools import chosen_tools
from server.api.language.translated import as_chat
from server.api.openapi import ASKING, LOOKING, failures, success
from server.api.reading import JsonRoute, in_thread
from server.api.serving import CurrentServing, ServedModel
from server.text import TextCodec

MAX_TOKENS_IN_BODY = 1_000_000

router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_json)], responses=ASKING)
facts = APIRouter(responses=LOOKING | failures(503))


class ConversationBody(RequestBody):
    """A conversation and what its template is given."""

    model: Text | None = Field(None, description="Left out: the language model this server has.")
    messages: list[dict[str, Any]] = Field([], description="As those of a chat.")
    tools: list[dict[str, Any]] = Field([], description="As those of a chat.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="Variables the model's chat template is given.")
    add_generation_prompt: bool = Field(True, description="The prompt ends with the opening of the assistant's turn.")
    continue_final_message: bool = Field(False, description="The prompt ends with the last message's text.")

    def chat(self) -> ChatBody:
        """The chat it stands for. Errors: RequestValidationError."""
        names = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
        return as_chat({name: getattr(self, name) for name in names if name in self.model_fields_set})


class TokenizeBody(ConversationBody):
    """POST /tokenize: a text, as ``prompt`` (vLLM's name) or ``content`` (llama.cpp's), or a conversation."""

    neutral: ClassVar[NeutralValues] = {"parse_special": (True,)}

    prompt: Text | None = Field(None, description="A text, under vLLM's name.")
    content: Text | None = Field(None, description="A text, under llama.cpp's name.")
    add_special_tokens: bool = Field(True, description="Whether a prompt gets what the tokenizer puts around a text.")
    add_special: bool = Field(False, description="The same of content.")
    with_pieces: bool = Field(
        False, description="tokens are objects of id and piece: text, or bytes within a character"
    )
    return_token_strs: bool = Field(False, description="token_strs: the tokens as the vocabulary writes them.")

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeBody:
        given = [name for name in ("prompt", "content", "messages") if name in self.model_fields_set]
        if len(given) != 1:
            raise InvalidValue("prompt", "Send one of prompt, content and messages.")
        return self

    def encode(self, codec: TextCodec) -> list[int]:
        """Token ids. Errors: TextError, RequestValidationError."""
        if self.prompt is not None:
            return codec.encode(self.prompt, add_special_tokens=self.add_special_tokens)
        if self.content is not None:
            return codec.encode(self.content, add_special_tokens=self.add_special)
        chat = self.chat()
        return chat_prompt(codec, chat, chosen_tools(chat.tools, chat.tool_choice)[0])


class DetokenizeBody(RequestBody):
    """POST /detokenize."""

    model: Text | None = Field(None, description="Left out: the language model this server has.")
    tokens: list[WholeNumber] = Field(max_length=MAX_TOKENS_IN_BODY, description="Token ids, special ones too.")


TOKENS = success(
    "The tokens.",
    tokens=("array", "Token ids, or objects of id and piece."),
    count=("integer", "How many."),
    max_model_len=("integer", "Tokens of the context."),
)
TEXT = success("The text.", prompt=("string", "vLLM's name."), content=("string", "The same, llama.cpp's name."))
PROMPT = success("The prompt.", prompt=("string", "The conversation as the template writes it."))
FACTS = success("The tokenizer.", vocab_size=("integer", "Tokens."), stop_tokens=("array", "Those that end a text."))


@router.post("/tokenize", responses=TOKENS)
async def tokenize(body: TokenizeBody, request: HttpRequest, serving: CurrentServing) -> JSONResponse:
    """The tokens of a text or of a conversation."""
    check_fields(body, request, serving)
    return await in_thread(request, tokens_answer, body, serving.model_named(body.model))


def tokens_answer(body: TokenizeBody, model: ServedModel) -> JSONResponse:
    """The tokens as they were asked for, written out."""
    ids = body.encode(model.codec)
    answer: dict[str, Any] = {"tokens": pieces(model.codec, ids) if body.with_pieces else ids}
    answer |= {"count": len(ids), "max_model_len": model.context_length}
    if body.return_token_strs:
        answer["token_strs"] = [model.codec.tokenizer.id_to_token(token_id) for token_id in ids]
    return JSONResponse(answer)


@router.post("/detokenize", responses=TEXT)
async def detokenize(body: DetokenizeBody, request: HttpRequest, serving: CurrentServing) -> JSONResponse:
    """The text of tokens, special ones included, under vLLM's name and llama.cpp's."""
    check_fields(body, request, serving)
    codec = serving.model_named(body.model).codec
    check_ids("tokens", body.tokens, codec.vocab_size)
    return await in_thread(request, text_answer, codec, body.tokens)


def text_answer(codec: TextCodec, token_ids: Sequence[int]) -> JSONResponse:
    """Their text, written out."""
    text = codec.tokenizer.decode(token_ids, skip_special_tokens=False)
    return JSONResponse({"prompt": text, "content": text})


@router.post("/apply-template", responses=PROMPT)
async def apply_template(body: ConversationBody, request: HttpRequest, serving: CurrentServing) -> JSONResponse:
    """A conversation as the model's chat template writes it."""
    check_fields(body, request, serving)
    codec, chat = serving.model_named(body.model).codec, body.chat()
    tools = chosen_tools(chat.tools, chat.tool_choice)[0]
    return JSONResponse({"prompt": await in_thread(request, chat_text, codec, chat, tools)})


@facts.get("/tokenizer_info", responses=FACTS)
async def tokenizer_info(serving: CurrentServing) -> JSONResponse:
    """The special tokens and the chat template."""
    codec = serving.model().codec
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    known = {name: codec.template_variables.get(name) for name in names}
    ends = [codec.tokenizer.id_to_token(token_id) for token_id in sorted(codec.stop_ids)]
    known["eos_token"] = known["eos_token"] or next(iter(ends), None)
    templates = {name: template.source for name, template in codec.templates.items()}
    template = templates.get("default") or next(iter(templates.values()), None)
    return JSONResponse(known | {"chat_template": template, "vocab_size": codec.vocab_size, "stop_tokens": ends})


def pieces(codec: TextCodec, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Each token with its text, or with its bytes where they are no whole characters."""
    told: list[dict[str, Any]] = []
    for token_id in ids:
        own = codec.token_bytes.of(token_id)
        try:
            told.append({"id": token_id, "piece": own.decode()})
        except UnicodeDecodeError:
            told.append({"id": token_id, "piece": list(own)})
    return told
