"""Models packed while they are read: how much memory that takes, packed folders, and targets without native kernels."""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal, run
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from doubles import tiny_llama, tiny_qwen3
from kernels import native
from kernels.linear_lowbit import FORMAT_VERSION, PackedFormatError, checkpoint
from server.bench.contestants import create_peers
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.targets import native_target
from server.targets.conversion import ConversionOptions, convert_target
from server.targets.native_target import NativeTarget, load_target
from server.targets.packed_model import PACKED_FILE, load_packed_model, pack_model
from server.targets.stock_target import unpacked_model
from server.targets.target import PrefillChunk, TargetError
from server.targets.torch_target import TorchTarget

needs_native = pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
PROMPT = [5, 9, 2, 33, 41, 7, 1]


def tiny(kind: str) -> torch.nn.Module:
    model = {"llama": tiny_llama, "qwen3": tiny_qwen3}[kind]()
    config = model.config
    config.intermediate_size, config.head_dim = 160, 32
    torch.manual_seed(1)
    return type(model)(config).eval()


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, save_model: Callable[..., Path]) -> Path:
    return save_model(tiny(request.param), f"packed-{request.param}")


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_target.native, "library", lambda: None)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made by operators held at once; tensors read from a file by memory map are not."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, key: int) -> None:
        self.now -= self.live.pop(key)


@pytest.mark.parametrize("weights", ["int4", "int8", "bf16"])
def test_packing_holds_no_more_than_the_packed_weights_and_two_layers(tmp_path: Path, weights: str) -> None:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    layer_bytes = sum(p.numel() * 4 for p in model.model.layers[0].parameters())  # fp32, as the quantiser works
    model.save_pretrained(tmp_path, max_shard_size="4MB")
    del model
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    with LiveBytes() as counted:
        packed = pack_model(tmp_path, weights)
    assert len(packed.layers) == 12
    assert counted.now >= packed.packed_bytes, "the counter lost tensors that are alive"
    assert counted.peak < packed.packed_bytes + 2 * layer_bytes
    assert 12 * layer_bytes > packed.packed_bytes + 2 * layer_bytes, "the bound would hold without streaming"


@needs_native
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_a_packed_folder_serves_what_packing_at_load_serves(folder: Path, tmp_path: Path, weights: str) -> None:
    report = convert_target(folder, tmp_path / "out", ConversionOptions(weights, report=True))
    assert len(report.layers) == report_layers(folder) and report.packed_bytes > 0
    assert {"qkv", "output", "gate_up", "down"} == report.layers[0].keys()
    target = load_target(tmp_path / "out", None, 1, 64)
    assert isinstance(target, NativeTarget) and target.info.weights == weights
    want = NativeTarget.load(folder, weights, 1, 64).prefill(PrefillChunk(0, PROMPT))
    got = target.prefill(PrefillChunk(0, PROMPT))
    assert torch.equal(got.features, want.features) and torch.equal(got.logits, want.logits)
    assert target.lm_head().shape == target.embedding().shape
    assert load_target(tmp_path / "out", weights, 1, 64).info == target.info
    with pytest.raises(TargetError, match=f"is packed in {weights}; --weights fp32 needs the original"):
        load_target(tmp_path / "out", "fp32", 1, 64)
    with pytest.raises(TargetError, match="is packed already"):
        convert_target(tmp_path / "out", tmp_path / "again", ConversionOptions("int8"))
    with pytest.raises(TargetError, match="is not empty"):
        convert_target(folder, tmp_path / "out", ConversionOptions("int8"))


def report_layers(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["num_hidden_layers"])


