from pathlib import Path

import pytest

from server.bench.prompts import SuiteError, list_suites, load_prompts


@pytest.mark.parametrize(("suite", "count"), [("gsm8k", 1319), ("humaneval", 164), ("mt-bench", 80)])
def test_shipped_suites_are_whole(suite: str, count: int) -> None:
    assert suite in list_suites()
    prompts = load_prompts(suite)
    assert len(prompts) == count
    assert len({prompt.name for prompt in prompts}) == count
    assert all(bool(prompt.text) != bool(prompt.turns) for prompt in prompts)


def test_limit_takes_the_first() -> None:
    assert load_prompts("humaneval", 3) == load_prompts("humaneval")[:3]


def test_file_of_prompts_and_chats(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"turns": ["b", "c"], "id": 7}\n', encoding="utf-8")
    first, second = load_prompts(str(file))
    assert first.text == "a" and first.name == "mine.jsonl, line 1"
    assert second.turns == ("b", "c") and second.name == "7"


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"prompt": ""}', '{"prompt": 1}', '{"turns": []}', '{"turns": ["a", ""]}',
     '{"prompt": "a", "turns": ["b"]}'],
)  # fmt: skip
def test_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(SuiteError, match=r"bad\.jsonl, line 2"):
        load_prompts(str(file))


def test_unknown_suite_names_the_known_ones() -> None:
    with pytest.raises(SuiteError, match="humaneval"):
        load_prompts("humanevil")


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(SuiteError, match="no prompts"):
        load_prompts(str(tmp_path / "none.jsonl"))
