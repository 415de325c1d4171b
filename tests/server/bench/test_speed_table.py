"""Reports of several runs in one table: repeats join, suites stay apart, other machines and models are refused."""

import copy
from pathlib import Path
from typing import Any

import pytest

from server.bench.speed_table import as_markdown, merge_reports, plot_speeds
from server.bench.texts import BenchError


def report(suite: str, temperature: float, plain: float, dovetail: float, length: float) -> dict[str, Any]:
    def speed(value: float) -> dict[str, Any]:
        return {"tokens_per_s": value, "repeats_tokens_per_s": [value], "equal_texts": 2, "texts": 2}

    drafted = {"draft_share": 0.25, "rows_per_round": 4.0}
    return {
        "hardware": {"cpu": "a processor", "threads": 2},
        "target": {"name": "model", "weights": "Q4_1"},
        "drafter": {"name": "drafter", "rows": 8},
        "conditions": {
            "suite": suite, "temperature": temperature, "chat": True, "texts": 2, "max_tokens": 64,
            "mean_output_tokens": 50.0,
        },
        "plain": speed(plain),
        "lookup": speed(1.5 * plain) | drafted | {"acceptance_length": 1.4},
        "dovetail": speed(dovetail) | drafted | {"acceptance_length": length},
        "peers": {"llama.cpp": speed(plain / 2) | {"equal_texts": None}, "transformers": {"skipped": "no"}},
        "verify_ms": {"1": 5.0, "8": 10.0},
        "ngram_acceptance_length": 1.5,
        "repeated_4gram_share": 0.2,
    }  # fmt: skip


REPORTS = [
    report("humaneval", 0.0, 100.0, 180.0, 2.0), report("humaneval", 0.0, 120.0, 240.0, 3.0),
    report("humaneval", 0.0, 110.0, 210.0, 2.5), report("humaneval", 0.7, 90.0, 90.0, 1.5),
]  # fmt: skip


def test_repeats_of_a_suite_join_and_temperatures_stay_apart(tmp_path: Path) -> None:
    merged = merge_reports(REPORTS)
    greedy, sampled = merged["runs"]
    assert greedy["tokens_per_s"] == {"plain": 110.0, "lookup": 165.0, "dovetail": 210.0, "llama.cpp": 55.0}
    assert greedy["times_plain"]["dovetail"] == 1.91 and greedy["times_llama_cpp"]["dovetail"] == 3.82
    assert greedy["acceptance_length"] == {"lookup": 1.4, "dovetail": 2.5}
    assert greedy["texts"] == 6 and greedy["equal_texts"] == [[6, 6], [6, 6]]
    assert (sampled["temperature"], sampled["times_plain"]["dovetail"]) == (0.7, 1.0)
    lines = as_markdown(merged).splitlines()
    assert len(lines) == 4 and lines[0].startswith("| suite | temperature | llama.cpp, tokens/s | plain, tokens/s |")
    assert lines[2].endswith("| 1.91 | 3.82 | 2.50 | 1.40 | 4.0 | 25% |")
    plot_speeds(merged, tmp_path / "speeds.png")
    assert (tmp_path / "speeds.png").stat().st_size > 1000


@pytest.mark.parametrize(("what", "key"), [("hardware", "cpu"), ("target", "weights"), ("drafter", "name")])
def test_what_cannot_be_compared_is_refused(what: str, key: str) -> None:
    other = copy.deepcopy(REPORTS[0])
    other[what][key] = "another"
    with pytest.raises(BenchError, match=f"different {what}: .* and 'another'"):
        merge_reports([REPORTS[0], other])
