"""Acceptance keeps the target's own text, and its distribution when sampling: chi-square with negative controls."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TypicalLogitsWarper

from drafters.proposal import Proposal, chain
from server.engine.acceptance import Accepted, accept, greedy
from server.engine.request import SamplingParams
from server.engine.sampling import draw, probabilities, uniform

VOCAB = 12
DRAWS = 100_000
TREE = Proposal((3, 7, 1, 5, 3, 9), (None, None, None, 0, 0, 3), (-1.0,) * 6)


def logits_for(path: Sequence[int]) -> torch.Tensor:
    """A fixed random target: logits depend on the tokens since the root."""
    generator = torch.Generator().manual_seed(hash(tuple(path)) % 2**31)
    return torch.randn(VOCAB, generator=generator) * 1.5


def test_greedy_follows_the_argmax_to_the_first_token_that_is_no_child() -> None:
    # rows: 0 root, 1:3, 2:7, 3:1, 4:5 (below 1), 5:3 (below 1), 6:9 (below 4)
    accepted = accept(TREE, greedy([3, 5, 0, 0, 9, 0, 2]))
    assert accepted == Accepted((0, 1, 4, 6), (3, 5, 9, 2))
    assert accepted.num_drafts == 3
    assert accept(TREE, greedy([0] * 7)) == Accepted((0,), (0,))
    assert accept(Proposal(), greedy([4])) == Accepted((0,), (4,))


class SampledTarget:
    """Draws from the fixed random target, as plain decoding does, or from the rows of trees."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    def token_after(self, path: tuple[int, ...], seed: int, position: int) -> int:
        if path not in self.known:
            self.known[path] = probabilities(logits_for(path), self.params)
        return draw(self.known[path], uniform(seed, 0, position))

    def plain(self, seed: int, num_tokens: int) -> tuple[int, ...]:
        text: tuple[int, ...] = ()
        while len(text) < num_tokens:
            text = (*text, self.token_after(text, seed, len(text)))
        return text

    def round(self, proposal: Proposal, start: tuple[int, ...], seed: int) -> Accepted:
        """One verify pass: a row's distribution belongs to the tokens above that row in the tree."""

        def choose(row: int, tokens: Sequence[int]) -> int:
            return self.token_after((*start, *path_to(proposal, row)), seed, len(start) + len(tokens))

        return accept(proposal, choose)


def path_to(proposal: Proposal, row: int) -> tuple[int, ...]:
    """The drafted tokens from the root to a row, found by the parents alone."""
    tokens: list[int] = []
    node = row - 1 if row else None
    while node is not None:
        tokens.insert(0, proposal.token_ids[node])
        node = proposal.parents[node]
    return tuple(tokens)


def p_value(texts: Counter[tuple[int, ...]], expected: Callable[[tuple[int, ...]], float]) -> float:
    """Chi-square of the counts; cells too rare for it are pooled. Mass outside the support gives 0."""
    shares = {text: expected(text) for text in texts}
    if any(share == 0 for share in shares.values()):
        return 0.0
    common = [text for text in texts if shares[text] * DRAWS >= 10]
    observed = [texts[text] for text in common]
    wanted = [shares[text] * DRAWS for text in common]
    observed.append(DRAWS - sum(observed))
    wanted.append(DRAWS - sum(wanted))
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], [w * sum(observed[:-1]) / sum(wanted[:-1]) for w in wanted[:-1]]
    return float(stats.chisquare(observed, np.array(wanted) * sum(observed) / sum(wanted)).pvalue)


def joint(params: SamplingParams) -> Callable[[tuple[int, ...]], float]:
    def share(text: tuple[int, ...]) -> float:
        product = 1.0
        for i, token_id in enumerate(text):
            product *= textbook_probabilities(logits_for(text[:i]), params)[token_id]
        return product

    return share


def textbook_probabilities(logits: torch.Tensor, params: SamplingParams) -> list[float]:
    """Temperature, and one way of cutting at most, written down once more without the code under test."""
    weights = np.exp(logits.double().numpy() / params.temperature)
    probs = weights / weights.sum()
    order = probs.argsort()[::-1].tolist()
    kept = [
        token_id
        for place, token_id in enumerate(order)
        if (params.top_k == 0 or place < params.top_k)
        and (place == 0 or probs[order[:place]].sum() < params.top_p)
        and probs[token_id] >= params.min_p * probs.max()
    ]
    total = probs[kept].sum()
    return [float(probs[token_id] / total) if token_id in kept else 0.0 for token_id in range(VOCAB)]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.5, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.0, min_p=0.1),
    ],
    ids=["T1", "T0.5", "T1.5 top-p", "top-k", "min-p"],
)
def test_two_tokens_drawn_one_by_one_follow_the_chain_rule(params: SamplingParams) -> None:
    target = SampledTarget(params)
    assert p_value(Counter(target.plain(seed, 2) for seed in range(DRAWS)), joint(params)) > 1e-4


@pytest.mark.parametrize("proposal", [TREE, chain([3, 5, 9]), Proposal()], ids=["tree", "chain", "nothing drafted"])
def test_rounds_through_any_tree_write_the_text_of_plain_decoding(proposal: Proposal) -> None:
    target = SampledTarget(SamplingParams(temperature=0.8))
    accepted: Counter[int] = Counter()
    for seed in range(2000):
        text: tuple[int, ...] = ()
        while len(text) < 4:
            found = target.round(proposal, text, seed)
            assert path_to(proposal, found.rows[-1]) == found.token_ids[:-1], "the rows kept are those of the tokens"
            accepted[found.num_drafts] += 1
            text += found.token_ids
        assert text == target.plain(seed, len(text))
    assert set(accepted) == set(range(1 + max(map(len, (path_to(proposal, row) for row in range(proposal.num_rows))))))


