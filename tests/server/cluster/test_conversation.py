"""Which replica a conversation belongs to: the same one while it grows, whichever others come and go."""

from collections import Counter
from typing import Any

import pytest

from server.cluster.conversation import conversation_of, ranking

USER = {"role": "user", "content": "What is a heap?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "A tree."}
MORE = {"role": "user", "content": "Which kind?"}
REPLICAS = [f"replica{n}" for n in range(10)]


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ({"messages": [SYSTEM, USER]}, {"messages": [SYSTEM, USER, ANSWER, MORE], "stream": True}),
        ({"system": "Be brief.", "messages": [USER]}, {"system": "Be brief.", "messages": [USER, ANSWER, MORE]}),
        ({"input": [USER], "instructions": "x"}, {"input": [USER, ANSWER, MORE], "instructions": "x"}),
        ({"prompt": "def f(x): " * 9}, {"prompt": "def f(x): " * 12}),
        ({"prompt": list(range(20))}, {"prompt": list(range(40))}),
        ({"prompt": ["a", "b"]}, {"prompt": ["a"]}),
        ({"prompt_cache_key": "k", "messages": [USER]}, {"prompt_cache_key": "k", "messages": [MORE]}),
    ],
)
def test_a_conversation_that_grows_stays_the_same(first: dict[str, Any], later: dict[str, Any]) -> None:
    assert conversation_of(first) is not None
    assert conversation_of(first) == conversation_of(later)


def test_other_conversations_are_others_and_nothing_is_none() -> None:
    bodies: list[dict[str, Any]] = [
        {"messages": [USER]}, {"messages": [SYSTEM, USER]}, {"messages": [MORE]}, {"prompt": "What"},
        {"messages": [USER], "system": "x"}, {"input": "What is a heap?"},
        {"messages": [{"role": "user", "content": "\ud800"}]},
    ]  # fmt: skip
    assert len({conversation_of(body) for body in bodies} - {None}) == len(bodies)
    empty: list[dict[str, Any]] = [{}, {"prompt": ""}, {"prompt": 7}, {"messages": []}, {"prompt_cache_key": ""}]
    assert [conversation_of(body) for body in empty] == [None] * len(empty)
    assert ranking(str(conversation_of(bodies[-1])), REPLICAS)


def test_replicas_share_evenly_and_a_lost_one_takes_only_its_own_along() -> None:
    owners = {n: ranking(f"conversation {n}", REPLICAS) for n in range(2000)}
    shares = Counter(order[0] for order in owners.values())
    assert len(shares) == 10 and min(shares.values()) > 140 and max(shares.values()) < 260
    for n, order in owners.items():
        assert ranking(f"conversation {n}", reversed(REPLICAS[1:])) == [name for name in order if name != REPLICAS[0]]
