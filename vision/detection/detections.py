"""What every detector answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Detections:
    """One image's answer by falling score: ``boxes`` [K, 4] in input pixels, ``scores`` [K], ``class_ids`` [K]."""

    boxes: Tensor
    scores: Tensor
    class_ids: Tensor

    def above(self, score: float) -> Detections:
        """Those of at least ``score``."""
        kept = self.scores >= score
        return Detections(self.boxes[kept], self.scores[kept], self.class_ids[kept])

    def cpu(self) -> Detections:
        """The same in main memory."""
        return Detections(self.boxes.cpu(), self.scores.cpu(), self.class_ids.cpu())
