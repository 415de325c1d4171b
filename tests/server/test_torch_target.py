"""The target against transformers' own forward pass, and its slots."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from doubles import tiny_llama, tiny_qwen3
from drafters.proposal import Proposal
from server.targets.target import PrefillChunk, TargetError, VerifyRows
from server.targets.torch_target import TorchTarget

MODELS = {"llama": tiny_llama, "qwen3": tiny_qwen3}
TREE = Proposal((11, 12, 13, 14, 15), (None, None, 0, 0, 2), (-0.1,) * 5)


@pytest.fixture(params=sorted(MODELS))
def pair(request: pytest.FixtureRequest, save_model: Callable[..., Path]) -> tuple[torch.nn.Module, TorchTarget]:
    model = MODELS[request.param]()
    return model, TorchTarget.load(save_model(model, request.param), "fp32", num_slots=3, capacity=64)


def plain(model: torch.nn.Module, token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([token_ids]), output_hidden_states=True, use_cache=False)
    return output.hidden_states[-1][0], output.logits[0]


def test_rows_of_a_tree_equal_plain_forward_passes_on_their_paths(pair: tuple[torch.nn.Module, TorchTarget]) -> None:
    model, target = pair
    prompts = {0: [1, 2, 3, 4, 5], 2: [6, 7]}
    for slot, prompt in prompts.items():
        result = target.prefill(PrefillChunk(slot, prompt))
        features, logits = plain(model, prompt)
        torch.testing.assert_close(result.features, features, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(result.logits, logits[-1], atol=1e-5, rtol=1e-4)
    verified, other = target.verify([VerifyRows(0, 9, TREE), VerifyRows(2, 10, Proposal())])
    assert (verified.num_rows, other.num_rows) == (TREE.num_rows, 1)
    for row in range(TREE.num_rows):
        path = [9, *(TREE.token_ids[i - 1] for i in TREE.path(row)[1:])]
        features, logits = plain(model, prompts[0] + path)
        torch.testing.assert_close(verified.features([row])[0], features[-1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(verified.logits(row), logits[-1], atol=1e-5, rtol=1e-4)
    _, logits = plain(model, [6, 7, 10])
    torch.testing.assert_close(other.logits(0), logits[-1], atol=1e-5, rtol=1e-4)
    assert other.argmax() == [int(logits[-1].argmax())]


def test_keep_commits_the_path_and_nothing_else(pair: tuple[torch.nn.Module, TorchTarget]) -> None:
    model, target = pair
    target.prefill(PrefillChunk(1, [1, 2, 3]))
    target.verify([VerifyRows(1, 9, TREE)])
    target.keep(1, [0, 1, 3])
    assert target.slots.lengths[1] == 6
    target.slots.keys[:, 1, :, 6:] = float("nan")  # rejected rows must never be read again
    target.slots.values[:, 1, :, 6:] = float("nan")
    got = target.verify([VerifyRows(1, 20, Proposal())])[0].logits(0)
    torch.testing.assert_close(got, plain(model, [1, 2, 3, 9, 11, 13, 20])[1][-1], atol=1e-5, rtol=1e-4)


def test_chunked_prefill_and_rows_put_back_equal_one_pass(pair: tuple[torch.nn.Module, TorchTarget]) -> None:
    model, target = pair
    prompt = list(range(1, 14))
    for start in range(0, len(prompt), 5):
        last = target.prefill(PrefillChunk(0, prompt[start : start + 5]))
    torch.testing.assert_close(last.logits, plain(model, prompt)[1][-1], atol=1e-5, rtol=1e-4)
    target.write_rows(1, target.read_rows(0, 0, 7))
    restored = target.prefill(PrefillChunk(1, [60, 61]))
    torch.testing.assert_close(restored.logits, plain(model, [*prompt[:7], 60, 61])[1][-1], atol=1e-5, rtol=1e-4)
    target.release(0)
    assert target.slots.lengths[:2] == [0, 9]


def test_sliding_window_models_see_their_window(save_model: Callable[..., Path]) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=67, max_position_embeddings=128, sliding_window=4, initializer_range=0.3,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    target = TorchTarget.load(save_model(model, "mistral"), "fp32", 1, 64)
    prompt = list(range(1, 12))
    target.prefill(PrefillChunk(0, prompt[:6]))
    result = target.prefill(PrefillChunk(0, prompt[6:]))
    torch.testing.assert_close(result.logits, plain(model, prompt)[1][-1], atol=1e-5, rtol=1e-4)
    (verified,) = target.verify([VerifyRows(0, 9, TREE)])
    want = plain(model, [*prompt, 9, 11, 13, 15])[1][-1]
    torch.testing.assert_close(verified.logits(5), want, atol=1e-5, rtol=1e-4)


def test_tied_weights_are_one_tensor_and_counted_once(save_model: Callable[..., Path]) -> None:
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    target = TorchTarget.load(save_model(model, "tied"), "fp32", 1, 16)
    assert target.embedding().data_ptr() == target.lm_head().data_ptr()
    assert target.info.num_parameters == sum(p.numel() for p in model.parameters())


def test_bad_folders_are_refused_by_name(save_model: Callable[..., Path], tmp_path: Path) -> None:
    def load(folder: Path, weights: str = "fp32") -> None:
        TorchTarget.load(folder, weights, 1, 16)

    with pytest.raises(TargetError, match="not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(TargetError, match=r"config\.json"):
        load(tmp_path)
    folder = save_model(tiny_llama(), "damaged")
    with pytest.raises(TargetError, match="int3"):
        load(folder, "int3")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TargetError, match=r"model\.safetensors is truncated"):
        load(folder)
    weights.unlink()
    with pytest.raises(TargetError, match="no weights"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(TargetError, match="pickle"):
        load(folder)


def test_architectures_whose_rows_mix_are_refused(save_model: Callable[..., Path]) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=67)).eval()
    with pytest.raises(TargetError, match="BloomForCausalLM"):
        TorchTarget.load(save_model(model, "bloom"), "fp32", 1, 16)


def test_inner_features_are_the_inputs_of_their_layers_and_leave_the_logits_alone(
    save_model: Callable[..., Path],
) -> None:
    model = tiny_llama(num_layers=8)
    target = TorchTarget.load(save_model(model, "deep"), "fp32", 2, 64)
    assert target.info.feature_layers == ("last", "low", "mid", "high")
    prompt = [1, 2, 3, 4, 5]
    before = target.prefill(PrefillChunk(0, prompt))
    target.select_features(("low", "mid", "high"))
    result = target.prefill(PrefillChunk(1, prompt))
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
    want = torch.cat([hidden[layer][0] for layer in (2, 4, 5)], dim=-1)
    torch.testing.assert_close(result.features, want, atol=1e-3, rtol=1e-3)  # unnormalised, so of any size
    assert torch.equal(result.logits, before.logits)
    (verified,) = target.verify([VerifyRows(1, 9, TREE)])
    assert verified.features(range(TREE.num_rows)).shape == (TREE.num_rows, 3 * 64)
    torch.testing.assert_close(verified.logits(0), plain(model, [*prompt, 9])[1][-1], atol=1e-5, rtol=1e-4)
    target.select_features(("last",))
    target.release(1)
    assert torch.equal(target.prefill(PrefillChunk(1, prompt)).features, before.features)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_a_shallow_target_has_no_inner_features(save_model: Callable[..., Path]) -> None:
    target = TorchTarget.load(save_model(tiny_llama(), "shallow"), "fp32", 1, 16)
    assert target.info.feature_layers == ("last",)
    with pytest.raises(TargetError, match="no feature layers high, low; it gives last"):
        target.select_features(("low", "high"))
