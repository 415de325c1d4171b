"""Which engine computes what, and what is said where it cannot."""

from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.launch import load_codec
from server.targets import loading
from server.targets.context import Wanted
from server.targets.gguf.header import open_gguf
from server.targets.llama_cpp.memory import context_and_cache
from server.targets.loading import choose_engine, load_target, memory_plan
from server.targets.native_target import NativeTarget
from server.targets.target import PrefillChunk, TargetError

Kind = GGMLQuantizationType


@pytest.fixture
def beyond(tiny_gguf: Any, tmp_path: Path) -> Path:
    """A type that the native layers do not read."""
    return tiny_gguf.write(tmp_path / "two-bit.gguf", kinds={"attn_v": Kind.Q2_K})


@pytest.fixture
def whole(tiny_gguf: Any, tmp_path: Path) -> Path:
    return tiny_gguf.write(tmp_path / "whole.gguf")


def test_the_native_layers_compute_what_they_can(whole: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra gguf)")
    assert choose_engine(whole, None, None) == "native"
    assert choose_engine(whole, None, "fp32") == "native"
    assert choose_engine(whole, "llama.cpp", None) == "llama.cpp"
    assert choose_engine(whole.parent, None, None) == "native"
    assert isinstance(load_target(whole, None, 1, 64, 1), NativeTarget)


def test_llama_cpp_computes_the_rest(beyond: Path, tiny_gguf: Any, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra gguf)")
    gemma = tiny_gguf.write(tmp_path / "gemma.gguf", architecture="gemma")
    for file in (beyond, gemma):
        assert choose_engine(file, None, None) == "llama.cpp", file.name
    target = load_target(beyond, None, 1, 64, 1)
    assert type(target).__name__ == "LlamaCppTarget"
    assert target.prefill(PrefillChunk(0, [1, 2, 3])).features.shape == (3, target.info.hidden_size)
    assert memory_plan(beyond, Wanted(), 1, None, "llama.cpp").context == 256


def test_without_the_package_the_one_command_is_said(
    beyond: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "installed", lambda: False)
    with pytest.raises(TargetError, match=r"attn_v.weight is of type Q2_K.*pip install 'dovetail-server\[gguf\]'"):
        choose_engine(beyond, None, None)
    with pytest.raises(TargetError, match="pip install"):
        choose_engine(whole, "llama.cpp", None)
    assert choose_engine(whole, None, None) == "native"


def test_contradictions_are_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "installed", lambda: True)
    for path, weights, words in ((whole.parent, None, "takes a .gguf file"), (whole, "int8", "--weights int8")):
        with pytest.raises(TargetError, match=words):
            choose_engine(path, "llama.cpp", weights)
    with pytest.raises(TargetError, match="--gpu-layers"):
        load_target(whole, None, 1, 64, 1, gpu_layers=2)


def test_cache_sizes_come_from_the_metadata(tiny_gguf: Any, tmp_path: Path) -> None:
    def by_layer(writer: GGUFWriter) -> None:
        writer.add_uint32("llama.attention.value_length", 32)

    file = open_gguf(tiny_gguf.write(tmp_path / "tiny.gguf", extra=by_layer))
    assert context_and_cache(file, 3, None)[1].bytes_per_position == 2 * 2 * (64 + 32) * 2  # layers, heads, sizes
    file.metadata["llama.attention.head_count_kv"] = [2, 0]
    assert context_and_cache(file, 3, "int8")[1].bytes_per_position == 2 * (64 + 32) * 34 // 32
    file.metadata["llama.attention.head_count_kv"] = [2]
    with pytest.raises(TargetError, match="head_count_kv must be a positive number for each of 2 layers"):
        context_and_cache(file, 1, None)


def test_a_small_models_text_is_the_same_on_either_engine(larger_data: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra gguf)")
    file = larger_data / "models" / "llama-2-tiny-random.gguf"
    texts = []
    for engine in ("native", "llama.cpp"):
        request = Request("one", [1, 9038, 2501], 16, SamplingParams(temperature=0))
        result = generate(
            Engine(load_target(file, None, 1, 64, 1, engine=engine), None, EngineOptions(1, 48)), [request]
        )
        texts.append(result["one"].token_ids)
    assert texts[0] == texts[1]
    assert load_codec(file).encode("Once upon") == [1, 9038, 2501]
