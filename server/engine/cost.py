"""What a round costs and which drafts are worth their rows. Pure: numbers in, numbers out.

A round of B requests with n drafted nodes gives B + (expected accepted nodes) tokens and takes the time of drafting, of
a verify pass over B + n rows, T(B + n), and of everything else. The nodes are ranked by the probability that they are
accepted, so the best n of all requests together are the first n, and n is where most time is saved; zero is an answer
like any other. A token saves what one takes of late, drafts included: a draft that beats a plain round may still be
slower than what comes without it. Source: the idea of sizing trees by measured cost is that of Sequoia
(arXiv 2402.12374) and OPT-Tree (arXiv 2406.17276); ranking over all requests, on a curve that is measured at start and
refined, and the price of a token, are ours.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

DRIFT_RATE, SHAPE_RATE, SLOWING_RATE = 0.1, 0.03, 0.02
MOST_SLOWED, SWITCH_ROUNDS = 1.5, 16  # times, by drafting; so long a round is compared with those before the switch
WILDEST_RATIO = 2.0  # one pass that took longer than this times what was expected says that much and no more
PACE_RATE, EXCESS_KEPT = 0.3, 0.9
SPEEDUP_KEPT = 0.99  # a round
UNKNOWN_ROW_S, FEWEST_ROWS = 0.002, 8  # of a prompt's token before any was read; of a chunk that tells
MOST_SHOWN = 8  # positions of a request, in a round that tells what drafting takes
UNKNOWN_SLOPE = 0.1  # of T(1) for each further row, where nothing but T(1) is known


class VerifyCost:
    """T(n), seconds of a verify pass over n rows in all, from measured points; in between it is linear.

    ``record`` refines it while the server runs: quickly as a whole, since load and longer contexts slow every pass,
    and slowly point by point.

    slowed: how many times longer a pass takes behind drafting, whose weights take its own's place in the caches;
    learnt where rounds with and without drafting follow each other. since_switch: rounds since they last did.
    """

    def __init__(self, measured: Mapping[int, float]) -> None:
        """Errors: ValueError without a positive time for a positive number of rows."""
        if not measured or min(measured) < 1 or min(measured.values()) <= 0:
            raise ValueError(f"T(n) needs times above 0 for 1 row or more, got {dict(measured)}")
        self.points = dict(measured)
        self.drift = self.slowed = 1.0
        self.drafted, self.since_switch = False, SWITCH_ROUNDS
        self._order()

    def seconds(self, rows: int, *, drafted: bool = False) -> float:
        """T(rows), behind drafting or not; never less than for fewer rows."""
        known, times = self.known, self.times
        now = self.drift * (self.slowed if drafted else 1.0)
        if rows < known[0]:
            return now * times[0] * rows / known[0]
        if len(known) == 1:
            return now * times[0] * (1 + UNKNOWN_SLOPE * (rows - known[0]))
        high = min(max(bisect_left(known, rows), 1), len(known) - 1)
        share = (rows - known[high - 1]) / (known[high] - known[high - 1])
        return now * (times[high - 1] + share * (times[high] - times[high - 1]))

    def slowing_s(self, rows: int) -> float:
        """What drafting adds to a pass over so many rows."""
        return self.seconds(rows, drafted=True) - self.seconds(rows)

    def curve(self) -> dict[int, float]:
        """T(n) at the rows that were measured; may be asked for by any thread."""
        points = sorted(self.points.copy().items())
        times = itertools.accumulate((seconds for _, seconds in points), max)
        return {rows: self.drift * seconds for (rows, _), seconds in zip(points, times, strict=True)}

    def record(self, rows: int, seconds: float, *, drafted: bool = False) -> None:
        """A pass over so many rows took so long."""
        ratio = min(max(seconds / self.seconds(rows, drafted=drafted), 1 / WILDEST_RATIO), WILDEST_RATIO)
        shape = self.seconds(rows) / self.drift
        self.drift *= ratio**DRIFT_RATE
        self.since_switch = 0 if drafted != self.drafted else self.since_switch + 1
        self.drafted = drafted
        if self.since_switch < SWITCH_ROUNDS:
            self.slowed *= ratio ** (SLOWING_RATE if drafted else -SLOWING_RATE)
            self.slowed = min(max(self.slowed, 1.0), MOST_SLOWED)
        self.points[rows] = shape * ratio**SHAPE_RATE
        self._order()

    def _order(self) -> None:
        """The points in order, each at least as long as those of fewer rows."""
        self.known = sorted(self.points)
        self.times = list(itertools.accumulate((self.points[rows] for rows in self.known), max))


class PrefillPace:
    """Seconds that a token of a prompt takes, everything included, as the chunks read so far show.

    excess: by how much of its usual time a chunk may take longer; the largest seen lately counts, and fades.
    """

    def __init__(self, row_s: float = UNKNOWN_ROW_S) -> None:
        self.row_s = row_s
        self.excess = 0.0

    def seconds(self, rows: int) -> float:
        """To read so many tokens."""
        return rows * self.row_s

    def rows_in(self, seconds: float) -> int:
        """Tokens that are read within so long a time, also by a chunk as slow as the slowest of late."""
        return int(seconds / (self.row_s * (1 + self.excess)))

    def record(self, rows: int, seconds: float) -> None:
        """A chunk took so long; of a small one the fixed part of every pass would be taken for its rows'."""
        if rows >= FEWEST_ROWS:
            ratio = min(max(seconds / rows / self.row_s, 1 / WILDEST_RATIO), WILDEST_RATIO)
            self.excess = max(ratio - 1, self.excess * EXCESS_KEPT)
            self.row_s *= ratio**PACE_RATE


