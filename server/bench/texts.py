"""The texts a benchmark generates: which prompts fit, and what the target alone writes after them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.bench.contestants import Case, EngineContestant
from server.bench.prompts import Prompt
from server.text import TextCodec

Advance = Callable[[str, int, int], None]  # what is being done, how many steps are done, of how many


class BenchError(ValueError):
    """A benchmark that cannot be run as asked."""


@dataclass
class Texts:
    """The cases with the target's own texts, and how many prompts did not fit the context."""

    cases: list[Case] = field(default_factory=list)
    references: list[tuple[int, ...]] = field(default_factory=list)
    num_too_long: int = 0

    def json(self) -> dict[str, Any]:
        """How many texts there are, and how long they are on average."""
        count = len(self.cases)
        return {
            "texts": count,
            "texts_too_long": self.num_too_long,
            "mean_prompt_tokens": round(sum(len(case.prompt_ids) for case in self.cases) / count, 1),
            "mean_output_tokens": round(sum(map(len, self.references)) / count, 1),
        }


def generate_references(
    plain: EngineContestant,
    codec: TextCodec,
    prompts: Sequence[Prompt],
    max_tokens: int,
    ignore_eos: bool,
    advance: Advance,
) -> Texts:
    """Generate every text once by plain decoding. This warms up, fixes the cases and gives the texts to compare with.

    A chat's later turns follow the target's own answers to the earlier ones. Errors: BenchError where no prompt fits
    the context.
    """
    texts = Texts()
    stop_ids: frozenset[int] = frozenset() if ignore_eos else codec.stop_ids
    context = plain.engine.options.context_length
    for number, prompt in enumerate(prompts, start=1):
        messages: list[dict[str, str]] = []
        for turn in prompt.turns or (None,):
            if turn is None:
                prompt_ids = codec.encode(prompt.text or "")
            else:
                messages.append({"role": "user", "content": turn})
                prompt_ids = codec.chat(messages)
            if len(prompt_ids) + max_tokens > context:
                texts.num_too_long += 1
                break
            case = Case(prompt.name, tuple(prompt_ids), max_tokens, stop_ids)
            answer = plain.run(case).token_ids
            texts.cases.append(case)
            texts.references.append(answer)
            shown = itertools.takewhile(lambda token_id: token_id not in codec.stop_ids, answer)
            messages.append({"role": "assistant", "content": codec.decode(list(shown))})
        advance("reference texts", number, len(prompts))
    if not texts.cases:
        raise BenchError(f"none of the {len(prompts)} prompts fits a context of {context} tokens")
    return texts
