"""Log-probabilities are those of the target alone, whatever is drafted and in whatever chunks a prompt is read."""

import pytest
import torch

from doubles import OracleDrafter, tiny_llama
from drafters.proposal import Budget
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.logprobs import ROWS_AT_ONCE, rank, rank_prompt
from server.engine.request import FinishReason, Request, SamplingParams
from server.engine.sequence import RunningSequence
from server.targets.target import PrefillChunk
from server.targets.torch_target import TorchTarget

PROMPT = [1, 2, 3, 4, 5, 6, 7] * 6
SAMPLED = SamplingParams(temperature=1.2, top_k=40, frequency_penalty=0.3, logit_bias={9: 5.0}, seed=7)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def target(model, save_model):
    return TorchTarget.load(save_model(model, "logprobs"), "fp32", num_slots=2, capacity=160)


def run(target, request, drafter=None, chunk=256):
    engine = Engine(target, drafter, EngineOptions(2, 120, Budget(16, 4, 3), chunk))
    return generate(engine, [request])[request.request_id]


def expected(model, token_ids):
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([token_ids])).logits[0].float(), dim=-1)


def flat(completion):
    return [ranked.log_prob for ranked in completion.ranked]


@pytest.mark.parametrize("chunk", [3, ROWS_AT_ONCE, len(PROMPT)])
def test_a_prompts_tokens_are_ranked_as_the_model_ranks_them(model, target, chunk):
    request = Request("r", PROMPT, 0, prompt_logprobs=4)
    result = run(target, request, chunk=chunk)
    assert result.finished.reason is FinishReason.LENGTH
    assert result.token_ids == []
    assert len(result.prompt_ranked) == len(PROMPT) - 1
    want = expected(model, PROMPT)
    for row, (token_id, ranked) in enumerate(zip(PROMPT[1:], result.prompt_ranked, strict=True)):
        assert ranked.token_id == token_id
        assert ranked.log_prob == pytest.approx(float(want[row, token_id]), abs=1e-4)
        assert ranked.place == int((want[row] > want[row, token_id]).sum()) + 1
        values = [value for _, value in ranked.top]
        assert values == pytest.approx(want[row].topk(4).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0), SAMPLED], ids=["greedy", "sampled"])
def test_an_answers_tokens_are_ranked_the_same_with_and_without_drafts(model, target, sampling):
    plain = run(target, Request("r", PROMPT, 24, sampling, num_logprobs=2, draft=False))
    oracle = OracleDrafter([PROMPT + plain.token_ids], model.config.vocab_size)
    drafted = run(target, Request("r", PROMPT, 24, sampling, num_logprobs=2), oracle)
    assert drafted.token_ids == plain.token_ids
    assert sum(drafted.drafted) > 10
    want = expected(model, [*PROMPT, *plain.token_ids])[len(PROMPT) - 1 : -1]
    own = want.gather(1, torch.tensor(plain.token_ids)[:, None])[:, 0].tolist()
    assert flat(plain) == pytest.approx(own, abs=1e-4)
    assert flat(drafted) == pytest.approx(own, abs=1e-4)
    assert [len(ranked.top) for ranked in drafted.ranked] == [2] * 24


def test_a_ranked_prompt_is_read_whole_though_it_is_known(target):
    options = EngineOptions(2, 120, Budget(16, 4, 3), 4, cache_bytes=2**20)
    engine = Engine(target, None, options)
    first = generate(engine, [Request("a", PROMPT, 0, prompt_logprobs=0)])["a"]
    again = generate(engine, [Request("b", PROMPT, 0, prompt_logprobs=0)])["b"]
    known = generate(engine, [Request("c", PROMPT, 0)])["c"]
    assert again.prompt_ranked == first.prompt_ranked
    assert (again.finished.stats.cached, known.finished.stats.cached > 0) == (0, True)


def test_a_prompt_that_is_read_again_says_nothing_twice(target):
    sequence = RunningSequence.of(Request("r", PROMPT, 1, prompt_logprobs=1))
    read = target.prefill(PrefillChunk(0, PROMPT))
    whole = rank_prompt(sequence, 0, read)[0].ranked
    sequence.num_ranked = 10
    rest = rank_prompt(sequence, 0, read)[0].ranked
    assert rank_prompt(sequence, 0, read) == []
    target.release(0)
    assert rest == whole[10:]


@pytest.mark.parametrize("chunk", [5, 256])
def test_a_prompts_vector_is_the_mean_of_its_last_features(model, target, chunk):
    vector = torch.tensor(run(target, Request("r", PROMPT, 0, pools=True), chunk=chunk).vector)
    with torch.inference_mode():
        mean = model.base_model(torch.tensor([PROMPT])).last_hidden_state[0].mean(dim=0)
    assert torch.allclose(vector, mean / mean.norm(), atol=1e-5)


def test_a_request_bounds_its_own_trees(target):
    text = run(target, Request("r", PROMPT, 24, SamplingParams(temperature=0), draft=False)).token_ids
    seen = []
    verify = target.verify
    for max_rows in (None, 3, 1):
        oracle = OracleDrafter([PROMPT + text], 67)
        target.verify = lambda rows: seen.append(max(part.proposal.num_rows for part in rows)) or verify(rows)
        try:
            request = Request("r", PROMPT, 24, SamplingParams(temperature=0), max_rows=max_rows)
            assert run(target, request, oracle).token_ids == text
        finally:
            del target.verify
        assert max(seen) == {None: 16, 3: 3, 1: 1}[max_rows]
        seen.clear()


def test_a_token_that_cannot_come_has_a_number_all_the_same():
    ranked = rank(torch.tensor([[0.0, float("-inf")]]), [1], 5)[0]
    assert (ranked.log_prob, ranked.place) == (-9999.0, 2)
    assert ranked.top == ((0, 0.0), (1, -9999.0))