@dataclass
class DraftCost:
    """Seconds of drafting for a batch: a part that every round pays, showing the drafter something included, one for
    each level of the trees, and one for each committed position that it has yet to be shown.

    ratios: for each number of requests, how much longer than for one, as far as rounds have shown.
    """

    fixed_s: float
    level_s: float
    row_s: float
    ratios: dict[int, float] = field(default_factory=dict)

    def seconds(self, num_requests: int, depth: int) -> float:
        """For so many requests and ``depth`` levels after the first."""
        known = [number for number in self.ratios if number <= num_requests]
        ratio = self.ratios[max(known)] if known else 1.0
        return ratio * (self.fixed_s + self.level_s * (depth + 1))

    def record(self, num_requests: int, depth: int, num_shown: int, seconds: float) -> None:
        """A round's drafting took so long, ``num_shown`` positions that the drafter was shown before included.

        Where those are many, the time is theirs and says nothing.
        """
        seconds -= self.row_s * num_shown
        if seconds <= 0 or num_shown > MOST_SHOWN * num_requests:
            return
        expected = self.seconds(num_requests, depth)
        if expected <= 0:
            self.fixed_s = seconds
            return
        known = self.ratios.get(num_requests)
        change = seconds / expected if known is None else (seconds / expected) ** DRIFT_RATE
        self.ratios[num_requests] = (expected / (self.fixed_s + self.level_s * (depth + 1))) * change


class Speedup:
    """How many times faster than plain decoding the last hundred or so rounds were, for each number of requests."""

    def __init__(self) -> None:
        self.plain_s: dict[int, float] = {}
        self.spent_s: dict[int, float] = {}

    def factor(self, num_requests: int) -> float:
        """At least 1: decoding without drafts is always to be had. 1 as well where nothing is known."""
        plain_s = self.plain_s.get(num_requests, 0.0)
        return max(plain_s / self.spent_s[num_requests], 1.0) if plain_s else 1.0

    def record(self, num_requests: int, plain_s: float, spent_s: float) -> None:
        """A round took so long, and its tokens would have taken ``plain_s`` without drafts."""
        for sums, seconds in ((self.plain_s, plain_s), (self.spent_s, spent_s)):
            sums[num_requests] = SPEEDUP_KEPT * sums.get(num_requests, 0.0) + seconds


@dataclass(frozen=True)
class Spent:
    """What a finished round took and gave: all rows of its pass; seconds of drafting, the pass, and all beside them."""

    num_requests: int
    rows: int
    num_tokens: int
    draft_s: float
    verify_s: float
    other_s: float


@dataclass
class Costs:
    """Everything a round is weighed by. overhead_s: what a round takes beside drafting and the verify pass."""

    verify: VerifyCost
    draft: DraftCost
    overhead_s: float = 0.0
    speedup: Speedup = field(default_factory=Speedup)

    def prefill_pace(self) -> PrefillPace:
        """What a prompt's token will take, before one was read: its share of the largest pass measured."""
        rows = max(self.verify.points)
        return PrefillPace(self.verify.seconds(rows) / rows)

    def plain_s(self, num_requests: int) -> float:
        """A round without drafts."""
        return self.overhead_s + self.verify.seconds(num_requests)

    def token_s(self, num_requests: int) -> float:
        """What a token takes of late where so many requests run, and so what one that is accepted saves."""
        return self.plain_s(num_requests) / num_requests / self.speedup.factor(num_requests)

    def saved_s(self, num_requests: int, gain: float, nodes: int, draft_s: float = 0.0) -> float:
        """Seconds that ``gain`` more tokens save beyond what so many drafted nodes take; below 0 where they lose."""
        rows_s = self.verify.seconds(num_requests + nodes) - self.verify.seconds(num_requests)
        return gain * self.token_s(num_requests) - rows_s - draft_s

    def record(self, spent: Spent, *, drafted: bool = False) -> None:
        """A finished round, in which the drafter worked or not. What it brought is weighed by its expected time: load
        falls on plain rounds alike."""
        self.verify.record(spent.rows, spent.verify_s, drafted=drafted)
        self.overhead_s += DRIFT_RATE * (spent.other_s - self.overhead_s)
        plain_s = spent.num_tokens * self.plain_s(spent.num_requests) / spent.num_requests
        expected_s = spent.draft_s + self.overhead_s + self.verify.seconds(spent.rows, drafted=drafted)
        self.speedup.record(spent.num_requests, plain_s, expected_s)


def best_count(costs: Costs, num_requests: int, gains: Sequence[float]) -> tuple[int, float]:
    """How many of the drafted nodes to verify, and the seconds that they are expected to save.

    ``gains``: the probability of each to be accepted, falling.
    """
    best, best_s, total = 0, 0.0, 0.0
    token_s, plain_s = costs.token_s(num_requests), costs.verify.seconds(num_requests)
    for count, gain in enumerate(gains, 1):
        total += gain
        saved_s = total * token_s + plain_s - costs.verify.seconds(num_requests + count)
        if saved_s > best_s:
            best, best_s = count, saved_s
    return best, best_s