def test_negative_control_bonus_from_raw_logits_is_caught() -> None:
    """The published code draws the bonus token without temperature; at T = 0.5 the test must see it."""
    params = SamplingParams(temperature=0.5)
    raw = SamplingParams(temperature=1.0)
    texts: Counter[tuple[int, ...]] = Counter()
    for seed in range(DRAWS):

        def choose(row: int, tokens: Sequence[int], seed: int = seed) -> int:
            used = params if TREE.children[row] else raw
            return draw(probabilities_of(tuple(tokens), used), uniform(seed, 0, len(tokens)))

        token_ids = accept(TREE, choose).token_ids
        texts[token_ids if len(token_ids) == 2 else (*token_ids[:2], *([-1] * (2 - len(token_ids))))] += 1
    complete = Counter({text: n for text, n in texts.items() if -1 not in text and text[0] in (7, 1, 3)})
    second = Counter({(t[1],): 0 for t in complete})
    for (first, token_id), n in complete.items():
        if first == 7:  # node 7 is a leaf: its bonus came from the raw logits
            second[(token_id,)] += n
    total = sum(second.values())
    wanted = probabilities(logits_for((7,)), params)
    observed = [second.get((t,), 0) for t in range(VOCAB)]
    assert stats.chisquare(observed, (wanted * total).numpy()).pvalue < 1e-6


_CACHE: dict[tuple[tuple[int, ...], float], torch.Tensor] = {}


def probabilities_of(path: tuple[int, ...], params: SamplingParams) -> torch.Tensor:
    key = (path, params.temperature)
    if key not in _CACHE:
        _CACHE[key] = probabilities(logits_for(path), params)
    return _CACHE[key]


def first_token_counts(rule: Callable[[torch.Tensor, np.random.Generator], int]) -> list[int]:
    generator = np.random.default_rng(0)
    probs = probabilities_of((), SamplingParams())
    counts = Counter(rule(probs, generator) for _ in range(DRAWS))
    return [counts.get(t, 0) for t in range(VOCAB)]


def test_negative_controls_for_the_acceptance_rule_are_caught() -> None:
    """p/q on a deterministic child, and a residual that is not renormalised, must both fail the same test."""
    draft_probs = probabilities_of((1, 2, 3), SamplingParams())
    child = int(draft_probs.argmax())

    def ratio_on_deterministic_child(probs: torch.Tensor, generator: np.random.Generator) -> int:
        if generator.random() < min(1.0, float(probs[child] / draft_probs[child])):
            return child
        residual = (probs - draft_probs).clamp(min=0)
        return draw(residual / residual.sum(), generator.random())

    def without_renormalising(probs: torch.Tensor, generator: np.random.Generator) -> int:
        for token_id in (3, 7, 1):  # each against the full mass instead of what the earlier ones left
            if generator.random() < float(probs[token_id]):
                return token_id
        rest = probs.clone()
        rest[[3, 7, 1]] = 0
        return draw(rest / rest.sum(), generator.random())

    wanted = (probabilities_of((), SamplingParams()) * DRAWS).numpy()
    for rule in (ratio_on_deterministic_child, without_renormalising):
        assert stats.chisquare(first_token_counts(rule), wanted).pvalue < 1e-6


def test_truncation_never_emits_what_it_cut() -> None:
    logits = logits_for((4,))
    order = logits.argsort(descending=True).tolist()
    assert set(probabilities(logits, SamplingParams(top_k=5)).nonzero().flatten().tolist()) == set(order[:5])
    probs = torch.softmax(logits.double(), 0)
    kept = set(probabilities(logits, SamplingParams(top_p=0.9)).nonzero().flatten().tolist())
    mass = 0.0
    wanted = set()
    for token_id in order:
        wanted.add(token_id)
        mass += float(probs[token_id])
        if mass >= 0.9:
            break
    assert kept == wanted
    assert set(probabilities(logits, SamplingParams(top_p=0.0)).nonzero().flatten().tolist()) == {order[0]}
    kept = set(probabilities(logits, SamplingParams(min_p=0.3)).nonzero().flatten().tolist())
    assert kept == set((probs >= 0.3 * probs.max()).nonzero().flatten().tolist())


def test_draw_stays_inside_the_support() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0], dtype=torch.float64)
    assert [draw(probs, u) for u in (0.0, 0.2499, 0.25, 0.999999, 1.0 - 2**-53)] == [1, 1, 3, 3, 3]


def test_uniform_numbers_depend_on_seed_choice_and_position_only() -> None:
    assert uniform(1, 0, 0) == uniform(1, 0, 0)
    assert len({uniform(s, c, p) for s in range(5) for c in range(5) for p in range(5)}) == 125
    numbers = [uniform(0, 0, p) for p in range(20_000)]
    assert stats.kstest(numbers, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("mass", [0.2, 0.6, 0.95])
def test_typical_sampling_keeps_what_transformers_keeps(mass: float) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)).double() * 2
    scores = TypicalLogitsWarper(mass)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]
    kept = probabilities(logits, SamplingParams(typical_p=mass)).nonzero().flatten().tolist()
    assert kept == scores.isfinite().nonzero().flatten().tolist()
    assert 0 < len(kept) < 50
