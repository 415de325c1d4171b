"""Gathering, cleaning and packing of training text."""

import json
import lzma
from pathlib import Path

import pytest

from drafters.train import corpus
from drafters.train.corpus import CorpusError, Source, collect, pack, shingles, train_tokenizer

CODE = "def add(first, second):\n    return first + second\n" * 6
SECRET = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "a.py").write_text(CODE + "# a\n")
    (tmp_path / "copy.py").write_text(CODE + "# a\n")
    (tmp_path / "b.py").write_text(CODE + f'"""{SECRET}"""\n')
    (tmp_path / "short.py").write_text("x = 1\n")
    (tmp_path / "tests" / "test_a.py").write_text(CODE + "# test\n")
    return tmp_path


def test_duplicates_tests_and_benchmark_text_are_left_out(folder: Path) -> None:
    source = Source("python", str(folder), 10_000)
    assert sorted(collect([source], [], 0)) == sorted([CODE + "# a\n", CODE + f'"""{SECRET}"""\n'])
    assert collect([source], [SECRET.upper().replace(" ", ", ")], 0) == [CODE + "# a\n"]


def test_shingles_need_thirteen_words() -> None:
    assert shingles("a b c") == set()
    assert len(shingles(SECRET)) == 2


def test_max_chars_and_seed_choose_the_same_documents(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.py").write_text(CODE + f"# {i}\n")
    source = Source("python", str(tmp_path), 4 * len(CODE))
    assert len(collect([source], [], 1)) == 4
    assert collect([source], [], 1) == collect([source], [], 1) != collect([source], [], 2)


def test_records_and_chats_are_read_and_faults_named(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl.xz"
    with lzma.open(file, "wt") as out:
        out.write(json.dumps({"question": "2 + 2?", "answer": "4"}) + "\n")
    (text,) = collect([Source("chat", str(file), 100)], [], 0)
    assert text == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(CorpusError, match="line 2"):
        collect([Source("jsonl", str(bad), 100)], [], 0)
    with pytest.raises(CorpusError, match="does not exist"):
        collect([Source("python", str(tmp_path / "gone"), 100)], [], 0)
    with pytest.raises(CorpusError, match="kind 'csv'"):
        collect([Source("csv", str(bad), 100)], [], 0)


def test_the_tokenizer_keeps_text_and_packs_whole_documents() -> None:
    texts = [CODE, "print('größe 12 🙂')\n\n\n\tx_y = __init__\n"]
    tokenizer = train_tokenizer(texts, 400)
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    end = tokenizer.token_to_id(corpus.END_OF_TEXT)
    ids = pack(texts, tokenizer, end).tolist()
    assert [i for i, token in enumerate(ids) if token == end][-1] == len(ids) - 1
    assert ids.count(end) == 2
    assert any(tokenizer.id_to_token(t).startswith("ĊĠĠĠĠ") for t in ids)  # newline with its indentation is one token
