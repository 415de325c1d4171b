"""Batches of samples of similar lengths, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

POOL = 16  # batches whose samples are sorted together: more leave less padding and mix the lengths less


class SimilarLengths(Sampler[list[int]]):
    """Every sample once an epoch, in an order that depends on ``seed`` and the epoch alone.

    Shuffled samples are cut into pools, each pool is sorted by ``lengths`` and cut into batches, and the batches are
    shuffled. With ``drop_last`` an epoch's last, smaller batch is left out.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, drop_last: bool = False) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Which order the next pass takes."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        batches: list[list[int]] = []
        for first in range(0, len(order), POOL * self.batch_size):
            pool = sorted(order[first : first + POOL * self.batch_size], key=lambda index: self.lengths[index])
            batches += [pool[start : start + self.batch_size] for start in range(0, len(pool), self.batch_size)]
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == self.batch_size]
        yield from (batches[index] for index in torch.randperm(len(batches), generator=generator).tolist())


def lengths_of(samples: Any) -> list[int]:
    """Tokens of each sample of a FeatureSource's data set."""
    return [len(samples[index]["input_ids"]) for index in range(len(samples))]
