"""What bytes a token stands for: its text alone does not tell, since a character may be spread over several tokens."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer

BLANK = "\u2581"  # SentencePiece's mark of a space
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves; the others follow from U+0100 on, in order (GPT-2's table).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


class TokenBytes:
    """The bytes of each token of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        self.alphabet = byte_level_alphabet() if is_byte_level(json.loads(tokenizer.to_str())["decoder"]) else None

    def of(self, token_id: int) -> bytes:
        """The token's own bytes; none for an id without a token."""
        if token_id in self.added:
            return self.added[token_id].encode()
        text = self.tokenizer.id_to_token(token_id) or ""
        if self.alphabet is not None:
            return bytes(self.alphabet[char] for char in text if char in self.alphabet)
        if (found := BYTE_TOKEN.fullmatch(text)) is not None:
            return bytes([int(found[1], 16)])
        return text.replace(BLANK, " ").encode()


def is_byte_level(decoder: Any) -> bool:
    """Whether a tokenizer's decoder, as its JSON tells it, or a part of that reads bytes from characters."""
    if not isinstance(decoder, dict):
        return False
    return decoder.get("type") == "ByteLevel" or any(is_byte_level(part) for part in decoder.get("decoders", ()))