def test_the_head_and_files_without_prefix(save_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny("llama")
    packed = pack_model(save_model(model, "whole"), "bf16")
    assert not model.config.tie_word_embeddings
    folder = tmp_path / "base"
    shutil.copytree(save_model(model, "again"), folder)
    (folder / "model.safetensors").unlink()
    bare = {name.removeprefix("model."): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    again = pack_model(folder, "bf16")
    assert torch.equal(again.head.data, packed.head.data)
    assert torch.equal(again.layers[-1].down.data, packed.layers[-1].down.data)


def test_packed_files_of_another_version_or_shape_are_refused_by_name(
    save_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = save_model(tiny("llama"), "version"), tmp_path / "out"
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", FORMAT_VERSION + 1)
    convert_target(folder, out, ConversionOptions("int4"))
    monkeypatch.undo()
    with pytest.raises(PackedFormatError, match=f"{PACKED_FILE} has packed format {FORMAT_VERSION + 1}"):
        load_target(out, None, 1, 16)
    shutil.rmtree(out)
    convert_target(folder, out, ConversionOptions("int4"))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(TargetError, match=r"config.json: hidden_size is str 'wide'"):
        load_packed_model(out)
    for change, what in (
        ({"intermediate_size": 320}, "layer 0 has other shapes"),
        ({"num_hidden_layers": 9}, "layers.2.qkv"),
        ({"vocab_size": 66}, "embedding should be"),
    ):
        (out / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(PackedFormatError, match=f"does not fit config.json: .*{what}"):
            load_packed_model(out)


@pytest.mark.parametrize(("weights", "bound"), [("bf16", 0.05), ("int8", 0.08), ("int4", 0.6)])
def test_without_native_kernels_torch_serves_all_weights(
    folder: Path, no_native: None, weights: str, bound: float
) -> None:
    target = load_target(folder, weights, 2, 64)
    assert type(target) is TorchTarget and target.info.weights == weights
    want = TorchTarget.load(folder, "fp32", 1, 64).prefill(PrefillChunk(0, PROMPT)).logits
    got = target.prefill(PrefillChunk(0, PROMPT)).logits
    assert (got - want).norm() < bound * want.norm()
    target.release(0)
    requests = [Request("a", PROMPT, 12, SamplingParams(temperature=0))]
    assert len(generate(Engine(target, None, EngineOptions(1, 60)), requests)["a"].token_ids) == 12


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_without_native_kernels_torch_serves_packed_folders(
    folder: Path, tmp_path: Path, no_native: None, weights: str
) -> None:
    convert_target(folder, tmp_path / "out", ConversionOptions(weights))
    exact = TorchTarget(unpacked_model(load_packed_model(tmp_path / "out")), "exact", "bf16", 1, 64)
    target = load_target(tmp_path / "out", None, 1, 64)
    assert type(target) is TorchTarget and target.info.weights == weights
    want, got = (each.prefill(PrefillChunk(0, PROMPT)).logits for each in (exact, target))
    assert (got - want).norm() < {"bf16": 0.01, "int8": 0.08, "int4": 0.15}[weights] * want.norm()


def test_the_convert_command_packs_and_says_what_it_needs(folder: Path, tmp_path: Path) -> None:
    result = run("convert", folder, tmp_path / "out", "--weights", "int8", "--report")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["weights"] == "int8" and max(report["layers"][0].values()) < 0.01
    assert (tmp_path / "out" / PACKED_FILE).is_file() and (tmp_path / "out" / "config.json").is_file()
    for arguments, message in (
        ([str(folder), str(tmp_path / "b"), "--report"], "--report need"),
        (["no-such-folder", str(tmp_path / "b")], "is no folder"),
    ):
        assert message in refusal("convert", *arguments)
    with pytest.raises(TargetError, match="int3"):
        convert_target(folder, tmp_path / "c", ConversionOptions("int3"))


def test_calibration_scales_every_layer_by_a_text(folder: Path, tmp_path: Path) -> None:
    source, text = tmp_path / "source", tmp_path / "text.txt"
    shutil.copytree(folder, source)
    options = ConversionOptions("int4", calibration=text, calibration_tokens=600)
    text.write_text(" ".join(f"w{(7 * i * i) % 60}" for i in range(700)))
    with pytest.raises(TargetError, match=r"no tokenizer\.json"):
        convert_target(source, tmp_path / "out", options)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    report = convert_target(source, tmp_path / "out", options)
    assert (tmp_path / "out" / "tokenizer.json").is_file() and len(report.scaling) == report_layers(folder)
    found = [entry for layer in report.scaling for entry in layer]
    assert all(entry["error"] <= entry["plain_error"] for entry in found)
    assert any(entry["power"] > 0 for entry in found)
    exact = TorchTarget.load(folder, "fp32", 1, 64).prefill(PrefillChunk(0, PROMPT)).logits
    served = TorchTarget(unpacked_model(load_packed_model(tmp_path / "out")), "calibrated", "bf16", 1, 64)
    logits = served.prefill(PrefillChunk(0, PROMPT)).logits
    assert (logits - exact).norm() < 0.6 * exact.norm()
    text.write_text("w1")
    with pytest.raises(TargetError, match="gives 1 tokens"):
        convert_target(source, tmp_path / "other", options)


def test_peers_do_not_read_packed_folders(folder: Path, tmp_path: Path) -> None:
    convert_target(folder, tmp_path / "out", ConversionOptions("bf16"))
    sampling = SamplingParams(temperature=0)
    peers, skipped = create_peers(["transformers", "llama.cpp"], tmp_path / "out", "bf16", 64, sampling)
    assert peers == [] and set(skipped) == {"transformers", "llama.cpp"}
    assert "name the original folder" in skipped["transformers"]
