"""Which replica a conversation belongs to. Pure; knows neither Ray nor HTTP."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

PROMPT_CHARS, PROMPT_TOKENS = 64, 16  # of a plain prompt: what is longer may grow between two calls
MESSAGES = ("messages", "input")


def conversation_of(body: Mapping[str, Any]) -> str | None:
    """What stays the same while a conversation grows; None where nothing in a request says so.

    It is what the client calls it (``prompt_cache_key``), else all that stands before the first answer: system prompt,
    instructions, and the messages up to the first of the user; of a plain prompt its beginning.
    """
    named = body.get("prompt_cache_key")
    if isinstance(named, str) and named:
        return named
    opening: list[Any] = []
    for name in MESSAGES:
        if isinstance(body.get(name), list):
            opening = up_to_first_user(body[name])
        elif isinstance(body.get(name), str):
            opening = [body[name]]
    if not opening:
        opening = beginning(body.get("prompt"))
    if not opening:
        return None
    return json.dumps([body.get("system"), body.get("instructions"), opening], sort_keys=True)


def up_to_first_user(messages: list[Any]) -> list[Any]:
    """The first messages, the user's first among them."""
    for place, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            return messages[: place + 1]
    return messages[:1]


def beginning(prompt: Any) -> list[Any]:
    """The beginning of a prompt of text or tokens, of the first one where there are several; empty for none."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return [prompt[:PROMPT_CHARS]] if prompt else []
    return prompt[:PROMPT_TOKENS] if isinstance(prompt, list) else []


def ranking(conversation: str, replicas: Iterable[str]) -> list[str]:
    """The replicas, the conversation's own first: by the highest random weight (Thaler and Ravishankar, IEEE/ACM
    Transactions on Networking 6(1), 1998).

    A replica that goes takes only its own conversations along, each to the next of its list; one that comes gets its
    share from all.
    """
    return sorted(replicas, key=lambda replica: weight(conversation, replica), reverse=True)


def weight(conversation: str, replica: str) -> bytes:
    """The weight of a pair, evenly spread."""
    return hashlib.blake2b(f"{replica}\0{conversation}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
