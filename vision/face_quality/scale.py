"""Raw scores to the integers 0 to 100 of ISO/IEC 29794-5, by the sigmoid its reference implementation OFIQ uses."""

from __future__ import annotations

import math
from dataclasses import dataclass

# ISO/IEC 29794-5: the answer where no score could be computed.
FAILURE_TO_ASSESS = -1


@dataclass(frozen=True)
class QualityScale:
    """100 / (1 + exp((midpoint - raw) / width)), rounded; ``midpoint`` becomes 50. Monotone: error curves stay."""

    midpoint: float
    width: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.midpoint) and math.isfinite(self.width) and self.width > 0):
            raise ValueError(f"midpoint is {self.midpoint} and width {self.width}; both must be finite, width above 0")

    def quality(self, raw: float) -> int:
        """0 to 100, higher is better; ``FAILURE_TO_ASSESS`` for a raw score that is not finite."""
        if not math.isfinite(raw):
            return FAILURE_TO_ASSESS
        # tanh never overflows, exp does.
        return round(50 * (1 + math.tanh((raw - self.midpoint) / (2 * self.width))))
