"""Fast ways to a token against the obvious ones: a draw without a sort, penalties that grow with the text."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from server.engine.request import Request, SamplingParams
from server.engine.sampling import draw, probabilities, row_chooser, uniform
from server.engine.selection import FIRST_PART, select_token
from server.engine.sequence import RunningSequence

VOCAB = 12
CUTS = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature, top_k, top_p, min_p in itertools.product((0.05, 0.8, 2.0), (0, 1, 40), (0.0, 0.9, 1.0), (0.0, 0.1))
]


def shapes(vocab_size: int) -> dict[str, Tensor]:
    """Rows of logits: as models give them, in steps that make many of them equal, with tokens forbidden, flat."""
    generator = torch.Generator().manual_seed(vocab_size)
    normal = 3 * torch.randn(vocab_size, generator=generator)
    forbidden = normal.clone()
    forbidden[::3] = float("-inf")
    peaked = normal.clone()
    peaked[vocab_size // 2] = 40
    one = torch.full((vocab_size,), float("-inf"))
    one[3] = 1.0
    return {
        "normal": normal, "in steps": (normal * 4).round() / 4, "forbidden": forbidden, "peaked": peaked,
        "flat": torch.zeros(vocab_size), "one left": one,
    }  # fmt: skip


def edges(probs: Tensor) -> list[float]:
    """Numbers on the borders between tokens, and the next ones on either side: where rounding decides."""
    shares = (probs.cumsum(0) / probs.sum()).unique()
    chosen = shares[:: max(1, len(shares) // 8)]
    beside = [chosen, chosen.nextafter(torch.ones(())), chosen.nextafter(torch.zeros(()))]
    return [number for number in torch.cat(beside).tolist() if number < 1]


@pytest.mark.parametrize("vocab_size", [5, 700, 4 * FIRST_PART * 8])
@pytest.mark.parametrize("shape", shapes(5))
def test_a_draw_without_a_sort_gives_the_token_of_the_sorted_one(shape: str, vocab_size: int) -> None:
    logits = shapes(vocab_size)[shape]
    answered: Counter[bool] = Counter()
    for cut in CUTS:
        params = SamplingParams(**cut)
        probs = probabilities(logits, params)
        random_numbers = [uniform(1, 0, position) for position in range(8)]
        for number in [0.0, 1 - 2**-53, *edges(probs), *random_numbers]:
            found = select_token(logits, params, number)
            assert found in (None, draw(probs, number)), (cut, number)
            if number in random_numbers:
                answered[found is not None] += 1
    if shape == "normal":
        assert answered[False] == 0  # the slow way is for borders


def test_what_is_not_a_number_is_left_to_the_slow_way() -> None:
    for bad in (float("nan"), float("inf")):
        assert select_token(torch.tensor([0.0, bad, 1.0]), SamplingParams(), 0.5) is None
    assert select_token(torch.full((3,), float("-inf")), SamplingParams(), 0.5) is None


def penalised(logits: Tensor, request: Request, output_ids: Sequence[int]) -> Tensor:
    """Bias and penalties from the whole text, token by token."""
    params, changed = request.sampling, logits.clone()
    for token_id, bias in params.logit_bias.items():
        changed[token_id] += bias
    if params.repetition_penalty != 1:
        for token_id in {*request.prompt_ids, *output_ids}:
            value = changed[token_id]
            changed[token_id] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    for token_id, count in Counter(output_ids).items():
        changed[token_id] -= params.presence_penalty + params.frequency_penalty * torch.tensor(float(count))
    return changed


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, repetition_penalty=1.3),
        SamplingParams(temperature=0, presence_penalty=0.7, frequency_penalty=-0.3),
        SamplingParams(0, repetition_penalty=0.8, presence_penalty=-0.1, frequency_penalty=0.45, logit_bias={5: 1.5}),
        SamplingParams(temperature=0, logit_bias={2: -100.0, 7: 3.25}),
    ],
)
def test_penalties_that_grow_with_the_text_are_those_of_the_whole_text(params: SamplingParams) -> None:
    """Rounds of random length over two hundred tokens: the rows on the way, and again after each commit."""
    rng = random.Random(0)
    request = Request("r", [rng.randrange(VOCAB // 2) for _ in range(9)], 10**6, params)
    sequence = RunningSequence.of(request)
    generator = torch.Generator().manual_seed(0)
    seen: list[Tensor] = []
    while sequence.num_output < 200:
        accepted: list[int] = []
        for _ in range(rng.randrange(1, 5)):
            logits = torch.randn(VOCAB, generator=generator)
            before = logits.clone()
            token_id = row_chooser(sequence, lambda _, logits=logits: logits)(0, accepted)
            want = penalised(before, request, [*sequence.token_ids[9:], *accepted])
            changed = before.clone()
            sequence.penalties.apply(changed.numpy(), sequence.token_ids, 9, accepted)
            torch.testing.assert_close(changed, want, rtol=0, atol=0)
            assert token_id == int(want.argmax())
            assert torch.equal(logits, before), "the target's own row is left as it is"
            accepted.append(rng.randrange(VOCAB))
            seen.append(want - before)
        sequence.commit(tuple(accepted))
    assert len({tuple(change.sign().tolist()) for change in seen}) > 1 or not sequence.penalties.counted


def test_penalties_count_the_rows_own_ancestors() -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=1.0)
    sequence = RunningSequence.of(Request("r", [1, 2], 10, params))
    sequence.commit((4,))
    logits = torch.zeros(VOCAB)
    logits[4], logits[5], logits[6] = 2.0, 1.2, 1.0
    choose = row_chooser(sequence, lambda row: logits)
    assert choose(0, []) == 5  # 4 was generated once: 2.0 - 1.5
    assert choose(1, [5]) == 6  # 5 is an ancestor now: 1.2 - 1.5
    assert choose(2, [5, 6]) == 4  # 4: 0.5, 6: -0.5, 5: -0.3
