"""Batches of similar lengths: everything once an epoch, in an order of its own for every epoch, with little padding."""

import torch

from drafters.train.batches import SimilarLengths, lengths_of


def padding(batches: list[list[int]], lengths: list[int]) -> int:
    return sum(len(batch) * max(lengths[i] for i in batch) - sum(lengths[i] for i in batch) for batch in batches)


def test_an_epoch_is_everything_once_and_the_next_another_order() -> None:
    lengths = torch.randint(10, 500, (203,), generator=torch.Generator().manual_seed(1)).tolist()
    sampler = SimilarLengths(lengths, batch_size=8, seed=3)
    first = list(sampler)
    assert sorted(index for batch in first for index in batch) == list(range(203))
    assert len(first) == len(sampler) == 26
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    in_order = [list(range(start, min(start + 8, 203))) for start in range(0, 203, 8)]
    assert padding(first, lengths) < 0.3 * padding(in_order, lengths)


def test_the_last_smaller_batch_can_be_left_out() -> None:
    sampler = SimilarLengths([5] * 11, batch_size=4, seed=0, drop_last=True)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 2
    assert all(len(batch) == 4 for batch in batches)


def test_lengths_are_those_of_the_samples() -> None:
    assert lengths_of([{"input_ids": torch.zeros(n)} for n in (3, 7)]) == [3, 7]
