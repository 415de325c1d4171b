import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from doubles import tiny_llama
from server.launch import load_codec
from server.targets.loading import load_target
from server.targets.target import PrefillChunk

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (make gguf)")

from server.targets.conversion import ConversionOptions, convert_target  # noqa: E402
from server.targets.gguf.folders import write_safetensors  # noqa: E402
from server.targets.gguf.vocabulary import GGUFError  # noqa: E402
from server.targets.gguf.writing import frequency_factors, pairs_together, write_gguf  # noqa: E402

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["<end>", "<turn>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat and the other cat"] * 5, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def save(model: LlamaForCausalLM, folder: Path) -> Path:
    model.generation_config.eos_token_id = [0, 1]
    model.save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    settings: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=280, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(), tmp_path_factory.mktemp("llama"))


def separate_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undoes the reordering the slow way, row by row."""
    size = weight.shape[0] // num_heads
    order = [
        h * size + (2 * i if i < size // 2 else 2 * (i - size // 2) + 1) for h in range(num_heads) for i in range(size)
    ]
    return weight[order]


def test_reordering_is_undone_row_by_row() -> None:
    weight = torch.arange(48.0).reshape(24, 2)
    assert torch.equal(separate_halves(pairs_together(weight, 3), 3), weight)
    assert pairs_together(weight, 3)[:4, 0].tolist() == [0.0, 8.0, 2.0, 10.0]


@pytest.mark.parametrize("weights", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_tensors_read_back(folder: Path, tmp_path: Path, weights: str) -> None:
    reader = gguf.GGUFReader(write_gguf(folder, tmp_path / "model.gguf", weights))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert len(stored) == len(state)
    for name, want in state.items():
        tensor = stored[names.get_name(name, try_suffixes=(".weight",))]
        got = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                got = separate_halves(got, heads)
        tolerance = {"fp32": 0.0, "fp16": 1e-3, "bf16": 8e-3, "int8": 0.01, "int4": 0.15}[weights]
        difference = (got.reshape(want.shape) - want).abs()
        assert bool((difference <= tolerance * want.abs().max()).all()), name


def test_keys_read_back(folder: Path, tmp_path: Path) -> None:
    fields = gguf.GGUFReader(write_gguf(folder, tmp_path / "model.gguf", "fp32")).fields
    got = {name: field.contents() for name, field in fields.items()}
    assert got["general.architecture"] == "llama"
    assert got["llama.attention.head_count"] == 4 and got["llama.attention.head_count_kv"] == 2
    assert got["llama.rope.freq_base"] == 10000.0 and got["llama.context_length"] == 128
    assert got["tokenizer.ggml.eos_token_id"] == 0 and got["tokenizer.ggml.eot_token_id"] == 1
    assert got["tokenizer.chat_template"] == TEMPLATE
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert got["tokenizer.ggml.merges"] == [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    tokens, types = got["tokenizer.ggml.tokens"], got["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 280
    assert all(tokens[token_id] == token for token, token_id in tokenizer["model"]["vocab"].items())
    assert types[:2] == [gguf.TokenType.CONTROL] * 2 and types[-1] == gguf.TokenType.UNUSED


def test_other_architectures_are_refused_by_name(save_model: Callable[..., Path], tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=67)
    with pytest.raises(GGUFError, match=r"GPT2LMHeadModel cannot be written as GGUF; LlamaForCausalLM, .* can"):
        write_gguf(save_model(GPT2LMHeadModel(config), "gpt2"), tmp_path / "model.gguf", "fp32")


@pytest.mark.parametrize(("change", "word"), [({"mlp_bias": True}, "mlp_bias"), ({"hidden_act": "gelu"}, "gelu")])
def test_what_llama_cpp_would_misread_is_refused(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    with pytest.raises(GGUFError, match=word):
        write_gguf(save(llama(**change), tmp_path), tmp_path / "model.gguf", "fp32")


def test_missing_and_foreign_tokenizers_are_refused(
    save_model: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(GGUFError, match=r"tokenizer\.json"):
        write_gguf(save_model(tiny_llama(), "bare"), tmp_path / "model.gguf", "fp32")
    copy = shutil.copytree(folder, tmp_path / "copy")
    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(copy / "tokenizer.json"))
    with pytest.raises(GGUFError, match="byte-level BPE"):
        write_gguf(copy, tmp_path / "model.gguf", "fp32")


SCALED = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


def test_frequency_factors_scale_low_frequencies_only() -> None:
    factors = frequency_factors(llama(rope_parameters=SCALED).config)
    assert factors.shape == (8,)
    assert factors[0] == pytest.approx(1.0) and factors[-1] == pytest.approx(4.0)


@pytest.mark.parametrize("rope", [None, SCALED], ids=["plain", "llama3"])
def test_llama_cpp_gives_the_same_logits(tmp_path: Path, rope: dict[str, Any] | None) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make gguf)")
    model = llama() if rope is None else llama(rope_parameters=rope)
    file = write_gguf(save(model, tmp_path / "model"), tmp_path / "model.gguf", "fp32")
    peer = llama_cpp.Llama(str(file), n_ctx=128, n_threads=1, logits_all=True, verbose=False)
    token_ids = [(7 * i) % 270 for i in range(60)]
    peer.eval(token_ids)
    with torch.inference_mode():
        want = model(torch.tensor([token_ids])).logits[0]
    # llama.cpp keeps its KV cache in fp16.
    assert torch.allclose(torch.from_numpy(peer.scores[: len(token_ids)]), want, atol=2e-2, rtol=1e-2)
    peer.close()


FAMILIES = {
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": SCALED}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_become_files_and_files_folders_again(family: str, tmp_path: Path) -> None:
    config, kind, more = FAMILIES[family]
    torch.manual_seed(1)
    settings = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=280, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    model = kind(config(**settings | more)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    folder = save(model, tmp_path / "model")
    file = write_gguf(folder, tmp_path / "model.gguf", "fp16")
    back = tmp_path / "back"
    write_safetensors(file, back, shard_bytes=100_000)
    assert len(list(back.glob("*.safetensors"))) > 1
    packed = tmp_path / "packed"
    convert_target(file, packed, ConversionOptions("stored"))
    ids = load_codec(folder).encode("the other cat <turn>")
    assert load_codec(file).encode("the other cat <turn>") == load_codec(back).encode("the other cat <turn>") == ids
    assert load_codec(back).stop_ids == load_codec(file).stop_ids == {0, 1}
    with torch.inference_mode():
        want = model(torch.tensor([ids])).logits[0, -1]
    for path, weights in ((file, "fp32"), (back, "fp32"), (packed, None)):
        target = load_target(path, weights, 1, 64, 1, engine="native")
        got = target.prefill(PrefillChunk(0, ids)).logits
        assert (got - want).norm() < 0.02 * want.norm(), path.name


def test_sentencepiece_survives_the_way_there_and_back(larger_data: Path, tmp_path: Path) -> None:
    text = "Hello, wörld!  def f(x):\n\treturn 日本語 🙂"
    first = larger_data / "models" / "llama-2-tiny-random.gguf"
    write_safetensors(first, tmp_path / "folder")
    again = write_gguf(tmp_path / "folder", tmp_path / "again.gguf", "fp16")
    ids = load_codec(first).encode(text)
    assert load_codec(tmp_path / "folder").encode(text) == ids == load_codec(again).encode(text)
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make gguf)")
    peer = llama_cpp.Llama(str(again), vocab_only=True, verbose=False)
    assert peer.tokenize(text.encode(), add_bos=True, special=True) == ids
    peer.close()


def test_the_command_turns_folders_and_files_into_each_other(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    assert json.loads(run("convert", folder, file, "--to", "gguf", "--weights", "int8").stdout)["weights"] == "int8"
    assert json.loads(run("convert", file, tmp_path / "floats").stdout)["bytes"] > 0
    assert json.loads(run("convert", file, tmp_path / "codes", "--weights", "stored").stdout)["packed_bytes"] > 0
    assert "must be a new file" in refusal("convert", folder, file, "--to", "gguf")
    assert "GGUF file already" in refusal("convert", file, tmp_path / "x.gguf", "--to", "gguf")
    assert "is not empty" in refusal("convert", file, tmp_path / "floats")
