"""When something that failed is tried again: after a pause that doubles with every failure in a row."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0


@dataclass
class Recovery:
    """reason: why it failed, for people; empty while it works. Times are seconds of a clock that only rises."""

    reason: str = ""
    pause_s: float = 0.0
    until: float = 0.0

    def failed(self, reason: str, now: float) -> None:
        """Pause, twice as long as the last time in a row."""
        self.reason = reason
        self.pause_s = min(max(2 * self.pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        self.until = now + self.pause_s

    def succeeded(self) -> None:
        """It works."""
        self.reason, self.pause_s = "", 0.0
