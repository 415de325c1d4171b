"""Token ids equal llama.cpp's: recorded for some hundred odd strings, live for ten thousand, and in its own cases.

``recorded_tokens.json`` holds, per vocabulary, a checksum of the ids that llama-cpp-python 0.3.36 gave each string of
``odd_strings(len, 7)``; written by ``record`` below.
"""

import json
import re
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from odd_strings import odd_strings

from server.launch import load_codec
from server.own_models import OwnModelError, default_target
from server.text import TextCodec

RECORDED = Path(__file__).parent / "recorded_tokens.json"
VOCABULARIES = ("llama-spm", "phi-3", "gpt-2", "falcon", "mpt", "starcoder", "deepseek-coder")
DEFAULT = "smollm2"
SEED = 7
# After Phi-3's special tokens llama.cpp strips ASCII spaces, the model's own tokenizer any space; ours does as that.
OTHER_SPACES = re.compile(r"(<\|user\|>|<\|end\|>|</s>)\s*[^\S \t\n\v\f\r]")


@pytest.fixture(scope="session")
def vocabularies(larger_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabularies")
    with tarfile.open(larger_data / "tokenizers" / "ggml-vocab.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "ggml-vocab"


def file_of(name: str, request: pytest.FixtureRequest) -> Path:
    if name != DEFAULT:
        folder: Path = request.getfixturevalue("vocabularies")
        return folder / f"ggml-vocab-{name}.gguf"
    try:
        return default_target()
    except OwnModelError as error:
        pytest.skip(str(error))


def checksum(token_ids: Iterable[int]) -> str:
    return f"{zlib.crc32(' '.join(map(str, token_ids)).encode()):08x}"


def peer_of(file: Path) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra gguf)")
    return llama_cpp.Llama(str(file), vocab_only=True, verbose=False)


def record(files: dict[str, Path], count: int = 300) -> None:
    """Write the checksums anew; strings on which llama.cpp differs from the model's own tokenizer are left empty."""
    found = {}
    for name, file in files.items():
        peer, codec = peer_of(file), load_codec(file)
        texts = odd_strings(count, SEED)
        sums = [checksum(peer.tokenize(text.encode(), add_bos=True, special=True)) for text in texts]
        found[name] = ["" if differs(name, text, codec) else one for text, one in zip(texts, sums, strict=True)]
    RECORDED.write_text(json.dumps(found), encoding="utf-8")


def differs(name: str, text: str, codec: TextCodec) -> bool:
    """Where llama.cpp differs from the model's own tokenizer, which ours follows.

    Letters on both sides of a control character that the vocabulary lacks are merged by the model's own tokenizer.
    """
    lacks = any(character < " " and not codec.tokenizer.encode(character).ids for character in text)
    return lacks or (name == "phi-3" and OTHER_SPACES.search(text) is not None)


@pytest.mark.parametrize("name", [*VOCABULARIES, DEFAULT])
def test_odd_strings_give_the_recorded_tokens(name: str, request: pytest.FixtureRequest) -> None:
    codec = load_codec(file_of(name, request))
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    texts = odd_strings(len(recorded), SEED)
    wrong = [text for text, want in zip(texts, recorded, strict=True) if want and checksum(codec.encode(text)) != want]
    assert not wrong
    assert sum(map(bool, recorded)) > 250


@pytest.mark.slow
@pytest.mark.parametrize("name", [*VOCABULARIES, DEFAULT])
def test_ten_thousand_strings_give_llama_cpps_tokens(name: str, request: pytest.FixtureRequest) -> None:
    file = file_of(name, request)
    codec, peer = load_codec(file), peer_of(file)
    wrong = [
        text
        for text in odd_strings(10_000, SEED + 1)
        if not differs(name, text, codec)
        and codec.encode(text) != peer.tokenize(text.encode(), add_bos=True, special=True)
    ]

    assert not wrong


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_authors_own_cases(name: str, vocabularies: Path) -> None:
    file = vocabularies / f"ggml-vocab-{name}.gguf"
    codec = load_codec(file)
    texts = Path(f"{file}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{file}.out").read_text(encoding="utf-8").splitlines()
    for text, line in zip(texts, lines, strict=False):
        ids = codec.tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == [int(token_id) for token_id in line.split()], repr(text)


def test_kinds_that_are_not_read_are_refused_by_name(vocabularies: Path) -> None:
    with pytest.raises(ValueError, match="a tokenizer of kind 'bert' is not read"):
        load_codec(vocabularies / "ggml-vocab-bert-bge.gguf")
