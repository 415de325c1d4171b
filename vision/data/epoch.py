"""The epoch of a data set, as its loader workers see it."""

from __future__ import annotations

import torch
from torch import Tensor


def shared_epoch() -> Tensor:
    """A number in shared memory: workers live as long as the loader, so that what they have cached is not lost."""
    epoch: Tensor = torch.zeros((), dtype=torch.long)
    epoch.share_memory_()  # type: ignore[no-untyped-call]
    return epoch
