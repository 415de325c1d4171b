"""Which tokens a drafter with a trimmed vocabulary can draft: the most frequent ones of its training data.

Verification keeps the whole vocabulary, so texts do not change; a token outside is never drafted and costs a round.
Source: FR-Spec (arXiv 2502.14856), which counts a general corpus; counting the training data itself is EAGLE-3's way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def frequent_tokens(samples: Any, vocab_size: int, count: int) -> Tensor:
    """int64 [count], rising: the tokens that occur most at positions that count; of equals the lower id.

    ``samples`` is a FeatureSource's data set of ``input_ids`` [T] and ``loss_mask`` [T].
    """
    totals = torch.zeros(vocab_size, dtype=torch.long)
    for index in range(len(samples)):
        sample = samples[index]
        totals += torch.bincount(sample["input_ids"][sample["loss_mask"] > 0], minlength=vocab_size)
    return totals.argsort(descending=True, stable=True)[:count].sort().values
