"""Damaged and hostile files end in one sentence that names the file and the cause."""

import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from server.targets.gguf.header import open_gguf
from server.targets.gguf.loading import load_gguf_target
from server.targets.gguf.tokenizer import read_codec
from server.targets.loading import load_target
from server.targets.target import TargetError
from server.text import ChatTemplateError, TextError


@pytest.fixture(scope="module")
def whole(tiny_gguf: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_gguf.write(tmp_path_factory.mktemp("whole") / "whole.gguf").read_bytes()


def refusal(file: Path) -> str:
    """What is said of a file that must be refused; it names the file's folder."""
    with pytest.raises(TargetError) as caught:
        load_gguf_target(file, None, 1, 64)
    message = str(caught.value)
    return message if str(file.parent) in message and "\n" not in message else f"no file is named: {message}"


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor_fields(data: bytes, name: str) -> int:
    """Where the dimensions of a tensor's header begin."""
    return data.index(text(name)) + len(text(name))


def lying_offset(data: bytes) -> bytes:
    at = tensor_fields(data, "blk.0.attn_q.weight") + 4 + 16 + 4
    return data[:at] + struct.pack("<Q", 1 << 40) + data[at + 8 :]


def overlapping(data: bytes) -> bytes:
    at = tensor_fields(data, "blk.1.attn_q.weight") + 4 + 16 + 4
    return data[:at] + struct.pack("<Q", 0) + data[at + 8 :]


def lying_size(data: bytes) -> bytes:
    at = tensor_fields(data, "blk.0.attn_q.weight") + 4
    return data[:at] + struct.pack("<QQ", 256, 1 << 50) + data[at + 16 :]


def unknown_type(data: bytes) -> bytes:
    at = tensor_fields(data, "blk.0.attn_q.weight") + 4 + 16
    return data[:at] + struct.pack("<I", 999) + data[at + 4 :]


def with_number(key: str, old: float, new: float, kind: str = "<I") -> Callable[[bytes], bytes]:
    """The file with another number behind a key; ``kind`` is that of the number."""
    before = key.encode() + struct.pack("<I", {"<I": 4, "<f": 6}[kind])

    def damage(data: bytes) -> bytes:
        return replaced(data, before + struct.pack(kind, old), before + struct.pack(kind, new))

    return damage


def long_list(data: bytes) -> bytes:
    before = b"tokenizer.ggml.tokens" + struct.pack("<II", 9, 8)
    at = data.index(before) + len(before)
    return data[:at] + struct.pack("<Q", 1 << 40) + data[at + 8 :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "no GGUF file"),
    "magic": (lambda data: b"GGML" + data[4:], "no GGUF file"),
    "cut in the header": (lambda data: data[:500], "truncated"),
    "cut in the weights": (lambda data: data[:-1000], "truncated.*blk"),
    "version": (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "version 9"),
    "big-endian": (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
    "many tensors": (lambda data: data[:8] + struct.pack("<Q", 1 << 62) + data[16:], "truncated|0 dimensions"),
    "many keys": (lambda data: data[:16] + struct.pack("<Q", 1 << 62) + data[24:], "truncated"),
    "a key longer than the file": (lambda data: data[:24] + struct.pack("<Q", 1 << 62) + data[32:], "truncated"),
    "a list longer than the file": (long_list, "tokenizer.ggml.tokens"),
    "layers that are not there": (
        with_number("llama.block_count", 2, (1 << 31) - 1),
        "2147483647, tensors of 2 layers",
    ),
    "another width": (with_number("llama.embedding_length", 256, 1 << 30), "embedding_length"),
    "another inner width": (with_number("feed_forward_length", 256, 512), "ffn_gate"),
    "no heads": (with_number("attention.head_count", 4, 0), "head_count must be a positive number"),
    "more heads": (with_number("attention.head_count", 4, 256), "heads of 1"),
    "more key heads": (with_number("attention.head_count_kv", 2, 4), "attn_k"),
    "a norm's negative epsilon": (with_number("layer_norm_rms_epsilon", 1e-5, -1.0, "<f"), "epsilon must be a finite"),
    "a norm's epsilon that is no number": (
        with_number("rms_epsilon", 1e-5, math.nan, "<f"),
        "epsilon must be a finite",
    ),
    "a rotary base of 0": (with_number("llama.rope.freq_base", 10000.0, 0.0, "<f"), "freq_base must be a finite"),
    "positions beyond 32 bits": (with_number("llama.context_length", 256, 2**31), "positive number below 2\\*\\*31"),
    "lying offset": (lying_offset, "blk.0.attn_q.weight"),
    "overlapping tensors": (overlapping, "over another"),
    "lying size": (lying_size, "blk.0.attn_q.weight"),
    "unknown type": (unknown_type, "blk.0.attn_q.weight has the unknown type 999"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named(case: str, whole: bytes, tmp_path: Path) -> None:
    damage, words = DAMAGES[case]
    file = tmp_path / "damaged.gguf"
    file.write_bytes(damage(whole))
    assert re.search(words, refusal(file))


def test_a_file_cut_anywhere_is_refused(whole: bytes, tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    for length in range(0, len(whole), len(whole) // 97):
        file.write_bytes(whole[:length])
        with pytest.raises(TargetError) as caught:
            open_gguf(file)
        assert str(file) in str(caught.value), length


def test_a_missing_part_is_named(tiny_gguf: Any, tmp_path: Path) -> None:
    tiny_gguf.write(tmp_path / "tiny.gguf", split=5)
    parts = sorted(tmp_path.glob("*.gguf"))
    parts[1].unlink()
    assert f"missing beside it: {parts[1].name}" in refusal(parts[0])
    alone = parts[0].rename(tmp_path / "alone.gguf")
    assert re.search("one of .* parts|promises", refusal(alone))


def test_a_damaged_part_is_named(tiny_gguf: Any, tmp_path: Path) -> None:
    tiny_gguf.write(tmp_path / "tiny.gguf", split=5)
    parts = sorted(tmp_path.glob("*.gguf"))
    kept = parts[1].read_bytes()
    parts[1].write_bytes(kept[:-100])
    assert re.search(f"{parts[1].name} is truncated", refusal(parts[0]))
    parts[1].write_bytes(parts[2].read_bytes())
    assert "the parts do not belong together" in refusal(parts[0])


def test_architectures_types_and_empty_models_are_named(tiny_gguf: Any, tmp_path: Path) -> None:
    mamba = tiny_gguf.write(tmp_path / "mamba.gguf", architecture="mamba")
    assert re.search("architecture 'mamba'; known are .*llama", refusal(mamba))
    two_bit = tiny_gguf.write(tmp_path / "q2.gguf", kinds={"attn_v": GGMLQuantizationType.Q2_K})
    assert re.search("attn_v.weight .*Q2_K", refusal(two_bit))
    writer = GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    writer.add_token_list(["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "vocabulary.gguf holds a vocabulary only" in refusal(tmp_path / "vocabulary.gguf")
    for engine in (None, "native", "llama.cpp"):
        with pytest.raises(TargetError, match=r"vocabulary.gguf holds a vocabulary only|needs llama-cpp-python"):
            load_target(tmp_path / "vocabulary.gguf", None, 1, 64, 1, engine=engine)


@pytest.mark.parametrize(
    ("add", "words"),
    [
        (lambda writer: writer.add_rope_dimension_count(128), "dimension_count is 128; it must be even and at most 64"),
        (
            lambda writer: writer.add_rope_dimension_count(32),
            "dimension_count is 32; only llama models that turn all 64",
        ),
        (lambda writer: writer.add_string("llama.rope.scaling.type", "odd"), "rope scaling 'odd' is not read"),
        (lambda writer: writer.add_rope_scaling_factor(-2.0), "scaling.factor must be a finite number above 0"),
        (lambda writer: writer.add_rope_scaling_factor(math.inf), "scaling.factor must be a finite number above 0"),
    ],
    ids=["more than a head", "a part of a head", "a type", "a negative factor", "an endless factor"],
)
def test_rotary_embeddings_that_are_not_computed_are_named(
    add: Callable[[GGUFWriter], None], words: str, tiny_gguf: Any, tmp_path: Path
) -> None:
    assert re.search(words, refusal(tiny_gguf.write(tmp_path / "turned.gguf", extra=add)))


def test_what_transformers_refuses_is_one_sentence(tiny_gguf: Any, tmp_path: Path) -> None:
    def scaled(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_factor(4.0)

    told = refusal(tiny_gguf.write(tmp_path / "scaled.gguf", architecture="phi3", extra=scaled))
    assert re.match(r"\S*scaled.gguf: its metadata does not describe a phi3 model: .", told)


def test_bad_vocabularies_are_named(tiny_gguf: Any, whole: bytes, tmp_path: Path) -> None:
    cases = {
        "unknown pre-tokenizer": (text("smollm"), text("smollx"), "'smollx'"),
        "another kind": (text("gpt2"), text("bert"), "'bert'"),
        "an id outside": (
            b"eos_token_id" + struct.pack("<II", 4, 2),
            b"eos_token_id" + struct.pack("<II", 4, 999),
            "999",
        ),
    }
    for name, (old, new, words) in cases.items():
        file = tmp_path / "vocabulary.gguf"
        file.write_bytes(replaced(whole, old, new))
        with pytest.raises(TextError) as caught:
            read_codec(file)
        assert words in str(caught.value) and str(file) in str(caught.value), name


def test_a_hostile_template_runs_nothing(tiny_gguf: Any, tmp_path: Path) -> None:
    evil = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    file = tiny_gguf.write(tmp_path / "evil.gguf")
    template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    file.write_bytes(
        replaced(
            file.read_bytes(), text(template), struct.pack("<Q", len(template)) + evil.ljust(len(template)).encode()
        )
    )
    with pytest.raises(ChatTemplateError) as caught:
        read_codec(file).chat([{"role": "user", "content": "hello"}])
    assert "__class__" in str(caught.value) or "unsafe" in str(caught.value)
