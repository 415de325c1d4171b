"""How many digits an answer in JSON may write in a row, where its schema sets no end to them.

A schema bounds a number's value, not its digits, and a small model that has begun to repeat one goes on to the last
token. The bounds hold what programs read: 64 bits take at most 20 digits, nanoseconds nine, 128 bits 39, and with more
than 15 a fraction may be read as its neighbour, which an exclusive bound may forbid. What the schema says comes first:
where a number may not end yet, more digits follow. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llguidance import LLTokenizer

from server.engine.schema import SIGNIFICANT

Allowed = np.ndarray[Any, np.dtype[np.bool_]]

IN_NUMBER = 20  # before the point, and behind it, noughts at the beginning included
IN_EXPONENT = 2
IN_TEXT = 40  # of a text whose form leaves nothing but digits and what stands between them
IN_SECONDS = 9  # the fraction of a second, down to nanoseconds
QUOTE = re.compile(rb'\\.|(")', re.DOTALL)
RUN = re.compile(
    rb"(?:(?P<exponent>[0-9.][eE][+-]?)|(?P<seconds>:[0-9]{2}\.)|(?P<whole>[0-9]+)\.)?(?P<digits>[0-9]+)\Z"
)
WINDOW = 64  # tokens that are looked at: none is shorter than a digit
DIGITS = b"0123456789"
FORM = b"eEzZYMWDHST"  # letters of numbers, dates, times and durations; any other shows a text that is free


class DigitBounds:
    """Bounds for the tokens of one tokenizer."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        token_ids = range(tokenizer.vocab_size)
        self.tokens = [b"" if tokenizer.is_special_token(i) else tokenizer.decode_bytes([i]) for i in token_ids]
        self.leading = np.array([len(token) - len(token.lstrip(DIGITS)) for token in self.tokens])
        self.is_digit = np.array([token[-1:].isdigit() for token in self.tokens])
        self.is_point = np.array([token[:1] == b"." for token in self.tokens])
        self.longest = int(self.leading.max())
        firsts = [token[:1] for token in self.tokens]
        self.is_free = np.array([first > b"\x7f" or (first.isalpha() and first not in FORM) for first in firsts])
        self.single = np.array(
            [self.tokens.index(digit) for digit in map(str.encode, "0123456789") if digit in self.tokens]
        )

    def apply(self, allowed: Allowed, output_ids: Sequence[int], may_end: Callable[[int], bool]) -> Allowed:
        """[vocabulary] what is left of the tokens that the grammar allows behind these; never nothing.

        may_end: whether something else than a digit may follow behind one more token.
        """
        if not output_ids or not self.is_digit[output_ids[-1]]:
            return allowed
        run = RUN.search(b"".join(self.tokens[token_id] for token_id in output_ids[-WINDOW:]))
        if run is None or (len(run["digits"]) < SIGNIFICANT and self.longest <= num_left(run, is_number=False)
                           and self.longest <= num_left(run, is_number=True)):  # fmt: skip
            return allowed
        if (allowed & self.is_free).any():
            return allowed
        is_number = not self.is_text(output_ids)
        left = num_left(run, is_number=is_number)
        rest = allowed & (self.leading <= left)
        if is_number and run["whole"] is None and len(run["digits"]) >= SIGNIFICANT:
            rest &= ~self.is_point | ~(rest & ~self.is_point).any()  # no place for a fraction, where it may end without
        if rest.any():
            return rest
        return self.nearest_end(allowed, may_end) if is_number and left == 0 else allowed

    def is_text(self, output_ids: Sequence[int]) -> bool:
        """Whether JSON that goes as far as this stands within a text."""
        written = b"".join(self.tokens[token_id] for token_id in output_ids)
        return sum(bool(found[1]) for found in QUOTE.finditer(written)) % 2 == 1

    def nearest_end(self, allowed: Allowed, may_end: Callable[[int], bool]) -> Allowed:
        """Only the digits that let a number end which may not end as it is: it is to be more than nought, say, or a
        multiple. Where none does, a nought, which brings it nearer to most multiples; all of them where the grammar
        leaves not every digit, since then it knows the number's end itself.
        """
        if len(self.single) < len(DIGITS) or not allowed[self.single].all():
            return allowed
        chosen = [token_id for token_id in self.single.tolist() if may_end(token_id)] or self.single[:1]
        nearest = np.zeros_like(allowed)
        nearest[chosen] = True
        return nearest


def num_left(run: re.Match[bytes], *, is_number: bool) -> int:
    """How many digits may follow these."""
    used = len(run["digits"])
    if not is_number:
        return max(0, (IN_SECONDS if run["seconds"] else IN_TEXT) - used)
    if run["exponent"]:
        return max(0, IN_EXPONENT - used)
    if run["whole"] is None:
        return max(0, IN_NUMBER - used)
    significant = len((run["whole"] + run["digits"]).lstrip(b"0"))
    return max(0, min(IN_NUMBER - used, SIGNIFICANT - significant))
