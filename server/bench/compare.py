"""Plain and Dovetail decoding in turns on the same prompts, in one process, with the peers beside them.

Every contestant generates every text several times. Who goes first rotates from text to text, so that heat and other
load fall on all alike. A contestant's speed in one repeat is its tokens over its decoding seconds, prompts excluded;
its figure is the median over repeats, and speed-ups are ratios of those medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.bench.contestants import Case, Contestant, Timed

Progress = Callable[[str], None]

SETTLE_S = 0.05  # before each run: other engines' threads spin on for some milliseconds behind their work


@dataclass
class Race:
    """What the contestants did. ``runs[name][repeat]`` holds one entry per case; a repeat may be unfinished."""

    cases: Sequence[Case]
    runs: dict[str, list[list[Timed]]] = field(default_factory=dict)
    interrupted: bool = False

    def tokens_per_s(self, name: str) -> list[float]:
        """Decoding speed of each repeat; the first token of a text belongs to its prompt and does not count."""
        speeds = []
        for repeat in self.runs[name]:
            seconds = sum(run.seconds for run in repeat)
            num_tokens = sum(max(len(run.token_ids) - 1, 0) for run in repeat)
            if num_tokens and seconds > 0:
                speeds.append(num_tokens / seconds)
        return speeds

    def median_tokens_per_s(self, name: str) -> float:
        """The contestant's figure; 0 when it has not decoded anything."""
        return statistics.median(self.tokens_per_s(name) or [0.0])

    def acceptance_length(self, name: str) -> float:
        """Tokens per verify pass over all runs."""
        runs = [run for repeat in self.runs[name] for run in repeat]
        return acceptance_length(runs)

    def num_equal(self, name: str, references: Sequence[Sequence[int]]) -> tuple[int, int]:
        """(texts equal to the reference, texts generated), over all repeats."""
        pairs = [
            (run.token_ids, tuple(reference))
            for repeat in self.runs[name]
            for run, reference in zip(repeat, references, strict=False)
        ]
        return sum(got == want for got, want in pairs), len(pairs)


def race(
    contestants: Sequence[Contestant],
    cases: Sequence[Case],
    repeats: int,
    progress: Progress,
    beside: Callable[[], object] = lambda: None,
) -> Race:
    """Let everyone generate everything ``repeats`` times. Ctrl-C ends the race early; what was measured is kept.

    ``beside`` is called before each text: what is to be measured in turns with the contestants.
    An interrupted case is dropped for all, so that every contestant is judged by the same texts.
    """
    result = Race(cases, {contestant.name: [] for contestant in contestants})
    try:
        for repeat in range(repeats):
            for runs in result.runs.values():
                runs.append([])
            for number, case in enumerate(cases):
                beside()
                timed = {}
                for contestant in rotated(contestants, repeat + number):
                    time.sleep(SETTLE_S)
                    timed[contestant.name] = contestant.run(case)
                    progress(contestant.name)
                for name, run in timed.items():
                    result.runs[name][repeat].append(run)
    except KeyboardInterrupt:
        result.interrupted = True
    return result


def rotated(contestants: Sequence[Contestant], by: int) -> list[Contestant]:
    """The same contestants, beginning with another one."""
    first = by % len(contestants)
    return [*contestants[first:], *contestants[:first]]


def acceptance_length(runs: Sequence[Timed]) -> float:
    """Tokens committed per verify pass, the target's own token included."""
    rounds = sum(run.rounds for run in runs)
    return sum(run.committed for run in runs) / rounds if rounds else 0.0


def repeated_4gram_share(texts: Sequence[Sequence[int]]) -> float:
    """Of all runs of four tokens, the share that stood in the same text before. Looping text drafts too easily."""
    num_repeated = num_total = 0
    for text in texts:
        grams = [tuple(text[i : i + 4]) for i in range(len(text) - 3)]
        num_total += len(grams)
        num_repeated += len(grams) - len(set(grams))
    return num_repeated / num_total if num_total else 0.0
