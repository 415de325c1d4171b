"""Speculation never loses: drafting is switched off where drafted rounds give fewer tokens/s than plain ones."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

DECAY = 0.9
PROBE_EVERY = 64
FIRST_PROBE = 8
PLAIN_PROBE_ROUNDS = 2
DRAFTED_PROBE_ROUNDS = 8
PROBE_TIME_SHARE = 0.05  # of all decoding time, at most: drafted rounds can be many times as long as plain ones


@dataclass
class Rate:
    """Tokens per second as a ratio of two moving sums, so that long rounds weigh more than short ones."""

    tokens: float = 0.0
    seconds: float = 0.0
    rounds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Take in one round."""
        self.tokens = DECAY * self.tokens + tokens
        self.seconds = DECAY * self.seconds + seconds
        self.rounds = DECAY * self.rounds + 1

    @property
    def per_second(self) -> float:
        """The moving rate; 0 before the first round."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def round_s(self) -> float:
        """Seconds of a round; 0 before the first."""
        return self.seconds / self.rounds if self.rounds else 0.0


@dataclass
class Mode:
    """What one batch size does now, and how long ago it last looked at the alternative.

    since_probe_s: seconds of decoding since then.
    """

    drafting: bool = True
    probe_left: int = 0
    rounds_since_probe: int = PROBE_EVERY - FIRST_PROBE
    since_probe_s: float = 0.0
    drafted: Rate = field(default_factory=Rate)
    plain: Rate = field(default_factory=Rate)


class DraftGuard:
    """Chooses between drafted and plain rounds, apart for every number of requests in the batch.

    It drafts until a probe of plain rounds says otherwise; from time to time, 64 rounds apart at least and for a
    twentieth of the time at most, the mode not in use gets a short, freshly measured probe, because texts and load
    change. Constants are ours.
    """

    def __init__(self) -> None:
        self.modes: dict[int, Mode] = defaultdict(Mode)

    def wants_draft(self, batch_size: int) -> bool:
        """Whether the next round of so many requests should be drafted."""
        mode = self.modes[batch_size]
        return mode.drafting != (mode.probe_left > 0)

    def record(self, batch_size: int, drafted: bool, tokens: int, seconds: float) -> None:
        """Take in a finished round; begin or end a probe."""
        mode = self.modes[batch_size]
        (mode.drafted if drafted else mode.plain).add(tokens, seconds)
        if mode.probe_left > 0:
            mode.probe_left -= 1
            if mode.probe_left == 0:
                mode.drafting = mode.drafted.per_second >= mode.plain.per_second
            return
        mode.rounds_since_probe += 1
        mode.since_probe_s += seconds
        self.begin_probe_if_due(mode)

    def begin_probe_if_due(self, mode: Mode) -> None:
        """Let the mode not in use run for a few rounds, measured afresh, when its time has come and is affordable."""
        num_rounds = PLAIN_PROBE_ROUNDS if mode.drafting else DRAFTED_PROBE_ROUNDS
        other = mode.plain if mode.drafting else mode.drafted
        is_affordable = num_rounds * other.round_s <= PROBE_TIME_SHARE * mode.since_probe_s
        if mode.rounds_since_probe < PROBE_EVERY or not is_affordable:
            return
        mode.rounds_since_probe, mode.since_probe_s, mode.probe_left = 0, 0.0, num_rounds
        if mode.drafting:
            mode.plain = Rate()
        else:
            mode.drafted = Rate()
