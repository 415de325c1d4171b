"""The default model as it is served: its own codes with activations in bytes, beside the same weights in fp32."""

from pathlib import Path

import pytest

from server.own_models import OwnModelError, default_target
from server.targets.gguf.loading import load_gguf_target
from server.targets.gguf.tokenizer import read_codec
from server.targets.target import PrefillChunk


def greedy(file: Path, weights: str | None, prompt: list[int], count: int) -> list[int]:
    target = load_gguf_target(file, weights, 1, 64)
    answer: list[int] = []
    while len(answer) < count:
        features = target.prefill(PrefillChunk(0, prompt + answer)).features
        target.release(0)
        answer.append(int(target.head(features[-1:]).argmax()))
    return answer


def test_its_greedy_answer_begins_as_that_of_its_weights_in_fp32() -> None:
    try:
        file = default_target()
    except OwnModelError as error:
        pytest.skip(str(error))
    codec = read_codec(file)
    prompt = codec.encode("The capital of France is")
    wanted = greedy(file, "fp32", prompt, 5)
    assert codec.decode(wanted).startswith(" Paris")
    assert greedy(file, None, prompt, 5) == wanted
