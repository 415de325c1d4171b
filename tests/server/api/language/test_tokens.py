"""What answers tell of single tokens: log-probabilities, ids, the echoed prompt's share, and choosing by them."""

import pytest

pytestmark = pytest.mark.anyio
ANSWER = "Grüße 🌍, one two three. STOP and more"
STOPS = [None, ["STOP"], ["TOP and"], ["ß"], ["🌍"]]


async def post(client, path="/v1/completions", **fields):
    body = {"max_tokens": 100, "temperature": 0} | fields
    if path == "/v1/completions":
        body = {"prompt": "one"} | body
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer


def joined(entries):
    """The four lists of a stream's chunks, each put together."""
    parts = [entry["logprobs"] for entry in entries if entry["logprobs"]]
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("stop", STOPS)
async def test_tokens_joined_are_the_text_whole_and_streamed(connect, make_model, read_events, size, stop):
    async with connect(make_model(size=size)) as client:
        whole = (await post(client, logprobs=2, stop=stop, echo=True)).json()["choices"][0]
        events = read_events((await post(client, logprobs=2, stop=stop, echo=True, stream=True)).text)
    streamed = [event["choices"][0] for event in events[:-1]]
    told = whole["logprobs"]
    assert len({len(values) for values in told.values()}) == 1
    assert "".join(told["tokens"]).startswith(whole["text"])
    if stop is None:
        assert "".join(told["tokens"]) == whole["text"] == "one" + ANSWER
    for token, start in zip(told["tokens"], told["text_offset"], strict=True):
        assert whole["text"][start:].startswith(token[: len(whole["text"]) - start])
    assert joined(streamed) == told
    assert "".join(choice["text"] for choice in streamed) == whole["text"]


@pytest.mark.parametrize("size", [1, 5])
async def test_tokens_joined_are_the_text_where_its_end_cuts_a_character(connect, make_model, read_events, size):
    cut = 0
    async with connect(make_model(size=size)) as client:
        for count in range(2, 14):
            asked = {"logprobs": 0, "max_tokens": count, "echo": count % 2 == 0}
            whole = (await post(client, **asked)).json()["choices"][0]
            events = read_events((await post(client, **asked, stream=True)).text)
            assert "".join(whole["logprobs"]["tokens"]) == whole["text"]
            assert joined([event["choices"][0] for event in events[:-1]]) == whole["logprobs"]
            cut += whole["text"].endswith("\ufffd")
    assert cut >= 4


async def test_each_token_stands_beside_its_alternatives(connect, make_model):
    model = make_model()
    ids = [*model.codec.encode(ANSWER), model.codec.tokenizer.token_to_id("<|end|>")]
    async with connect(model) as client:
        told = (await post(client, logprobs=1, echo=True)).json()["choices"][0]["logprobs"]
        only = (await post(client, logprobs=3, echo=True, max_tokens=0)).json()
        named = await post(client, logprobs=0, return_tokens_as_token_ids=True)
    prompt = model.codec.encode("one")
    assert told["token_logprobs"] == [None, *(-i / 100 for i in [*prompt[1:], *ids])]
    assert told["top_logprobs"][0] is None
    for token, value, top in list(zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True))[1:]:
        assert top[token] == value == max(top.values())
    assert only["choices"][0]["text"] == "one"
    assert len(only["choices"][0]["logprobs"]["tokens"]) == len(prompt)
    assert only["usage"]["completion_tokens"] == 0
    assert named.json()["choices"][0]["logprobs"]["tokens"] == [f"token_id:{i}" for i in ids]


@pytest.mark.parametrize("stream", [False, True])
async def test_bytes_of_a_chats_tokens_are_those_of_its_text(connect, make_model, read_events, stream):
    fields = {"messages": [{"role": "user", "content": "one"}], "logprobs": True, "top_logprobs": 2}
    async with connect(make_model()) as client:
        answer = await post(client, "/v1/chat/completions", stream=stream, **fields)
    choices = [e["choices"][0] for e in read_events(answer.text)[:-1]] if stream else [answer.json()["choices"][0]]
    content = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == ANSWER
    assert "".join(token["token"] for token in content) == ANSWER
    assert all(len(token["top_logprobs"]) == 2 for token in content)
    half = next(token for token in content if token["bytes"] == [0xF0])
    assert half["token"] == ""
    assert {"\\x" in other["token"] for token in content for other in token["top_logprobs"]} == {True, False}


