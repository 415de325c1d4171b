"""What lm-evaluation-harness sends as ``local-completions``, and reads: log-likelihoods are transformers' in fp32."""

import pytest
import torch
from transformers import LlamaForCausalLM

from server.launch import ASSETS, load_model
from server.text import TextCodec

pytestmark = pytest.mark.anyio

QUESTIONS = [
    ("def add(a, b):\n    return a", [" + b", " - b", "(b)"]),
    ("import os\n\n\nprint(os.", ["path", "getcwd())", "🌍)"]),
    ("The sum of 2 and 3 is", [" 5.", " seven", " not known to anyone in this room"]),
]


@pytest.fixture(scope="module")
def codec():
    return TextCodec.from_folder(ASSETS / "target")


@pytest.fixture(scope="module")
def reference():
    return LlamaForCausalLM.from_pretrained(ASSETS / "target", dtype=torch.float32).eval()


def scored(choice, num_context):
    """As the harness reads a choice: the continuation's sum, and whether every token of it was the likeliest."""
    tokens, top = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
    assert tokens[0] is None and top[0] is None
    inside = slice(num_context, -1)
    greedy = all(value == max(best.values()) for value, best in zip(tokens[inside], top[inside], strict=True))
    return sum(tokens[inside]), greedy


async def test_log_likelihoods_are_those_of_transformers(connect, codec, reference):
    pairs = [
        (codec.encode(question), codec.encode(answer, add_special_tokens=False))
        for question, answers in QUESTIONS
        for answer in answers
    ]
    body = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    async with connect(load_model, target="tiny", weights="fp32", context=256, max_waiting=16) as client:
        sent = body | {"model": "tiny", "prompt": [context + continuation for context, continuation in pairs]}
        answer = (await client.post("/v1/completions", json=sent, timeout=200)).json()
        written = {
            "model": "tiny",
            "prompt": [pairs[0][0]],
            "max_tokens": 24,
            "temperature": 0,
            "stop": ["\n\n"],
            "seed": 1,
        }
        generated = (await client.post("/v1/completions", json=written, timeout=200)).json()["choices"][0]["text"]
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    for (context, continuation), choice in zip(pairs, choices, strict=True):
        ids = [*context, *continuation]
        with torch.inference_mode():
            log_probs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        rows = log_probs[len(context) - 1 : len(ids) - 1]
        own = rows.gather(1, torch.tensor(continuation)[:, None]).sum().item()
        total, greedy = scored(choice, len(context))
        assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1
        assert total == pytest.approx(own, abs=1e-3)
        assert greedy == (rows.argmax(-1).tolist() == continuation)
    with torch.inference_mode():
        ids = reference.generate(
            torch.tensor([pairs[0][0]]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert generated == codec.decode(ids[0, len(pairs[0][0]) :].tolist()).split("\n\n")[0]
