"""Targets on the native layers: near transformers' own numbers, and bit-equal rows whatever stands beside them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from doubles import OracleDrafter, tiny_llama, tiny_qwen3
from drafters.native import NativeDrafter
from drafters.network import DovetailConfig, DovetailNetwork
from drafters.proposal import Budget, Proposal
from kernels import native
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.targets.native_target import NativeTarget, load_target
from server.targets.target import PrefillChunk, TargetError, VerifyRows
from server.targets.torch_target import TorchTarget

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
TREE = Proposal((11, 12, 13, 14, 15), (None, None, 0, 0, 2), (-0.1,) * 5)
PROMPT = [5, 9, 2, 33, 41, 7, 1]
GREEDY = SamplingParams(temperature=0)


def tiny(kind: str) -> torch.nn.Module:
    # The native layer takes heads of a multiple of 16 and groups of 32 inputs.
    model = {"llama": tiny_llama, "qwen3": tiny_qwen3}[kind]()
    config = model.config
    config.intermediate_size, config.head_dim = 160, 32
    torch.manual_seed(1)
    return type(model)(config).eval()


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, save_model: Callable[..., Path]) -> Path:
    return save_model(tiny(request.param), f"native-{request.param}")


@pytest.mark.parametrize(("weights", "bound"), [("bf16", 0.05), ("int8", 0.08), ("int4", 0.6)])
def test_features_and_logits_stay_near_transformers(folder: Path, weights: str, bound: float) -> None:
    want = TorchTarget.load(folder, "fp32", 1, 64).prefill(PrefillChunk(0, PROMPT))
    got = NativeTarget.load(folder, weights, 1, 64).prefill(PrefillChunk(0, PROMPT))
    assert (got.features - want.features).norm() < bound * want.features.norm()
    assert (got.logits - want.logits).norm() < bound * want.logits.norm()


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_a_tree_row_equals_the_plain_row_bit_for_bit(folder: Path, weights: str) -> None:
    target = NativeTarget.load(folder, weights, 3, 64)
    for slot in (0, 1):
        target.prefill(PrefillChunk(slot, PROMPT))
    target.prefill(PrefillChunk(2, [3]))
    _, tree = target.verify([VerifyRows(2, 8, Proposal()), VerifyRows(0, 9, TREE)])
    for token_id, row in ((9, 0), (11, 1), (13, 3), (15, 5)):  # the path 9, 11, 13, 15, one token at a time
        (plain,) = target.verify([VerifyRows(1, token_id, Proposal())])
        assert torch.equal(plain.features([0]), tree.features([row]))
        assert torch.equal(plain.logits(0), tree.logits(row))
        assert plain.argmax() == [tree.argmax()[row]]
        target.keep(1, [0])
    target.keep(0, [0, 1, 3, 5])
    assert torch.equal(target.slots.keys[:, 0, :, :11], target.slots.keys[:, 1, :, :11])


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, seed=3)], ids=["greedy", "sampled"])
def test_drafted_text_equals_plain_text(folder: Path, weights: str, sampling: SamplingParams) -> None:
    target = NativeTarget.load(folder, weights, 2, 120)
    requests = [Request("a", PROMPT, 30, sampling), Request("b", [4, 4], 30, sampling)]
    plain = generate(Engine(target, None, EngineOptions(1, 100)), requests)
    texts = [[*r.prompt_ids, *plain[r.request_id].token_ids] for r in requests]
    for wrong in (False, True):
        drafter = OracleDrafter(texts, 67, wrong=wrong)
        drafted = generate(Engine(target, drafter, EngineOptions(2, 100, Budget(16, 4, 3))), requests)
        assert {k: v.token_ids for k, v in drafted.items()} == {k: v.token_ids for k, v in plain.items()}


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_an_int8_kv_cache_halves_its_memory_and_drafts_as_it_decodes(folder: Path, weights: str) -> None:
    wide, target = load_target(folder, weights, 2, 120), load_target(folder, weights, 2, 120, "int8")
    assert target.slots.bytes_per_position * 4 < wide.slots.bytes_per_position * 3  # heads of 32: 36 bytes against 64
    want = wide.prefill(PrefillChunk(0, PROMPT))
    got = target.prefill(PrefillChunk(0, PROMPT))
    assert 0 < (got.features - want.features).norm() < 0.05 * want.features.norm()
    target.release(0)
    plain = generate(Engine(target, None, EngineOptions(1, 100)), [Request("a", PROMPT, 30, GREEDY)])
    drafter = OracleDrafter([[*PROMPT, *plain["a"].token_ids]], 67)
    engine = Engine(target, drafter, EngineOptions(1, 100, Budget(16, 4, 3)))
    assert generate(engine, [Request("a", PROMPT, 30, GREEDY)])["a"].token_ids == plain["a"].token_ids


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, seed=3)], ids=["greedy", "sampled"])
def test_text_drafted_natively_equals_plain_text(folder: Path, weights: str, sampling: SamplingParams) -> None:
    target = NativeTarget.load(folder, weights, 2, 120)
    requests = [Request("a", PROMPT, 30, sampling), Request("b", [4, 4], 30, sampling)]
    plain = generate(Engine(target, None, EngineOptions(1, 100)), requests)
    torch.manual_seed(0)
    network = DovetailNetwork(DovetailConfig(64, 67, 96, 4, 2, 16, num_blocks=2)).eval().requires_grad_(False)
    drafter = NativeDrafter(network, target.embedding(), target.lm_head(), 8, 2, 120)
    drafted = generate(Engine(target, drafter, EngineOptions(2, 100, Budget(12, 4, 3))), requests)
    assert {k: v.token_ids for k, v in drafted.items()} == {k: v.token_ids for k, v in plain.items()}
    assert all(result.finished.stats.drafted > 0 for result in drafted.values())


def small_heads(save_model: Callable[..., Path]) -> Path:
    config = MistralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=67, max_position_embeddings=128, sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return save_model(MistralForCausalLM(config).eval(), "small-heads")


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_layers_without_a_native_form_run_on_stock_products(
    save_model: Callable[..., Path], caplog: pytest.LogCaptureFixture, weights: str
) -> None:
    folder = small_heads(save_model)
    target = load_target(folder, weights, 1, 16)
    assert type(target) is TorchTarget and target.info.weights == weights
    assert "heads of 8" in caplog.text
    want = TorchTarget.load(folder, "fp32", 1, 16).prefill(PrefillChunk(0, PROMPT)).logits
    got = target.prefill(PrefillChunk(0, PROMPT)).logits
    assert (got - want).norm() < {"bf16": 0.05, "int8": 0.1, "int4": 0.6}[weights] * want.norm()


def test_a_folder_that_is_quantised_already_is_refused(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "quantised"
    shutil.copytree(folder, copied)
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(TargetError, match="is quantised already"):
        load_target(copied, "int8", 1, 16)


MISSING = "they lack|does not describe a model"  # a Qwen config lists its layers, and contradicts itself first


def test_weights_that_do_not_fit_the_config_are_refused(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "other"
    shutil.copytree(folder, copied)
    config = json.loads((copied / "config.json").read_text())
    for change, message in (
        ({"intermediate_size": 320}, "the configuration says"),
        ({"num_hidden_layers": 9}, MISSING),
    ):
        (copied / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(TargetError, match=message):
            load_target(copied, "int8", 1, 16)


def test_packed_modules_are_dropped(folder: Path) -> None:
    target = NativeTarget.load(folder, "int8", 1, 16)
    assert not any(p.ndim == 2 and "layers" in name for name, p in target.model.named_parameters())
    assert target.info.num_parameters > sum(p.numel() for p in target.model.parameters())


def test_inner_features_stay_near_transformers(save_model: Callable[..., Path]) -> None:
    config = tiny("llama").config
    config.num_hidden_layers = 8
    torch.manual_seed(1)
    folder = save_model(type(tiny_llama())(config).eval(), "native-deep")
    targets = [TorchTarget.load(folder, "bf16", 1, 64), NativeTarget.load(folder, "bf16", 1, 64)]
    for target in targets:
        target.select_features(("low", "mid", "high"))
    want, got = (target.prefill(PrefillChunk(0, PROMPT)).features.float() for target in targets)
    for each, other in zip(want.chunk(3, dim=-1), got.chunk(3, dim=-1), strict=True):
        assert (other - each).norm() < 0.05 * each.norm()