async def test_ids_of_prompt_and_answer(connect, make_model, read_events):
    model = make_model()
    ids = [*model.codec.encode(ANSWER), model.codec.tokenizer.token_to_id("<|end|>")]
    async with connect(model) as client:
        whole = (await post(client, return_token_ids=True, echo=True, prompt_logprobs=1)).json()["choices"][0]
        stopped = (await post(client, return_token_ids=True, stop="STOP")).json()
        events = read_events((await post(client, return_token_ids=True, stream=True)).text)
    prompt = model.codec.encode("one")
    assert (whole["token_ids"], whole["prompt_token_ids"], whole["logprobs"]) == (ids, prompt, None)
    assert whole["prompt_logprobs"][0] is None
    assert [list(entry) for entry in whole["prompt_logprobs"][1:]] == [[str(i)] for i in prompt[1:]]
    assert len(stopped["choices"][0]["token_ids"]) == stopped["usage"]["completion_tokens"] < len(ids)
    assert [i for event in events[:-1] for i in event["choices"][0]["token_ids"]] == ids


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stop", [None, "STOP"])
async def test_accepted_drafts_are_told_where_asked(connect, make_model, read_events, path, stop):
    fields = {"stop": stop, "messages": [{"role": "user", "content": "one"}], "return_drafted": True}
    async with connect(make_model(size=3)) as client:
        whole = (await post(client, path, **fields)).json()["choices"][0]
        events = read_events((await post(client, path, stream=True, **fields)).text)
        silent = (await post(client, path, stop=stop, messages=fields["messages"])).json()["choices"][0]
    tokens = [token for event in events[:-1] for token in event["choices"][0].get("tokens", [])]
    assert tokens == whole["tokens"]
    assert "".join(token["text"] for token in tokens) == (whole.get("text") or whole["message"]["content"])
    assert [token["drafted"] for token in tokens[:9]] == [True, True, False] * 3
    assert "tokens" not in silent


async def test_the_likeliest_of_many_are_given(connect, make_model):
    model = make_model(script=lambda request: [(30 - 3 * request.choice, 2 * request.choice + 30)] * 2)
    async with connect(model) as client:
        body = (await post(client, prompt=["one", "two"], best_of=3, n=2, max_tokens=4)).json()
        refused = [
            (await client.post("/v1/completions", json={"prompt": "a", **fields})).json()["error"]["param"]
            for fields in ({"best_of": 1, "n": 2}, {"best_of": 2, "stream": True}, {"best_of": 0}, {"logprobs": 21})
        ]
    best = [model.codec.decode([30 - 3 * c, 2 * c + 30] * 2) for c in (2, 1)]
    assert [choice["text"] for choice in body["choices"]] == best * 2
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 24
    assert refused == ["best_of", "best_of", "best_of", "logprobs"]


async def test_a_prompt_is_cut_only_where_asked(connect, make_model):
    model = make_model()
    async with connect(model) as client:
        body = (await post(client, prompt=[5, 6, 7, 8], truncate_prompt_tokens=3, echo=True, max_tokens=2)).json()
        await post(client, prompt=[5] * 500, truncate_prompt_tokens=-1)
        refused = await client.post("/v1/completions", json={"prompt": "a", "truncate_prompt_tokens": 0})
    assert [list(request.prompt_ids) for request in model.engine.submitted] == [[6, 7, 8], [5] * 100]
    assert body["choices"][0]["text"].startswith(model.codec.decode([6, 7, 8]))
    assert refused.json()["error"]["param"] == "truncate_prompt_tokens"


async def test_special_tokens_are_text_where_asked(connect, make_model):
    end, start = 0, 1
    model = make_model(script=lambda request: [(start, 40, end)])
    async with connect(model) as client:
        plain = (await post(client)).json()["choices"][0]
        special = (await post(client, skip_special_tokens=False)).json()["choices"][0]
        ignored = await post(client, skip_special_tokens=False, ignore_eos=True, max_tokens=3)
    text = model.codec.decode([40])
    assert (plain["text"], special["text"]) == (text, f"<|im_start|>{text}")
    assert ignored.json()["choices"][0]["text"] == f"<|im_start|>{text}<|end|>"
