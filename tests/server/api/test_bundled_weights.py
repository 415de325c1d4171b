"""`serve` on the bundled pair in each low-bit format, loaded as the command loads it, up to the answers of the API."""

import pytest

from kernels import native
from server.launch import load_model

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(native.library() is None, reason="the native kernels are not built"),
]
PROMPT = "def add(a, b):\n"


def request(**fields: object) -> dict:
    return {"prompt": PROMPT, "max_tokens": 24, "temperature": 0} | fields


@pytest.mark.parametrize("weights", ["int8", "int4"])
async def test_low_bit_weights_and_int8_slots_serve_end_to_end(connect, read_events, weights):
    served = {
        "weights": weights,
        "kv_cache": "int8",
        "max_seqs": 2,
        "context": 256,
        "model_name": "dovetail",
        "target": "tiny",
    }
    async with connect(load_model, **served, drafter="none", lookup=False) as client:
        plain = await client.post("/v1/completions", json=request(model="dovetail"))
    # Trees of a fixed size: whether rows pay is a matter of this machine's load, and a test asserts no time.
    async with connect(load_model, **served, trees="fixed") as client:
        name = (await client.get("/v1/models")).json()["data"][0]["id"]
        drafted = (await client.post("/v1/completions", json=request(model=name))).json()
        stream = await client.post("/v1/completions", json=request(model=name, stream=True))
        events = read_events(stream.text)
    text = plain.json()["choices"][0]["text"]
    assert drafted["usage"]["completion_tokens"] == 24 and drafted["choices"][0]["text"] == text
    assert "".join(event["choices"][0]["text"] for event in events[:-1] if event["choices"]) == text
    assert events[-1] == "[DONE]"
    assert plain.json()["timings"]["draft_n"] == 0 < drafted["timings"]["draft_n"]
