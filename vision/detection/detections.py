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

    def cpu(self) -> Detections:
        """The same in main memory."""
        return Detections(self.boxes.cpu(), self.scores.cpu(), self.class_ids.cpu())
