import itertools

import pytest

from server.bench import compare
from server.bench.compare import Race, acceptance_length, race, repeated_4gram_share, rotated
from server.bench.contestants import Case, Timed

CASES = [Case("a", (1,), 4), Case("b", (2,), 4)]


class Fake:
    """Answers with given seconds, and writes down when it was asked."""

    def __init__(self, name: str, seconds: list[float], log: list[str]) -> None:
        self.name = name
        self.seconds = itertools.cycle(seconds)
        self.log = log

    def run(self, case: Case) -> Timed:
        self.log.append(f"{self.name}{case.name}")
        return Timed((*case.prompt_ids, 5, 6, 7), next(self.seconds), rounds=2, committed=3)


def no_progress(name: str) -> None:
    pass


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "SETTLE_S", 0.0)


def test_contestants_take_turns_and_the_first_one_rotates() -> None:
    log: list[str] = []
    race([Fake("x", [1], log), Fake("y", [1], log)], CASES, 2, no_progress, lambda: log.append("|"))
    assert log == ["|", "xa", "ya", "|", "yb", "xb", "|", "ya", "xa", "|", "xb", "yb"]


def test_speed_is_the_median_over_repeats_of_tokens_over_seconds() -> None:
    result = race([Fake("x", [1, 2, 3, 3, 0.5, 0.5], [])], CASES, 3, no_progress)
    assert result.tokens_per_s("x") == [2.0, 1.0, 6.0]  # two texts of three tokens behind their first
    assert result.median_tokens_per_s("x") == 2.0
    assert result.acceptance_length("x") == 1.5


def test_equal_texts_are_counted_over_all_repeats() -> None:
    result = race([Fake("x", [1], [])], CASES, 2, no_progress)
    assert result.num_equal("x", [(1, 5, 6, 7), (2, 5, 6, 0)]) == (2, 4)


class Interrupting(Fake):
    """Ctrl-C comes in its third text."""

    def run(self, case: Case) -> Timed:
        if len(self.log) > 4:
            raise KeyboardInterrupt
        return super().run(case)


def test_interrupt_keeps_whole_cases_only() -> None:
    log: list[str] = []
    result = race([Fake("x", [1], log), Interrupting("y", [1], log)], CASES, 3, no_progress)
    assert result.interrupted
    assert (
        [len(repeat) for repeat in result.runs["x"]] == [len(repeat) for repeat in result.runs["y"]] == [2, 1]
    )  # x had done b when y was stopped
    assert result.tokens_per_s("x") == [3.0, 3.0]


def test_nothing_measured_gives_zero() -> None:
    assert Race(CASES, {"x": [[]]}).median_tokens_per_s("x") == 0.0
    assert acceptance_length([]) == 0.0


def test_rotated() -> None:
    fakes = [Fake(name, [1], []) for name in "xyz"]
    assert [fake.name for fake in rotated(fakes, 4)] == ["y", "z", "x"]


@pytest.mark.parametrize(
    ("texts", "share"),
    [([[1, 2, 3]], 0.0), ([[1] * 8], 4 / 5), ([list(range(9))], 0.0), ([list(range(8)), list(range(8))], 0.0)],
)
def test_repeated_4gram_share_counts_within_a_text(texts: list[list[int]], share: float) -> None:
    assert repeated_4gram_share(texts) == pytest.approx(share)
