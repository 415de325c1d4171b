"""From encoded prompts to engine requests: limits first, so that a refused call is a clean 4xx."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server.api.errors import InvalidValue
from server.api.language.schemas import AS_MUCH_AS_FITS, GenerationBody
from server.api.language.tokens import TokenView
from server.api.serving import ServedModel
from server.engine.grammar import Grammar
from server.engine.request import ContextTooLong, Request
from server.engine.stop import TextOutput
from server.text import TextCodec


def plan_requests(
    call_id: str,
    prompts: Sequence[Sequence[int]],
    body: GenerationBody,
    model: ServedModel,
    *,
    max_tokens: int | None,
    default_max_tokens: int,
    max_requests: int,
    grammar: Callable[[], Grammar] | None,
) -> list[Request]:
    """One request for each prompt and choice, prompt-major.

    Every answer may have what ``answer_limit`` says. Errors: InvalidValue for more answers than the server takes at
    once, ContextTooLong.
    """
    num_requests = len(prompts) * body.num_choices
    if num_requests > max_requests:
        message = f"The call asks for {num_requests} answers at once; this server takes at most {max_requests}."
        raise InvalidValue("n", message)
    sampling, stop_ids = body.sampling(model.sampling), body.stop_ids(model.codec.stop_ids)
    if grammar is not None:
        stop_ids |= model.codec.stop_ids  # behind its last word nothing else may come
    limits = [answer_limit(len(prompt), max_tokens, default_max_tokens, model.context_length) for prompt in prompts]
    return [
        Request(
            request_id=f"{call_id}-{index}-{choice}",
            prompt_ids=prompt,
            max_tokens=limit,
            sampling=sampling,
            stop_ids=stop_ids,
            choice=choice,
            draft=body.speculative.enabled,
            max_rows=body.speculative.most_rows,
            lookup=body.speculative.lookup,
            grammar=None if grammar is None else grammar(),
            min_tokens=min(body.min_tokens, limit),
            priority=body.priority,
            deadline_s=None if body.deadline_ms is None else body.deadline_ms / 1000,
            cache_salt=body.cache_salt,
            num_logprobs=body.num_logprobs,
            prompt_logprobs=body.num_prompt_logprobs,
        )
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        for choice in range(body.num_choices)
    ]


def truncated(prompt: list[int], body: GenerationBody, context: int) -> list[int]:
    """The prompt's last tokens, as many as ``truncate_prompt_tokens`` leaves; -1 leaves room for the answer."""
    limit = body.truncate_prompt_tokens
    if limit is None:
        return prompt
    if limit == AS_MUCH_AS_FITS:
        limit = max(context - max(body.max_tokens or 1, 1), 1)
    return prompt[-limit:] if limit else []


def text_output(
    codec: TextCodec, body: GenerationBody, request: Request, continued: Sequence[int], shown: Sequence[str] = ()
) -> TextOutput:
    """Where a request's text comes from; ``continued``: the prompt that it goes on with, ``shown``: see ``stream``."""
    special_but = None if body.skip_special_tokens else request.stop_ids
    return TextOutput(codec, body.stop, continued, shown, special_but)


def view_of(body: GenerationBody, codec: TextCodec) -> TokenView:
    """What a body wants to know of tokens."""
    return TokenView(
        codec,
        body.num_shown_logprobs,
        body.return_token_ids,
        body.return_tokens_as_token_ids,
        body.return_drafted,
    )


def answer_limit(num_prompt: int, asked: int | None, default: int, context: int) -> int:
    """Tokens the answer may have: what was asked for, else ``default``, cut to what the context leaves.

    ``AS_MUCH_AS_FITS`` is all of that. Errors: ContextTooLong where the prompt leaves no room.
    """
    wanted = default if asked is None else asked
    room = context - num_prompt
    if room < min(abs(wanted), 1):
        raise ContextTooLong(num_prompt, 1, context)
    return room if wanted == AS_MUCH_AS_FITS else min(wanted, room)
