"""Logit bias and penalties of one request, kept up as its tokens come. No torch here.

Presence and frequency count generated tokens (OpenAI's definition); the repetition penalty divides positive and
multiplies negative logits of every token seen in prompt or output (CTRL, Keskar et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from server.engine.request import Request

Array = np.ndarray[Any, np.dtype[Any]]


class Penalties:
    """One row for each token that the request has seen, so that a new token costs one row and not all of the text."""

    def __init__(self, request: Request) -> None:
        self.params = params = request.sampling
        self.bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
        self.biases = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self.repeats = params.repetition_penalty != 1
        self.counted = self.repeats or bool(params.presence_penalty or params.frequency_penalty)
        self.num_taken = 0
        self.places: dict[int, int] = {}
        self.ids = np.zeros(64, dtype=np.int64)
        self.counts = np.zeros(64, dtype=np.float32)
        if self.repeats:
            for token_id in request.prompt_ids:
                self._place(token_id)

    @property
    def change_nothing(self) -> bool:
        """Whether logits stay as they are."""
        return not self.counted and not self.biases.size

    def apply(self, logits: Array, token_ids: Sequence[int], num_prompt: int, accepted: Sequence[int]) -> None:
        """Change the logits [vocabulary] fp32, in place, of the row behind a text and what was accepted on the way.

        The first ``num_prompt`` of the text's ``token_ids`` are its prompt. Texts only grow from one call to the next.
        Errors: IndexError for a bias outside the vocabulary.
        """
        logits[self.bias_ids] += self.biases
        if not self.counted:
            return
        num_committed = len(token_ids) - num_prompt
        for place in range(self.num_taken, num_committed + len(accepted)):
            known = place < num_committed
            self.counts[self._place(token_ids[num_prompt + place] if known else accepted[place - num_committed])] += 1
        self.num_taken = num_committed + len(accepted)
        ids, counts = self.ids[: len(self.places)], self.counts[: len(self.places)]
        values = logits[ids]
        if self.repeats:
            factor = self.params.repetition_penalty
            values = np.where(values > 0, values / factor, values * factor)
        values -= np.where(counts > 0, self.params.presence_penalty + self.params.frequency_penalty * counts, 0)
        logits[ids] = values

    def _place(self, token_id: int) -> int:
        """The token's row; a new one where it has none."""
        place = self.places.setdefault(token_id, len(self.places))
        if place == len(self.ids):
            self.ids, self.counts = (np.concatenate([part, np.zeros_like(part)]) for part in (self.ids, self.counts))
        self.ids[place] = token_id
        return place
