"""Models of every architecture that runs on the native layers, through the loader: transformers' text, with drafts."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import ARCHITECTURES, LONG_ROPE, tiny_model
from doubles import OracleDrafter
from drafters.proposal import Budget
from kernels import native
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.targets.loading import load_target
from server.targets.native_target import NativeTarget
from server.targets.target import PrefillChunk, TargetError
from server.targets.torch_target import TorchTarget

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
GREEDY = SamplingParams(temperature=0)
NEW = 20


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_text_is_transformers_and_that_of_drafts(name: str, save_model: Callable[..., Path]) -> None:
    model = tiny_model(name)
    folder = save_model(model, name)
    torch.manual_seed(3)
    prompt = torch.randint(1, 96, (66,))
    wanted = model.generate(prompt[None], max_new_tokens=NEW, do_sample=False)[0, 66:].tolist()
    request = Request("a", prompt.tolist(), NEW, GREEDY)
    for weights in ("fp32", "int8", "int4"):
        target = load_target(folder, weights, 2, 140, 1)
        assert isinstance(target, NativeTarget)
        plain = generate(Engine(target, None, EngineOptions(1, 100, prefill_chunk=25)), [request])["a"].token_ids
        if weights == "fp32":
            assert plain == wanted
        drafter = OracleDrafter([[*request.prompt_ids, *plain]], 96)
        engine = Engine(target, drafter, EngineOptions(2, 100, Budget(12, 4, 3), cache_bytes=1 << 20))
        for _ in range(2):  # the second reads the prompt from the page cache
            drafted = generate(engine, [request])["a"]
            assert drafted.token_ids == plain and drafted.finished.stats.acceptance_length > 2


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "granite"])
def test_features_and_logits_are_those_of_transformers(name: str, save_model: Callable[..., Path]) -> None:
    """Also of layers within, which drafters may want: scaled embeddings, caps and factors are where they belong."""
    folder = save_model(tiny_model(name, num_hidden_layers=4), f"{name}-features")
    prompt = list(range(2, 50))
    want = TorchTarget.load(folder, "fp32", 1, 64).prefill(PrefillChunk(0, prompt))
    got = load_target(folder, "fp32", 1, 64, 1).prefill(PrefillChunk(0, prompt))
    assert (got.features - want.features).norm() < 1e-5 * want.features.norm()
    assert (got.logits - want.logits).norm() < 1e-5 * want.logits.norm()


def test_a_window_as_long_as_the_context_is_none(save_model: Callable[..., Path]) -> None:
    texts = []
    for window in (100, None):
        target = load_target(save_model(tiny_model("mistral", sliding_window=window), "window"), "int8", 1, 100, 1)
        texts.append(target.prefill(PrefillChunk(0, list(range(1, 95)))).features)
    assert torch.equal(*texts)


@pytest.mark.parametrize("window", [0, -4])
def test_a_window_that_sees_nothing_is_refused(window: int, save_model: Callable[..., Path]) -> None:
    folder = save_model(tiny_model("mistral"), "no-window")
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"sliding_window": 70', f'"sliding_window": {window}'))
    with pytest.raises(TargetError, match=f"sliding_window is int {window}; it must be a whole number of at least 1"):
        load_target(folder, None, 1, 64, 1)


@pytest.mark.parametrize(
    ("name", "factor", "value"),
    [
        ("llama", "rms_norm_eps", -0.5),
        ("granite", "logits_scaling", -1.0),
        ("granite", "residual_multiplier", math.nan),
        ("gemma2", "attn_logit_softcapping", 0.0),
        ("gemma2", "query_pre_attn_scalar", -1),
        ("gemma2", "final_logit_softcapping", math.inf),
    ],
)
def test_a_factor_that_makes_nonsense_of_every_text_is_refused(
    name: str, factor: str, value: float, save_model: Callable[..., Path]
) -> None:
    folder = save_model(tiny_model(name), "factor")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {factor: value}))
    with pytest.raises(TargetError, match=f"{factor} is .*; it must be a finite number above 0"):
        load_target(folder, None, 1, 64, 1)


@pytest.mark.parametrize(
    "change", [{"rope_parameters": LONG_ROPE | {"factor": math.nan}}, {"original_max_position_embeddings": 2**63}]
)
def test_a_rotary_embedding_that_makes_nonsense_is_refused(
    change: dict[str, Any], save_model: Callable[..., Path]
) -> None:
    folder = save_model(tiny_model("phi3"), "rope")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(TargetError, match=r"above 0|below 2\*\*31"):
        load_target(folder, None, 1, 64, 1)
