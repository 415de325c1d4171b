"""Vectors of texts, and the tokenizer over HTTP."""

import base64
import struct

import pytest

pytestmark = pytest.mark.anyio
TEXT = "Grüße 🌍, one"
CHAT = [{"role": "user", "content": "one <|end|>"}]


async def post(client, path, **body):
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_every_shape_of_input_has_its_vectors_in_order(connect, make_model):
    model = make_model(max_waiting=40)
    async with connect(model) as client:
        for given, count in ((TEXT, 1), ([TEXT] * 20, 20), ([5, 6], 1), ([[5], [6, 7]], 2)):
            body = await post(client, "/v1/embeddings", input=given, user="me")
            assert [entry["index"] for entry in body["data"]] == list(range(count))
            assert body["data"][0]["embedding"] == [0.6, 0.8, 0.0, -0.0]
        assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        packed = (await post(client, "/v1/embeddings", input=TEXT, encoding_format="base64"))["data"][0]["embedding"]
    assert struct.unpack("<4f", base64.b64decode(packed)) == pytest.approx((0.6, 0.8, 0, 0))
    assert all(request.max_tokens == 0 for request in model.engine.submitted)


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/v1/embeddings", {"input": TEXT, "dimensions": 2}, "dimensions", "unsupported_parameter"),
        ("/v1/embeddings", {"input": [TEXT, ""]}, "input", "invalid_value"),
        ("/v1/embeddings", {"input": [5, 10**6]}, "input", "invalid_value"),
        ("/v1/embeddings", {"input": [5] * 500}, None, "context_length_exceeded"),
        ("/v1/embeddings", {"input": TEXT, "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ("/tokenize", {"prompt": TEXT, "content": TEXT}, "prompt", "invalid_value"),
        ("/tokenize", {}, "prompt", "invalid_value"),
        ("/tokenize", {"messages": [{"role": "nobody"}]}, "messages.0.role", "invalid_value"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "invalid_value"),
        ("/detokenize", {"tokens": "x"}, "tokens", "invalid_type"),
        ("/apply-template", {"messages": []}, "messages", "invalid_value"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(connect, make_model, path, body, param, code):
    async with connect(make_model()) as client:
        answer = await client.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)


async def test_tokens_there_and_back(connect, make_model):
    model = make_model()
    ids = model.codec.encode(TEXT)
    async with connect(model) as client:
        told = await post(client, "/tokenize", prompt=TEXT, return_token_strs=True)
        assert told["tokens"] == ids == (await post(client, "/tokenize", content=TEXT))["tokens"]
        assert (told["count"], told["max_model_len"], len(told["token_strs"])) == (len(ids), 200, len(ids))
        pieces = (await post(client, "/tokenize", content=TEXT, with_pieces=True))["tokens"]
        for name in ("prompt", "content"):
            assert (await post(client, "/detokenize", tokens=[*ids, 0]))[name] == TEXT + "<|end|>"
        rendered = (await post(client, "/apply-template", messages=CHAT))["prompt"]
        chat = (await post(client, "/tokenize", messages=CHAT))["tokens"]
        bare = await post(client, "/tokenize", messages=CHAT, add_generation_prompt=False)
        info = (await client.get("/tokenizer_info")).json()
    joined = b"".join(p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces)
    assert joined == TEXT.encode()
    assert any(isinstance(piece["piece"], list) for piece in pieces)
    assert rendered == "<|im_start|>user\none <|end|><|im_end|>\n<|im_start|>assistant\n"
    assert (chat[0], 0 in chat, len(bare["tokens"]) < len(chat)) == (1, False, True)
    assert (info["eos_token"], "im_start" in info["chat_template"]) == ("<|end|>", True)


async def test_models_say_how_large_they_are(connect, make_model):
    async with connect(make_model()) as client:
        listed = (await client.get("/v1/models")).json()["data"][0]
        single = (await client.get("/v1/models/tiny")).json()
    assert listed == single
    assert (listed["meta"]["n_vocab"], listed["meta"]["n_params"], listed["max_model_len"]) == (300, 1000, 200)
