"""Drafter folders: round trip, and what is refused with which words."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafters.checkpoint import save_drafter
from drafters.dovetail import DovetailDrafter, load_drafter
from drafters.drafter import DrafterError
from drafters.network import DovetailConfig, DovetailNetwork

CONFIG = DovetailConfig(32, 50, 48, 4, 2, 8, num_blocks=2, target="abc")
FIELDS = {"model_type": "dovetail_drafter", **dataclasses.asdict(CONFIG)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_drafter(DovetailNetwork(CONFIG), tmp_path)
    return tmp_path


def load(folder: Path, hidden: int = 32, vocab: int = 50, dtype: torch.dtype = torch.float32) -> DovetailDrafter:
    embedding = torch.randn(vocab, hidden)
    return load_drafter(folder, embedding, embedding, torch.device("cpu"), dtype, num_slots=2, capacity=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(folder: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    original = DovetailNetwork(CONFIG).state_dict()
    drafter = load(folder, dtype=dtype)
    assert drafter.network.config == CONFIG
    assert {p.dtype for p in drafter.network.parameters()} == {dtype}
    assert not any(p.requires_grad for p in drafter.network.parameters())
    for name, tensor in drafter.network.state_dict().items():
        assert torch.equal(tensor, original[name].bfloat16().to(dtype))


def test_the_file_is_bf16_without_embedding_and_head(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert not any(50 in tensor.shape for tensor in state.values())


def test_tied_weights_stay_one_tensor_and_are_not_copied(folder: Path) -> None:
    embedding, lm_head = torch.randn(50, 32), torch.randn(50, 32)
    device = torch.device("cpu")
    tied = load_drafter(folder, embedding, embedding, device, torch.bfloat16, 1, 8)
    assert tied.embedding is tied.lm_head
    untied = load_drafter(folder, embedding, lm_head, device, torch.float32, 1, 8)
    assert untied.embedding.data_ptr() == embedding.data_ptr()
    assert untied.lm_head.data_ptr() == lm_head.data_ptr()


def test_another_target_is_refused_with_both_shapes(folder: Path) -> None:
    with pytest.raises(DrafterError, match=r"hidden size 32 and vocabulary 50.*hidden size 40 and vocabulary 50"):
        load(folder, hidden=40)
    with pytest.raises(DrafterError, match=r"vocabulary 50.*vocabulary 51"):
        load(folder, vocab=51)


def test_missing_and_truncated_weights_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DrafterError, match=r"model\.safetensors cannot be read.*truncated"):
        load(folder)
    file.unlink()
    with pytest.raises(DrafterError, match=r"model\.safetensors does not exist$"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(DrafterError, match=r"pytorch_model\.bin is a pickle"):
        load(folder)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_tensors_that_do_not_fit_the_configuration(folder: Path, change: str) -> None:
    file, name = folder / "model.safetensors", "blocks.1.qkv_proj.weight"
    state = load_file(file)
    tensor = state.pop(name)
    if change == "unknown":
        state |= {name: tensor, "stranger": torch.zeros(2)}
    elif change == "shape":
        state[name] = tensor[:-1].clone()
    save_file(state, file)
    with pytest.raises(DrafterError, match="stranger" if change == "unknown" else r"blocks\.1\.qkv_proj\.weight"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        ("[]", "must hold a JSON object, not list"),
        (json.dumps({"model_type": "llama"}), "no Dovetail drafter"),
        (json.dumps({"model_type": "dovetail_drafter", "hiden_size": 3}), "unknown keys hiden_size"),
        (json.dumps({"model_type": "dovetail_drafter", "hidden_size": 3}), "vocab_size"),
        ("[" * 100_000, "not JSON"),
        (json.dumps({"model_type": []}), "model_type is .., which is no text"),
        (json.dumps(FIELDS | {"rope_theta": "x"}), "rope_theta is 'x'; it must be a number above 0"),
        (json.dumps(FIELDS | {"rope_theta": -1}), "rope_theta is -1"),
        (json.dumps(FIELDS | {"norm_eps": 0}), "norm_eps is 0"),
        (json.dumps(FIELDS | {"draft_vocab_size": "x"}), "draft_vocab_size is 'x'; it must be a whole number"),
        (json.dumps(FIELDS | {"num_blocks": True}), "num_blocks is True"),
    ],
)
def test_bad_configurations(folder: Path, text: str, named: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(DrafterError, match=named):
        load(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DrafterError, match=r"config\.json does not exist"):
        load(tmp_path / "nothing")
